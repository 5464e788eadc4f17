"""Who should choose the layers that a draft leaves out? The dynamic program, by one token or by
several; a search, one set for all texts; chance; for the demo also its training.

    python bench/choosers.py                                        # the demo, 22 of its 32 layers
    python bench/choosers.py --model DIR --questions FILE --skip-layers 8

The full model continues each prompt greedily and at temperature 1. At every token of its texts a
draft is begun with each set: how likely is its first token kept? sum(min(p, q)), greedily 1 or 0.
The dynamic program chooses anew every 16 tokens, by those behind it. Every third prompt is kept
back for the one set: there the layer whose loss costs least is left out, then the next, and so on.
"""
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from bench.questions import opened, parser  # noqa: E402
from command.cli import UsageError, answer  # noqa: E402
from command.flags import DEMO  # noqa: E402
from command.job import Job  # noqa: E402
from command.report import ids_of  # noqa: E402
from demo.train import KINDS, planted  # noqa: E402
from dp_layer_skip import Choice, choose_skip, cosine, torch  # noqa: E402
from llama import Llama, Rows  # noqa: E402
from policy.adaptive import overlap  # noqa: E402
from policy.probe import nearness  # noqa: E402
from speculative import Chance, Settings, generate, probabilities  # noqa: E402
from torch import Tensor  # noqa: E402

PROBES = (1, 4, 16, 64)                                # tokens that choose
EVERY = 16                                             # tokens from one choice to the next
RANDOM = 8                                             # sets drawn
Skip = Sequence[bool]
Sets = dict[str, list[Skip]]                           # who -> what they chose
Found = dict[tuple[str, str, float], list[float]]      # who, kind of text, temperature -> values


class Page:
    """A text that the model has read, once. Its keys and values stay as they are: what is tried at
    one of its tokens is written behind it, in `spare` slots."""

    def __init__(self, model: Llama, ids: Sequence[int], spare: int) -> None:
        self.model = model
        self.n = len(ids)
        self.ids = torch.tensor(ids, device=model.device)                   # (n,)
        self.cache = model.cache(self.n + spare)
        h = model.forward(self.ids, self.cache.sequence(0, self.n), self.cache)
        self.h = torch.stack(h)                                             # (L+1, n, D)

    def rows(self, first: int, end: int, J: int) -> Rows:
        """J candidates for the state of each token of first .. end-1, the tokens of one beside one
        another: as policy.probe.candidates, but behind the whole text."""
        position = self.cache.slot[first:end].repeat(J)
        assert self.n + len(position) <= self.cache.S, f"{len(position)} slots behind {self.n}"
        slot = self.cache.slot[:self.n + len(position)]
        slots = slot[self.n:]
        may_read = (slot < position[:, None]) | (slot == slots[:, None])    # (T, W)
        return self.cache.rows(position, slots, may_read)

    def run_layer(self, first: int, end: int, J: int) -> Callable[[int, Tensor], Tensor]:
        """f_i on up to J candidates of these tokens at once, (J, width) -> (J, width)."""
        rows = self.rows(first, end, J)

        def f(i: int, g: Tensor) -> Tensor:
            x = g.view(-1, self.h.shape[-1])
            return self.model.layer(i, x, rows.first(len(x)), self.cache).view(g.shape)
        return f

    def choose(self, t: int, M: int, r: int = 1) -> Choice:
        """The dynamic program by the r tokens up to t, as policy.probe.choose_by."""
        r = min(r, t + 1)
        h = self.h[:, t - r + 1:t + 1]                                      # (L+1, r, D)
        near = nearness(h[-1]) if r > 1 else cosine
        return choose_skip(h.flatten(1), self.run_layer(t - r + 1, t + 1, M + 1), M, near)

    def full(self, first: int, end: int) -> Tensor:
        """What the full model says follows these tokens: logits (end - first, V)."""
        return self.model.head(self.h[-1, first:end])

    def draft(self, skip: Skip, first: int, end: int) -> Tensor:
        """What a draft that begins at each of these tokens says: logits (end - first, V). It reads
        the full model's entries of the tokens before, and its own of this one."""
        h = self.model.forward(self.ids[first:end], self.rows(first, end, 1), self.cache, skip)
        return self.model.head(h[-1])


def flags(L: int, out: Sequence[int]) -> Skip:
    return [i in out for i in range(L)]


