"""The exact law of a sampler in Python with torch: its own code, down every branch of chance.

    python oracle/sampler/exact.py mine.py:run

`run(case)` returns one text for an object of cases.json (oracle/README.md), but the batch. Nothing
is sampled: a number of torch.rand, exponential_ or random.random is hidden until it is compared or
raced; then each outcome is followed, as likely as it is. So are multinomial's. What else is done
with a hidden number is refused in one line; but float() of one, torch does not tell: it is NaN, and
.item() is followed. Seeds do nothing, so a wrong one is not seen.
"""
import random
import runpy
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from oracle.sampler.check import Refused  # noqa: E402
from oracle.sampler.law import ALONE, CASES, Branch, Law, every, law, target  # noqa: E402
from oracle.sampler.wrong import WRONG  # noqa: E402

SOURCES = {"rand": "uniform", "rand_like": "uniform", "uniform": "uniform", "exponential": "wait"}
OTHERS = ("bernoulli", "randint", "randn", "randn_like", "randperm", "normal", "poisson")
BY_TORCH = patch.object(random, "random", lambda: torch.rand(()))
SHAPES = ("getitem", "view", "reshape", "squeeze", "unsqueeze", "expand", "flatten", "gather", "to",
          "float", "double", "clone", "contiguous", "detach")


@dataclass(frozen=True)
class Hidden:
    """Random numbers by their ids: a "uniform" is w u, or of an exponential E a "wait" is E / w, a
    "rate" w / E. The shortest wait, or largest rate, is x's with probability w[x] / sum(w)."""
    kind: str
    ids: Tensor
    w: Tensor


