"""Who should choose the layers that a draft leaves out? The dynamic program, by one token or by
several; a search, one set for all texts; chance; for the demo also its training.

    python bench/choosers.py                                        # the demo, 22 of its 32 layers
    python bench/choosers.py FILE --model DIR --skip-layers 8

The full model continues each prompt greedily and at temperature 1. At every token of its texts a
draft is begun with each set: how likely is its first token kept? sum(min(p, q)), greedily 1 or 0.
The dynamic program chooses anew every 16 tokens, by those before. Every third prompt is kept back
for the one set: there the layer whose loss costs least is left out, then the next, and so on.
"""
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.spec_bench import first_turns, opened  # noqa: E402
from command.cli import UsageError, answered, told  # noqa: E402
from command.flags import DEMO  # noqa: E402
from command.job import Job  # noqa: E402
from command.report import ids_of  # noqa: E402
from demo.train import KINDS, planted  # noqa: E402
from dp_layer_skip import choose_skip, torch  # noqa: E402
from llama import Cache, Llama  # noqa: E402
from policy.adaptive import overlap  # noqa: E402
from policy.probe import candidates, choose_by  # noqa: E402
from speculative import Chance, Settings, generate, probabilities, read  # noqa: E402
from torch import Tensor  # noqa: E402

PROBES = (1, 4, 16, 64)                                # tokens that choose
EVERY = 16                                             # tokens from one choice to the next
RANDOM = 8                                             # sets drawn
Skip = Sequence[bool]
Sets = dict[str, list[Skip]]                           # who -> what they chose
Found = dict[tuple[str, str], dict[float, list[float]]]    # who, kind -> temperature -> values


class Piece(NamedTuple):
    """n tokens of a text, which the cache holds up to the last of them."""
    ids: Tensor                 # (n,)
    at: int                     # the position of the first
    p: Tensor                   # (n, V) what the full model says follows each
    cache: Cache
    chosen: Sets                # by the dynamic program, by the tokens before


def flags(L: int, out: Sequence[int]) -> Skip:
    return [i in out for i in range(L)]


def written(job: Job, ids: list[int], s: Settings) -> tuple[list[int], int]:
    """A prompt and what the full model makes of it, and where that begins."""
    rounds = generate(job.model, ids, s, Chance(job.flags.seed), choose_skip)
    return ids + ids_of(rounds), len(ids)


def pieces(model: Llama, text: list[int], start: int, n: int, M: int, s: Settings,
           probes: Sequence[int] = ()) -> Iterator[Piece]:
    """A text from `start` on, as the full model reads it, n tokens at a time; before each so many
    tokens choose. Use it before the next is read: what is tried takes the slots after it."""
    cache = model.cache(len(text) + max(n, (M + 1) * max(PROBES)) + 1)
    h = read(model, text[:start], 0, cache)
    for at in range(start, len(text), n):
        last = torch.stack([x[-1] for x in h])                              # (L+1, D)
        chosen = {}
        for r in probes:
            choice, _ = choose_by(r, choose_skip, model, cache, text[:at], last, M)
            chosen[f"the dynamic program, by {r}"] = [choice.skip()]
        ids = torch.tensor(text[at:at + n], device=model.device)
        h = model.forward(ids, cache.sequence(at, len(ids)), cache)
        yield Piece(ids, at, probabilities(model.head(h[-1]), s), cache, chosen)


def kept(model: Llama, piece: Piece, skip: Skip, s: Settings) -> list[float]:
    """At each of these tokens, the chance that what is drafted after it is kept. Each begins a
    draft of its own: it reads the full model's entries of the tokens before, and its own of this
    one, as the one candidate for its state would."""
    n = len(piece.ids)
    rows = candidates(piece.cache, piece.at + n - 1, 1, n)
    h = model.forward(piece.ids, rows, piece.cache, skip)
    return overlap(piece.p, probabilities(model.head(h[-1]), s)).tolist()