def written(job: Job, ids: list[int], s: Settings) -> tuple[Page, int]:
    """What the full model makes of a prompt, and where that begins."""
    rounds = generate(job.model, ids, s, Chance(job.a.seed), choose_skip)
    spare = max(EVERY, (job.M + 1) * max(PROBES), s.N)
    return Page(job.model, ids + ids_of(rounds), spare), len(ids)


def kept(page: Page, skip: Skip, first: int, end: int, s: Settings) -> list[float]:
    """At each of these tokens, the chance that what is drafted behind it is kept."""
    p = probabilities(page.full(first, end), s)
    q = probabilities(page.draft(skip, first, end), s)
    return overlap(p, q).tolist()


def one_set(texts: Sequence[tuple[Page, int]], M: int, s: Settings) -> list[int]:
    """M layers in the order in which they are left out."""
    L = texts[0][0].model.cfg.L
    out = []
    while len(out) < M:
        score = {}
        for i in range(L):
            if i not in out:
                skip = flags(L, [*out, i])
                score[i] = sum(sum(kept(page, skip, start, page.n, s)) for page, start in texts)
        out.append(max(score, key=score.get))
    return out


def walk(page: Page, start: int, M: int, s: Settings, sets: Sets) -> Iterator[tuple[str, float]]:
    """(who, one value) for every token from `start` on and every set."""
    for first in range(start, page.n, EVERY):
        end = min(first + EVERY, page.n)
        programs = {f"the dynamic program, by {r}": [page.choose(first - 1, M, r).skip()]
                    for r in PROBES}
        for who, of in (programs | sets).items():
            for skip in of:
                for value in kept(page, skip, first, end, s):
                    yield who, value


def kind_of(category: str) -> str:
    """What the demo's categories are: code, prose, or mixed."""
    return "mixed" if category == "mixed" else "prose" if "prose" in category else "code"


def trained(job: Job, kind: str) -> Sets:
    """The demo: what its training let go on this kind of text, and on the other."""
    if job.folder.resolve() != DEMO or kind not in KINDS or job.M != sum(planted(kind)):
        return {}
    other = KINDS[1 - KINDS.index(kind)]
    return {"training, for this kind": [planted(kind)], "training, for the other": [planted(other)]}


@torch.inference_mode()
def measured(job: Job, questions: Sequence[tuple[str, list[int]]]) -> Found:
    """What every chooser's sets are worth on the texts behind (category, prompt)."""
    L = job.cfg.L
    sampled = replace(job.plain, temperature=1.0)
    order = one_set([written(job, ids, sampled) for _, ids in questions[2::3]], job.M, sampled)
    print(f"one set, in this order: {', '.join(map(str, order))}", file=sys.stderr, flush=True)
    drawn = [flags(L, random.Random(n).sample(range(L), job.M)) for n in range(RANDOM)]
    sets = {"one set for all texts": [flags(L, order)], f"{RANDOM} random sets": drawn}
    found = defaultdict(list)
    for s in (replace(job.plain, temperature=0.0), sampled):
        for n, (category, ids) in enumerate(questions):
            if n % 3 != 2:
                kind = kind_of(category)
                page, start = written(job, ids, s)
                for who, value in walk(page, start, job.M, s, sets | trained(job, kind)):
                    found[who, kind, s.temperature].append(value)
    return found


def table(found: Found) -> str:
    """A row per chooser, a column per kind of text: the means, greedily / at temperature 1."""
    kinds = list(dict.fromkeys(kind for _, kind, _ in found))
    lines = ["first drafted token kept  " + "".join(f"{kind:>16}" for kind in kinds)]
    for who in dict.fromkeys(who for who, _, _ in found):
        cells = ""
        for kind in kinds:
            cell = "-"
            if (who, kind, 0.0) in found:
                means = [statistics.mean(found[who, kind, at]) for at in (0.0, 1.0)]
                cell = " / ".join(f"{mean:.3f}" for mean in means)
            cells += f"{cell:>16}"
        lines.append(f"{who:<26}{cells}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    def work() -> int:
        job, questions = opened(parser("[flags]", __doc__.partition("?")[0] + "?"), argv)
        if len(questions) < 3 or job.M == 0:
            raise UsageError("needed are three questions, of which one is for the one set, and a "
                             "layer to leave out")
        found = measured(job.load(), questions)
        print(f"{job.M} of {job.cfg.L} layers left out\n{table(found)}")
        return 0
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
