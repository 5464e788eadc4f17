"""How the demo's defaults were chosen, and what choosing layers is worth on it.

    python demo/sweep.py settings        # speed-up by M, K, exit threshold and interval
    python demo/sweep.py sets            # acceptance: the dynamic program against 20 random sets

Both decode 128 tokens from prompts of demo/prompts.jsonl, greedily and at temperature 1: `sets`
from every second, `settings` from one of each category, each time plainly and with CLaSp in turn,
and the ratio of the rates is what is printed.
"""
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clasp_mini  # noqa: E402
from clasp_mini import choose_skip, figures  # noqa: E402
from speculative import Chance, Settings, generate  # noqa: E402


def setup() -> tuple[clasp_mini.Job, list[list[int]]]:
    job = clasp_mini.Job(clasp_mini.parser().parse_args(["--prompt", "-", *sys.argv[2:]]))
    job.load()
    lines = (clasp_mini.DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return job, [job.encode([dict(role="user", content=json.loads(line)["turns"][0])])
                 for line in lines]


def run(job: clasp_mini.Job, ids: list[int], s: Settings, choose=choose_skip) -> dict:
    return figures(list(generate(job.model, ids, s, Chance(0), choose)))


def settings() -> None:
    """One setting at a time is varied around the best so far."""
    job, prompts = setup()
    prompts = prompts[::5]
    grid = dict(M=[16, 18, 20, 22, 24], exit_threshold=[0.1, 0.2, 0.3, 0.4, 0.5],
                K=[4, 8, 12, 16], interval=[8, 16, 32, 64, 128])

    def rate(s: Settings) -> float:
        """Tokens/s with s over tokens/s of plain decoding."""
        plain, clasp = zip(*((run(job, ids, replace(s, K=0, M=0)), run(job, ids, s))
                             for ids in prompts))
        rate = [sum(f["emitted"] - 1 for f in side) / sum(f["decode_seconds"] for f in side)
                for side in (plain, clasp)]
        return rate[1] / rate[0]

    for temperature in (0.0, 1.0):
        best = replace(job.settings, temperature=temperature)
        for name, values in grid.items():
            rates = {v: rate(replace(best, **{name: v})) for v in values}
            best = replace(best, **{name: max(rates, key=rates.get)})
            print(f"temperature {temperature}  {name:15}"
                  + "  ".join(f"{v}: {r:.2f}" for v, r in rates.items()), flush=True)
        print(f"best at temperature {temperature}: M={best.M} K={best.K} "
              f"exit={best.exit_threshold} interval={best.interval}\n", flush=True)


def sets() -> None:
    """Accepted over drafted tokens with half of the layers left out: chosen, and at random."""
    job, prompts = setup()
    prompts, L = prompts[::2], job.model.cfg.L
    for temperature in (0.0, 1.0):
        s = replace(job.settings, temperature=temperature, M=L // 2)

        def acceptance(choose) -> tuple[float, float]:
            all_ = [run(job, ids, s, choose) for ids in prompts]          # noqa: B023
            total = {k: sum(f[k] for f in all_) for k in ("accepted", "drafted", "verifies")}
            decoded = sum(f["emitted"] - 1 for f in all_)
            return total["accepted"] / total["drafted"], decoded / total["verifies"]

        def at_random(seed: int):
            chosen = random.Random(seed).sample(range(L), L // 2)
            return lambda *_: SimpleNamespace(skip=lambda: tuple(i in chosen for i in range(L)))

        ours = acceptance(choose_skip)
        others = sorted(acceptance(at_random(seed)) for seed in range(20))
        mean = [sum(o[i] for o in others) / 20 for i in range(2)]
        print(f"temperature {temperature}, {L // 2} of {L} layers left out, K={s.K}, exit "
              f"threshold {s.exit_threshold}, interval {s.interval}")
        print(f"  dynamic program   acceptance {ours[0]:.3f}, {ours[1]:.2f} tokens per verify")
        print(f"  20 random sets    acceptance {mean[0]:.3f} on average, {others[0][0]:.3f} to "
              f"{others[-1][0]:.3f}; {mean[1]:.2f} tokens per verify\n", flush=True)


if __name__ == "__main__":
    dict(settings=settings, sets=sets)[sys.argv[1]]()