def one_set(job: Job, texts: Sequence[tuple[list[int], int]], s: Settings) -> list[int]:
    """M layers in the order in which they are left out."""
    model = job.model
    whole = [piece for text, start in texts
             for piece in pieces(model, text, start, len(text), job.M, s)]
    out = []
    for _ in told(range(job.M), "one set for all texts: layer"):
        score = {}
        for i in range(job.cfg.L):
            if i not in out:
                skip = flags(job.cfg.L, [*out, i])
                score[i] = sum(sum(kept(model, piece, skip, s)) for piece in whole)
        out.append(max(score, key=score.get))
    return out


def walk(model: Llama, text: list[int], start: int, M: int, s: Settings, sets: Sets
         ) -> Iterator[tuple[str, list[float]]]:
    """(who, the values of a piece), for every piece from `start` on and every set."""
    for piece in pieces(model, text, start, EVERY, M, s, PROBES):
        for who, of in (piece.chosen | sets).items():
            for skip in of:
                yield who, kept(model, piece, skip, s)


def kind_of(category: str) -> str:
    """What the demo's categories are: code, prose, or mixed."""
    return "mixed" if category == "mixed" else "prose" if "prose" in category else "code"


def trained(job: Job, kind: str) -> Sets:
    """The demo: what its training let go on this kind of text."""
    if job.folder.resolve() != DEMO or kind not in KINDS or job.M != sum(planted(kind)):
        return {}
    return {"its training": [planted(kind)]}


@torch.inference_mode()
def measured(job: Job, questions: Sequence[tuple[str, list[int]]]) -> Found:
    """What every chooser's sets are worth on the texts after (category, prompt)."""
    L = job.cfg.L
    settings = [replace(job.plain, temperature=temperature) for temperature in (0.0, 1.0)]
    apart = [written(job, ids, settings[1])
             for _, ids in told(questions[2::3], "one set for all texts: prompt")]
    order = one_set(job, apart, settings[1])
    print(f"one set, in this order: {', '.join(map(str, order))}", file=sys.stderr, flush=True)
    drawn = [flags(L, random.Random(n).sample(range(L), job.M)) for n in range(RANDOM)]
    sets = {"one set for all texts": [flags(L, order)], f"{RANDOM} random sets": drawn}
    others = [question for n, question in enumerate(questions) if n % 3 != 2]
    found = defaultdict(lambda: defaultdict(list))
    for category, ids in told(others, "prompt"):
        kind = kind_of(category)
        for s in settings:
            text, start = written(job, ids, s)
            for who, values in walk(job.model, text, start, job.M, s, sets | trained(job, kind)):
                found[who, kind][s.temperature] += values
    return found


def table(found: Found) -> str:
    """A row per chooser, a column per kind of text: the means, greedily / at temperature 1."""
    kinds = list(dict.fromkeys(kind for _, kind in found))
    lines = ["first drafted token kept  " + "".join(f"{kind:>16}" for kind in kinds)]
    for who in dict.fromkeys(who for who, _ in found):
        cells = ""
        for kind in kinds:
            of = sorted(found.get((who, kind), {}).items())     # temperatures, values
            cell = " / ".join(f"{statistics.mean(values):.3f}" for _, values in of) or "-"
            cells += f"{cell:>16}"
        lines.append(f"{who:<26}{cells}")
    return "\n".join(lines)


@answered
def main(argv: Sequence[str] | None = None) -> int:
    # Recorded passes are of one setting alone.
    job, questions = opened(__doc__.partition("?")[0] + "?", argv, eager=True)
    questions = first_turns(job, questions)
    if len(questions) < 3 or job.M == 0:
        raise UsageError("needed are three questions, of which one is for the one set, and a "
                         "layer to leave out")
    found = measured(job.load(), questions)
    print(f"{job.M} of {job.cfg.L} layers left out\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
