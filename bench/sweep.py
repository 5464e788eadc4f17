"""What the paper's four numbers are worth on a model, and whether the policy finds better ones.

    python bench/sweep.py [--model DIR --questions FILE]        # the demo and its prompts

One number at a time is varied around the best so far, on one prompt in five, greedily and at
temperature 1; then the policy and the best fixed numbers write behind all prompts. Nothing is
timed: passes are counted and weighed by the model's table of costs (its clasp.json, or --costs;
else measured first), so load changes nothing. Speed is decoded tokens per plain step.
"""
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.passes import measured, tables  # noqa: E402
from bench.questions import opened, parser  # noqa: E402
from clasp_mini import policy_of  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.job import Job  # noqa: E402
from policy import costs  # noqa: E402
from speculative import Chance, Paper, Settings, generate  # noqa: E402

GRID = dict(M=(3 / 8, 1 / 2, 5 / 8, 11 / 16, 3 / 4),                        # in parts of L
            exit_threshold=(0.0, 0.1, 0.2, 0.3, 0.4, 0.6), K=(4, 8, 12, 16),
            interval=(8, 16, 32, 64, 128))
Prompts = Sequence[list[int]]


def speed(job: Job, prompts: Prompts, s: Settings, policy: Callable[[], Any]) -> float:
    """Behind all prompts, with a new policy for each. The prefill's pass and token do not count,
    its choice of layers does."""
    if job.costs_guessed:
        job.costs = tables(measured(job), job.cfg.L, job.K)
        job.costs_guessed = False
    table = costs.load(job.costs, job.cfg.L, max(*GRID["K"], job.K))
    tokens = 0
    steps = 0.0
    for ids in prompts:
        rounds = generate(job.model, ids, s, Chance(job.a.seed), job.choose, policy())
        for n, r in enumerate(rounds):
            if n > 0:
                k = len(r.drafted)
                tokens += len(r.emitted)
                steps += k * table["draft"][sum(r.skip)] + table["verify"][k + 1]
            if r.choice:
                steps += table["optimise"]
    return tokens / steps


def sweep(job: Job, prompts: Prompts, temperature: float
          ) -> tuple[dict[str, dict[float, float]], Settings]:
    """name -> value -> speed for each of the four numbers, and the best of them. Begins with what
    the command names and, for what it leaves open, with numbers of ours."""
    L = job.cfg.L
    own = dict(K=12, M=round(L * 11 / 16), exit_threshold=0.3, interval=32)
    named = {name: own[name] if value is None else value for name, value in job.numbers.items()}
    best = replace(job.plain, temperature=temperature, **named)
    found = {}
    for name, values in (GRID | dict(M=[round(part * L) for part in GRID["M"]])).items():
        found[name] = {}
        for value in values:
            s = replace(best, **{name: value})
            found[name][value] = speed(job, prompts, s, lambda s=s: Paper(s, L))
        best = replace(best, **{name: max(found[name], key=found[name].get)})
    return found, best


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        job, questions = opened(parser("[flags]", __doc__.partition("\n")[0]), argv)
        if not job.left_open:
            raise UsageError("nothing is left to the policy: name fewer of its numbers")
        prompts = [ids for _, ids in questions]
        job.load()
        for temperature in (0.0, 1.0):
            found, s = sweep(job, prompts[::5], temperature)
            for name, of in found.items():
                cells = "  ".join(f"{value}: {x:.2f}" for value, x in of.items())
                print(f"temperature {temperature}  {name:15}{cells}", flush=True)
            fixed = speed(job, prompts, s, lambda s=s: Paper(s, job.cfg.L))
            ours = speed(job, prompts, replace(s, K=0, M=0), lambda: policy_of(job))
            print(f"best: M={s.M} K={s.K} exit={s.exit_threshold} interval={s.interval}; on all "
                  f"prompts {fixed:.3f}, the policy {ours:.3f}: {ours / fixed:.3f} of it\n")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