class Answering(TorchFunctionMode):
    """While it lasts, all that torch is asked comes by here."""

    def __init__(self, chance: Branch) -> None:
        super().__init__()
        self.chance = chance
        self.within: list[tuple[float, float]] = []         # of each id: where its uniform lies
        self.over: set[int] = set()                         # ids whose race is run

    def hide(self, kind: str, out: Tensor) -> Tensor:
        ids = torch.arange(out.numel()).view(out.shape) + len(self.within)
        self.within += [(0.0, 1.0)] * out.numel()
        out.fill_(torch.nan).hidden = Hidden(kind, ids, torch.ones_like(ids, dtype=torch.float64))
        return out

    def below(self, x: Hidden, c: Any) -> Tensor:
        """Is a uniform below c? It is remembered for the next time that it is compared."""
        edges = torch.as_tensor(c, dtype=torch.float64) / x.w
        ids, edges = torch.broadcast_tensors(x.ids, edges)
        out = []
        for n, edge in zip(ids.flatten().tolist(), edges.flatten().tolist()):
            low, high = self.within[n]
            edge = min(max(edge, low), high)
            out.append(self.chance.draw([high - edge, edge - low]) == 1)
            self.within[n] = (low, edge) if out[-1] else (edge, high)
        return torch.tensor(out).view(ids.shape)

    def multinomial(self, rows: Tensor, num_samples: int, *_: Any, **__: Any) -> Tensor:
        """(..., V) weights -> (..., 1) tokens."""
        if num_samples > 1:
            raise Refused("multinomial of several tokens cannot be followed")
        drawn = [self.chance.draw(row) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
        return torch.tensor(drawn).view(*rows.shape[:-1], 1)

    def raced(self, x: Hidden, dim: int = -1, keepdim: bool = False) -> Tensor:
        used = set(x.ids.flatten().tolist())
        if used & self.over:
            raise Refused("the same exponentials race twice: these draws depend on one another")
        self.over |= used
        token = self.multinomial(x.w.movedim(dim, -1), 1).movedim(-1, dim)
        return token if keepdim else token.squeeze(dim)

    def joined(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """A list of numbers as one tensor."""
        parts = [getattr(each, "hidden", None) for each in args[0]]
        out = func(*args, **kwargs)
        if any(parts):
            if not all(parts) or len({x.kind for x in parts}) > 1:
                raise Refused(f"{func.__name__} of random numbers and others cannot be followed")
            ids, w = (torch.stack([getattr(x, name) for x in parts]) for name in ("ids", "w"))
            out.hidden = Hidden(parts[0].kind, ids, w)
        return out

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_").replace("true_divide", "div")
        if name in SOURCES:
            return self.hide(SOURCES[name], func(*args, **kwargs))
        if name == "multinomial":
            return self.multinomial(*args, **kwargs)
        if name in OTHERS:
            raise Refused(f"{func.__name__} cannot be followed")
        if name in ("tensor", "stack") and isinstance(args[0], (list, tuple)):
            return self.joined(func, args, kwargs)
        hidden = [getattr(a, "hidden", None) for a in args[:2]]
        if not any(hidden):
            return func(*args, **kwargs)
        x = hidden[0] or hidden[1]
        c = args[1] if hidden[0] and len(args) > 1 else args[0]
        if name in ("lt", "le", "gt", "ge") and x.kind == "uniform" and not all(hidden):
            below = self.below(x, c)
            return below if (name[0] == "l") == bool(hidden[0]) else ~below
        if name == {"wait": "argmin", "rate": "argmax"}.get(x.kind):
            return self.raced(x, *args[1:], **kwargs)
        if name == "item":
            return args[0]
        after = None
        if name in SHAPES:
            ids, w = (func(t, *args[1:], **kwargs) for t in (x.ids, x.w))
            after = Hidden(x.kind, ids.long(), w.double())
        elif name in ("mul", "div") and not all(hidden) and (torch.as_tensor(c) >= 0).all():
            c = torch.as_tensor(c, dtype=torch.float64)
            kind = x.kind
            if name == "div" and hidden[0]:
                c = 1 / c
            elif name == "div":                        # c / E is a rate, c / (w / E) a wait
                kind = {"wait": "rate", "rate": "wait"}.get(kind)
            after = kind and Hidden(kind, x.ids, x.w / c if kind == "wait" else x.w * c)
        out = func(*args, **kwargs)                    # in place, it is args[0]
        if after is not None:
            out.hidden = after
        elif isinstance(out, (Tensor, list)):          # no shape, no type
            raise Refused(f"{func.__name__} of random numbers ({x.kind}) cannot be followed")
        return out


def short(name: str) -> dict:
    """A case, of three tokens: the branches of a text are many."""
    return dict(CASES[name], N=min(CASES[name]["N"], 3), level=1, texts=1, seed=1)


def exact(run: Callable[[dict], list], case: dict) -> Law:
    """The law of the texts that `run` returns."""
    def once(chance: Branch) -> tuple[int, ...]:
        with Answering(chance), BY_TORCH:
            return tuple(map(int, run(case)))
    texts = defaultdict(float)
    for likely, text in every(once):
        texts[text] += likely
    return texts


def distance(one: Law, other: Law) -> float:
    """Total variation: half the sum of all differences."""
    return sum(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in one.keys() | other) / 2


def main(argv: Sequence[str] | None = None) -> int:
    file, _, name = " ".join(sys.argv[1:] if argv is None else argv).rpartition(":")
    sys.path.insert(0, str(Path(file).resolve().parent))
    with BY_TORCH:                                     # which is what `from random import` imports
        run = runpy.run_path(file).get(name) if Path(file).is_file() else None
    if run is None:
        print("exact.py: a FILE.py:FUNCTION that exists is wanted", file=sys.stderr)
        return 2
    wrong = 0
    torch.set_num_threads(1)                           # a second one costs more than all the rest
    for case in map(short, ALONE):
        try:
            mine = exact(run, case)
        except Refused as e:
            print(f"exact.py: {case['case']}: {e}", file=sys.stderr)
            return 2
        off = distance(mine, target(case))
        said = "exact"
        if off > 1e-6:
            wrong = 1
            far = {fault: distance(mine, law(sampler, case)) for fault, sampler in WRONG.items()}
            near = min(far, key=far.get)
            said = f"WRONG; {far[near]:.1e} from {near}"
        print(f"{case['case']:16} total variation {off:.1e} from the right law: {said}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
