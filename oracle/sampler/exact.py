"""The exact law of a sampler in Python with torch: its own code, down every branch of chance.

    python oracle/sampler/exact.py mine.py:run [--case CASE]

`run(case)` returns one text for an object of cases.json (oracle/README.md). Nothing is sampled: a
number of torch.rand, exponential_ or random.random is hidden until it is compared or raced; then
each outcome is followed, as likely as it is. So are multinomial's and bernoulli's. What else is
done with a hidden number is refused in one line. Seeds do nothing, so a wrong one is not seen.
"""
import random
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from oracle.sampler.check import Parser  # noqa: E402
from oracle.sampler.law import CASES, Branch, Law, every, law, target  # noqa: E402
from oracle.sampler.wrong import WRONG  # noqa: E402

SOURCES = {"rand": "uniform", "rand_like": "uniform", "uniform": "uniform", "exponential": "wait"}
SHAPES = ("getitem", "view", "reshape", "squeeze", "unsqueeze", "expand", "flatten", "to", "float",
          "double", "clone", "contiguous", "detach", "transpose", "gather")


class Refused(Exception):
    """What is done with a random number cannot be followed; in one line."""


@dataclass(frozen=True)
class Hidden:
    """Random numbers by their ids: a "uniform" w u + shift, or of an exponential E a "wait" E / w
    or a "rate" w / E. The shortest wait, or largest rate, is x's with probability w[x] / sum(w)."""
    kind: str
    ids: Tensor
    w: Tensor
    shift: Tensor

    def shaped(self, func: Callable, *args: Any, **kwargs: Any) -> "Hidden":
        ids, w, shift = (func(t, *args, **kwargs) for t in (self.ids, self.w, self.shift))
        return replace(self, ids=ids.long(), w=w.double(), shift=shift.double())

    def after(self, name: str, c: Any, behind: bool) -> "Hidden | None":
        """What it is after arithmetic with a known number c, which stands before it or behind."""
        if name == "div" and not behind:               # c / E is a rate, c / (w / E) a wait
            kind = {"wait": "rate", "rate": "wait"}.get(self.kind)
            return kind and replace(self, kind=kind).after("mul", c, True)
        if name == "rsub" or name == "sub" and not behind:
            minus = self.after("mul", -1, True)
            return minus and minus.after("add", c, True)
        if name in ("mul", "div"):
            if (name == "div") != (self.kind == "wait"):
                return replace(self, w=self.w / c, shift=self.shift / c)
            return replace(self, w=self.w * c, shift=self.shift * c)
        if name in ("add", "sub") and self.kind == "uniform":
            return replace(self, shift=self.shift + (c if name == "add" else -c))
        return None


