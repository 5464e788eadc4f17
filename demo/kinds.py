"""Who should choose the layers of the demo? Of its prompts of code and of prose: accepted / drafted
tokens and tokens per verify, by the dynamic program, by one set for both kinds that a search over
the model's own texts found best, by the sets that training gave to the kinds, and by chance.

    python demo/kinds.py                         # 22 layers left out, K = 6, temperature 1
    python demo/kinds.py --skip-layers 20 --interval 8

Takes the main command's flags. A random set is drawn of the layers that training let go at
all, which are neither the first two nor the last two.
"""
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[0] = str(DEMO.parent)
import clasp_mini  # noqa: E402
import torch  # noqa: E402
from bench.figures import kind_of  # noqa: E402
from bench.probe import flags  # noqa: E402
from bench.spec_bench import first_turns, line, read_questions  # noqa: E402
from bench.sweep import always  # noqa: E402
from demo import train  # noqa: E402
from speculative import Chance, Settings, generate, overlap  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.report import figures, ids_of  # noqa: E402

Skip = tuple[bool, ...]
INNER = range(2, train.L - 2)
EACH, RANDOM = 25, 20                                  # prompts of a kind; sets drawn
STALE = 80                                             # exchanges in a row without a gain end it


def kept(job: clasp_mini.Job, prompts: Sequence[list[int]], s: Settings, choose: Callable
         ) -> tuple[float, float]:
    """Acceptance and tokens per verify."""
    every = [figures([*generate(job.model, ids, s, Chance(n), choose)])
             for n, ids in enumerate(prompts)]
    of = line([*zip(every, every)])                    # counts only: nothing to compare with
    return of["acceptance"] or 0.0, of["tokens_per_verify"]


@torch.inference_mode()
def best_for_both(job: clasp_mini.Job, prompts: dict[str, list[list[int]]], M: int) -> Skip:
    """The set of M layers with the largest overlap of p and q, teacher-forced, on what the model
    itself writes at temperature 1 after these prompts, on the mean of the kinds: from several
    beginnings, one layer is exchanged for another as long as that gains."""
    model, plain, T = train.Model(), Settings(temperature=1.0, N=128), 128
    model.begin_from(job.folder)
    whole = {}
    for kind, of in prompts.items():
        texts = [[*ids, *ids_of([*generate(job.model, ids, plain, Chance(100 + n))])][-T:]
                 for n, ids in enumerate(of)]
        ids = torch.tensor([text for text in texts if len(text) == T])
        xs, kv = model.states(ids)
        whole[kind] = ids, model.logits(xs[-1]).softmax(-1), kv

    def score(out: set[int]) -> float:
        skip = flags(train.L, out)
        return sum(overlap(p, model.logits(model.states(ids, skip, kv)[0][-1]).softmax(-1))
                   .mean().item() for ids, p, kv in whole.values()) / len(whole)

    rng, found = random.Random(1), []
    for start in (*(train.planted(kind) for kind in train.KINDS), None, None):
        out = [i for i in range(train.L) if (start[i] if start else i in train.BOTH)]
        rng.shuffle(out)
        out = set(out[:M])
        out |= set(rng.sample([i for i in INNER if i not in out], M - len(out)))
        best, stale = score(out), 0
        while stale < STALE:
            other = out - {rng.choice(sorted(out))} | {rng.choice([*set(INNER) - out])}
            stale += 1
            if (now := score(other)) > best:
                out, best, stale = other, now, 0
        found.append((best, sorted(out)))
    return flags(train.L, max(found)[1])


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        p = clasp_mini.parser()
        p.usage, p.description = "python demo/%(prog)s [flags]", __doc__.partition("\n\n")[0]
        p.set_defaults(skip_layers=22, draft_length=6, draft_exit_threshold=0.0, interval=16,
                       temperature=1.0, max_new_tokens=100)
        job = clasp_mini.Job(p.parse_args(argv)).load()
        if not 0 < job.settings.M < len(INNER):
            raise UsageError(f"--skip-layers: 1 to {len(INNER) - 1} may go")
        questions, s = read_questions(DEMO / "prompts.jsonl"), job.settings
        prompts = {kind: first_turns(job, [q for q in questions if kind_of(q[0]) == kind])[:EACH]
                   for kind in train.KINDS}
        print(f"M = {s.M}, K = {s.K}, exit threshold {s.exit_threshold}, interval {s.interval}, "
              f"temperature {s.temperature}, {[len(of) for of in prompts.values()]} prompts\n")

        def row(name: str, choose: dict[str, list[Callable]], s: Settings = s) -> None:
            cells = {}
            for kind, of in prompts.items():
                each = [kept(job, of, s, who) for who in choose[kind]]
                cells[kind] = [sum(x) / len(x) for x in zip(*each)]
            print(f"{name:49}" + "   ".join(f"{kind} {a:.3f}; {n:.2f}"
                                            for kind, (a, n) in cells.items())
                  + f"   mean {sum(a for a, _ in cells.values()) / len(cells):.3f}", flush=True)

        for r in (1, 4):
            row(f"the dynamic program, probe of {r} token{'s' * (r > 1)}",
                dict.fromkeys(prompts, [job.choose]), replace(s, r=r))
        both = best_for_both(job, {kind: of[:12] for kind, of in prompts.items()}, s.M)
        row("the best one set for both that a search found",
            dict.fromkeys(prompts, [always(both)]))
        code, prose = ([always(tuple(train.planted(kind)))] for kind in train.KINDS)
        if s.M == sum(train.planted("code")):
            row("the set that training gave the kind", dict(code=code, prose=prose))
            row("the set of the other kind", dict(code=prose, prose=code))
        drawn = [flags(train.L, random.Random(n).sample(INNER, s.M)) for n in range(RANDOM)]
        row(f"{RANDOM} random sets, mean", dict.fromkeys(prompts, [*map(always, drawn)]))
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
