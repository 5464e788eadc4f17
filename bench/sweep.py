"""What the paper's knobs are worth on a model, and what choosing layers in context is.

    python bench/sweep.py settings       # speed-up by M, K, exit threshold and interval; the policy
    python bench/sweep.py sets           # acceptance: the dynamic program against other choices
    python bench/sweep.py host           # what the policy's own decisions take of the time

All decode prompts of a file in Spec-Bench's format (the demo's, else --questions), greedily and at
temperature 1, with the main command's flags for the rest. `settings` tries one prompt in five,
plainly and with CLaSp in turn; then the policy and the best fixed setting take turns on all of
them. The others decode every second prompt.
"""
import collections
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import clasp_mini  # noqa: E402
from bench.spec_bench import first_turns, job_for, line, read_questions  # noqa: E402
from speculative import Adaptive, Chance, Round, Settings, generate  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.report import figures  # noqa: E402

GRID = dict(M=(1 / 2, 5 / 8, 11 / 16, 3 / 4), exit_threshold=(0.1, 0.2, 0.3, 0.4, 0.5),
            K=(4, 8, 12, 16), interval=(8, 16, 32, 64, 128))                # M in parts of L
RANDOM = 20                                            # sets drawn


def fixed(job: clasp_mini.Job, **named: Any) -> Settings:
    """The paper's four knobs where the command names none: what a sweep starts from."""
    start = dict(K=12, M=job.cfg.L // 2, exit_threshold=0.3, interval=64)
    left = {name: v for name, v in start.items() if getattr(job.settings, name) is None}
    return replace(job.settings, **left | named)


def settings(job: clasp_mini.Job, prompts: list[list[int]]) -> None:
    """One setting at a time is varied around the best so far."""
    def rounds(ids: list[int], s: Settings) -> Iterable[Round]:
        return generate(job.model, ids, s, Chance(job.a.seed), job.choose)

    def speedup(s: Settings) -> float:
        return line([(figures([*rounds(ids, replace(s, K=0, M=0))]), figures([*rounds(ids, s)]))
                     for ids in prompts[::5]])["speedup"]

    grid = GRID | dict(M=sorted({round(part * job.cfg.L) for part in GRID["M"]}))
    for temperature in (0.0, 1.0):
        best = fixed(job, temperature=temperature)
        for name, values in grid.items():
            found = {v: speedup(replace(best, **{name: v})) for v in values}
            best = replace(best, **{name: max(found, key=found.get)})
            print(f"temperature {temperature}  {name:15}"
                  + "  ".join(f"{v}: {x:.2f}" for v, x in found.items()), flush=True)
        print(f"best at temperature {temperature}: M={best.M} K={best.K} "
              f"exit={best.exit_threshold} interval={best.interval}", flush=True)
        policy = replace(job.settings, temperature=temperature)
        ratio = line([(figures([*rounds(ids, best)]),
                       figures([*job.run(ids, policy, job.a.seed)])) for ids in prompts])["speedup"]
        print(f"the policy's rate over that one's, {len(prompts)} prompts: {ratio:.3f}\n",
              flush=True)


def always(skip: Sequence[bool]) -> Callable[..., Any]:
    """A chooser that has one set, whatever the states are."""
    return lambda *_: SimpleNamespace(skip=lambda j: skip, states=None)


def sets(job: clasp_mini.Job, prompts: list[list[int]]) -> None:
    """Accepted / drafted tokens by who chose the layers, as many of them as the policy may
    leave out (or --skip-layers says) and half."""
    L = job.cfg.L

    def report(name: str, s: Settings, choosers: Sequence[Callable[..., Any]]) -> None:
        each = []
        for choose in choosers:                        # counts only: nothing to compare with
            runs = [figures(list(generate(job.model, ids, s, Chance(job.a.seed), choose)))
                    for ids in prompts[::2]]
            each.append(line(list(zip(runs, runs))))
        kept = [of["acceptance"] or 0.0 for of in each]
        per_verify = sum(of["tokens_per_verify"] for of in each) / len(each)
        span = f" on average, {min(kept):.3f} to {max(kept):.3f}" if len(kept) > 1 else ""
        print(f"  {name:48} {sum(kept) / len(kept):.3f}{span}; {per_verify:.2f}", flush=True)

    for temperature, M in itertools.product((0.0, 1.0), sorted({job.M, L // 2})):
        s, chosen = fixed(job, temperature=temperature, M=M), collections.Counter()

        def noted(*how: Any, chosen: collections.Counter = chosen) -> Any:
            choice = job.choose(*how)
            chosen[choice.skip()] += 1
            return choice

        print(f"temperature {temperature}, {M} of {L} layers left out, K={s.K}, exit threshold "
              f"{s.exit_threshold}, interval {s.interval}: acceptance; tokens per verify")
        for r in (1, 4):
            report(f"the dynamic program, {r} token(s)", replace(s, r=r), [noted])
        report("the set it chose most often, for every text", s,
               [always(chosen.most_common(1)[0][0])])
        drawn = [random.Random(seed).sample(range(L), M) for seed in range(RANDOM)]
        report(f"{RANDOM} random sets, each for every text", s,
               [always(tuple(i in out for i in range(L))) for out in drawn])
        print(flush=True)


def host(job: clasp_mini.Job, prompts: list[list[int]]) -> None:
    """The seconds within the policy's methods / those of the whole run."""
    spent = collections.Counter()

    def timed(name: str) -> Callable[..., Any]:
        def call(*how: Any) -> Any:
            began = time.perf_counter()
            try:
                return getattr(Adaptive, name)(*how)
            finally:
                spent[name] += time.perf_counter() - began
        return call

    # `watches` is part of `due` and, alone, of every verify: a comparison.
    methods = {name: timed(name) for name in ("plan", "goes_on", "judged", "due", "probed")}
    for temperature in (0.0, 1.0):
        spent.clear()
        s = replace(job.settings, temperature=temperature)
        began, rounds = time.perf_counter(), 0
        for ids in prompts[::2]:
            policy = type("Timed", (Adaptive,), methods)(s, **job.costs)
            rounds += len([*generate(job.model, ids, s, Chance(job.a.seed), job.choose, policy)])
        whole = time.perf_counter() - began
        print(f"temperature {temperature}: {sum(spent.values()) / whole:.2%} of {whole:.1f} s, "
              f"{1e6 * sum(spent.values()) / rounds:.0f} us a round: "
              + ", ".join(f"{name} {spent[name] / whole:.2%}" for name in methods), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status as that of clasp_mini.py."""
    def work() -> int:
        p = clasp_mini.parser()
        p.usage = "python bench/%(prog)s settings|sets|host [flags]"
        p.description = __doc__.partition("\n")[0]
        p.add_argument("what", choices=["settings", "sets", "host"],
                       metavar="settings|sets|host", help="the speed-up by settings, the "
                       "acceptance by sets of layers, or the policy's share of the time")
        p.add_argument("--questions", default=clasp_mini.DEMO / "prompts.jsonl", metavar="FILE",
                       help="in Spec-Bench's format, or token ids (the demo's)")
        a = p.parse_args(argv)
        a.eager = True                                 # recorded passes are for one setting alone
        questions = read_questions(a.questions)
        job = job_for(a, questions)
        prompts = first_turns(job, questions)
        if a.what == "host" and not job.adaptive:
            raise UsageError("host measures the policy, which decides nothing here: leave out one "
                             "of the flags that fix the draft")
        dict(settings=settings, sets=sets, host=host)[a.what](job.load(), prompts)
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