class Answering(TorchFunctionMode):
    """While it lasts, all that torch is asked comes by here."""

    def __init__(self, chance: Branch) -> None:
        super().__init__()
        self.chance = chance
        self.within: list[tuple[float, float]] = []         # of each id: where its uniform lies
        self.over: set[int] = set()                         # ids whose race is run

    def hide(self, kind: str, out: Tensor) -> Tensor:
        first = len(self.within)
        self.within += [(0.0, 1.0)] * out.numel()
        ids = torch.arange(first, len(self.within)).view(out.shape)
        out.hidden = Hidden(kind, ids, torch.ones(out.shape).double(), 0.0 * ids.double())
        return out

    def below(self, x: Hidden, c: Any) -> Tensor:
        """Is a uniform below c? It is remembered for the next time that it is compared."""
        edges = (torch.as_tensor(c, dtype=torch.float64) - x.shift) / x.w
        ids, w, edges = torch.broadcast_tensors(x.ids, x.w, edges)
        out = []
        numbers = (t.flatten().tolist() for t in (ids, edges, w > 0))
        for n, edge, rising in zip(*numbers):
            low, high = self.within[n]
            edge = min(max(edge, low), high)
            is_below = self.chance.draw([high - edge, edge - low]) == 1
            self.within[n] = (low, edge) if is_below else (edge, high)
            out.append(is_below == rising)
        return torch.tensor(out).view(ids.shape)

    def multinomial(self, rows: Tensor, num_samples: int = 1, replacement: bool = False,
                    generator: Any = None) -> Tensor:
        """(..., V) weights -> (..., num_samples) tokens."""
        out = []
        for row in rows.reshape(-1, rows.shape[-1]).tolist():
            for _ in range(num_samples):
                out.append(self.chance.draw(row))
                if not replacement:
                    row[out[-1]] = 0.0
        return torch.tensor(out).view(*rows.shape[:-1], num_samples)

    def raced(self, x: Hidden, dim: int = -1, keepdim: bool = False) -> Tensor:
        used = set(x.ids.flatten().tolist())
        if used & self.over:
            raise Refused("the same exponentials race twice: these draws depend on one another")
        self.over |= used
        token = self.multinomial(x.w.movedim(dim, -1))[..., 0]
        return token.unsqueeze(dim) if keepdim else token

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_").replace("true_divide", "div")
        if name in SOURCES:
            return self.hide(SOURCES[name], func(*args, **kwargs))
        if name == "multinomial":
            return self.multinomial(*args, **kwargs)
        if name == "bernoulli":
            like = torch.empty_like(args[0])
            return self.below(self.hide("uniform", like).hidden, args[0]).to(like)
        hidden = [getattr(a, "hidden", None) for a in args[:2]]
        if not any(hidden):
            return func(*args, **kwargs)
        first = hidden[0] is not None
        x = hidden[0] if first else hidden[1]
        c = args[1] if first and len(args) > 1 else args[0]
        after = None
        if name in ("lt", "le", "gt", "ge") and x.kind == "uniform":
            below = self.below(x, c)
            return below if (name[0] == "l") == first else ~below
        if name == {"wait": "argmin", "rate": "argmax"}.get(x.kind):
            return self.raced(x, *args[1:], **kwargs)
        if name in ("item", "clamp", "clamp_min"):
            return args[0]
        if name in SHAPES:
            after = x.shaped(func, *args[1:], **kwargs)
        elif name in ("add", "sub", "rsub", "mul", "div"):
            after = x.after(name, c, first)
        if after is None:
            out = func(*args, **kwargs)
            if isinstance(out, Tensor):
                raise Refused(f"{func.__name__} of random numbers ({x.kind}) cannot be followed")
            return out                                 # a shape, a type
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        out = args[0] if in_place else torch.full(after.ids.shape, torch.nan)
        out.hidden = after
        return out


def short(name: str) -> dict:
    """A case, of three tokens: the branches of a text are many."""
    return dict(CASES[name], N=min(CASES[name]["N"], 3), level=1, texts=1, seed=1)


def exact(run: Callable[[dict], list], case: dict) -> Law:
    """The law of the texts that `run` returns."""
    def once(chance: Branch) -> tuple[int, ...]:
        answering = Answering(chance)
        with answering, patch.object(random, "random", lambda: torch.rand(())):
            text = run(case)
        return tuple(int(x) for part in text for x in (part if isinstance(part, list) else [part]))
    texts = defaultdict(float)
    for likely, text in every(once):
        texts[text] += likely
    return texts


def distance(one: Law, other: Law) -> float:
    """Total variation: half the sum of all differences."""
    return sum(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in one.keys() | other) / 2


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(description="The exact law of a sampler in Python with torch.")
    p.add_argument("program", metavar="FILE.py:FUNCTION")
    p.add_argument("--case", choices=list(CASES), action="append", help="this one alone")
    a = p.parse_args(argv)
    file, _, name = a.program.rpartition(":")
    if not Path(file).is_file():
        p.error(f"{a.program}: no FILE.py:FUNCTION")
    sys.path.insert(0, str(Path(file).resolve().parent))
    run = runpy.run_path(file).get(name)
    if not callable(run):
        p.error(f"{file} has no function {name}")
    wrong = 0
    for case in a.case or [name for name, case in CASES.items() if len(case["prompts"]) == 1]:
        try:
            mine = exact(run, short(case))
        except Refused as e:
            print(f"exact.py: {case}: {e}", file=sys.stderr)
            return 2
        off = distance(mine, target(short(case)))
        said = "exact"
        if off > 1e-6:
            wrong = 1
            laws = {fault: law(sampler, short(case))[0] for fault, sampler in WRONG.items()}
            near = min(laws, key=lambda fault: distance(mine, laws[fault]))
            said = f"WRONG; {distance(mine, laws[near]):.1e} from {near}"
        print(f"{case:16} total variation {off:.1e} from the right law, {len(mine)} texts: {said}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
