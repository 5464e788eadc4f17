"""How the demo's defaults were chosen, and what choosing layers is worth on it.

    python demo/sweep.py settings        # speed-up by M, K, exit threshold and interval
    python demo/sweep.py sets            # acceptance: the dynamic program against other choices

Both decode 128 tokens from prompts of demo/prompts.jsonl, greedily and at temperature 1: `sets`
from every second, `settings` from one of each category, each time plainly and with CLaSp in turn,
and the ratio of the rates is what is printed.
"""
import collections
import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clasp_mini  # noqa: E402
from clasp_mini import choose_skip, figures  # noqa: E402
from demo.train import DISTIL_OFTEN, often_dropped  # noqa: E402
from speculative import Chance, Settings, generate  # noqa: E402


def setup() -> tuple[clasp_mini.Job, list[list[int]]]:
    job = clasp_mini.Job(clasp_mini.parser().parse_args(["--prompt", "-", *sys.argv[2:]]))
    job.load()
    lines = (clasp_mini.DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return job, [job.encode([dict(role="user", content=json.loads(line)["turns"][0])])
                 for line in lines]


def run(job: clasp_mini.Job, ids: list[int], s: Settings, choose=choose_skip) -> dict:
    return figures(list(generate(job.plain, ids, s, Chance(0), choose)))


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
    """Accepted over drafted tokens by who chose the layers: with the demo's number of them left
    out, and with half of them, where there is more to choose."""
    job, prompts = setup()
    prompts, L = prompts[::2], job.cfg.L
    often = [i for i, dropped in enumerate(often_dropped(DISTIL_OFTEN)) if dropped]

    def report(name: str, s: Settings, choosers) -> None:
        rates, per_verify = [], []
        for choose in choosers:
            all_ = [run(job, ids, s, choose) for ids in prompts]
            total = {k: sum(f[k] for f in all_) for k in ("accepted", "drafted", "verifies")}
            rates.append(total["accepted"] / total["drafted"])
            per_verify.append(sum(f["emitted"] - 1 for f in all_) / total["verifies"])
        n = len(rates)
        span = f" on average, {min(rates):.3f} to {max(rates):.3f}" if n > 1 else ""
        print(f"  {name:58} {sum(rates) / n:.3f}{span}; {sum(per_verify) / n:.2f}", flush=True)

    def fixed(skip: tuple[bool, ...]):
        return lambda *_: SimpleNamespace(skip=lambda: skip)

    def at_random(seed: int, among):
        out = random.Random(seed).sample(among, L // 2)
        return fixed(tuple(i in out for i in range(L)))

    for temperature, M in itertools.product((0.0, 1.0), (job.settings.M, L // 2)):
        s, chosen = replace(job.settings, temperature=temperature, M=M), collections.Counter()

        def noted(*how):
            choice = choose_skip(*how)
            chosen[choice.skip()] += 1                                    # noqa: B023
            return choice

        print(f"temperature {temperature}, {M} of {L} layers left out, K={s.K}, exit threshold "
              f"{s.exit_threshold}, interval {s.interval}: acceptance; tokens per verify")
        report("the dynamic program", s, [noted])
        report("the set it chose most often, for every text", s,
               [fixed(chosen.most_common(1)[0][0])])
        if M == L // 2:
            report(f"20 random sets of the {len(often)} layers often dropped in training", s,
                   [at_random(seed, often) for seed in range(20)])
            report(f"20 random sets of all {L} layers", s,
                   [at_random(seed, range(L)) for seed in range(20)])
        print(flush=True)


if __name__ == "__main__":
    what = dict(settings=settings, sets=sets).get("".join(sys.argv[1:2]))
    what() if what else sys.exit(__doc__)
