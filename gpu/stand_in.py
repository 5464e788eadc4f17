"""What takes the place of a CUDA graph where there is no GPU: for tests, and a dry run of check.py.

It repeats calls where a graph repeats kernels. Recording runs nothing, so nonsense lies in the
results at first; and all recordings share memory, so a replay leaves nonsense in those of later
ones.
"""
import math
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpu.replay import Replay, unfused
from llama import Layer, Llama
from speculative import generate


def leaves(out: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(out, (tuple, list)):
        return [x for part in out for x in leaves(part)]
    return [] if out is None else [out]


def spoil(results: list[Tensor]) -> None:
    for x in results:
        x.fill_(math.nan if x.is_floating_point() else 1)


def rerun(self: Any, f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Replay.record: what is repeated is f itself, its results put where the recording's lie."""
    f()
    f()
    out = f()
    mine = leaves(out)
    spoil(mine)
    every = self.__dict__.setdefault("every", [])
    every.append(mine)
    place = len(every)

    def again() -> None:
        for results in every[place:]:
            spoil(results)
        for old, new in zip(mine, leaves(f())):
            old.copy_(new)
    again()
    return out, again


def moved(model: Llama, device: str) -> Llama:
    """The same model there."""
    layers = [Layer(*(x.to(device) for x in w)) for w in model.layers]
    embed, norm, head = (x.to(device) for x in (model.embed, model.norm, model.lm_head))
    return Llama(model.cfg, embed, layers, norm, head)


def replayed(model: Llama, K: int, M: int, r: int = 1, fuse: Callable = unfused) -> Any:
    """A Replay: by graphs if the model is on a GPU, else by what stands in for them."""
    fast = Replay(model, K, M, r, fuse)
    if model.device.type != "cuda":
        fast.record = types.MethodType(rerun, fast)
    return fast


def replaying(model: Llama, K: int, M: int, r: int = 1, by: Callable = generate,
              **how: Any) -> Callable:
    """`generate`, or another loop, by replayed passes, for tests that hand it `model`."""
    fast = replayed(model, K, M, r, **how)

    def loop(_, prompt, s, chance, choose):
        return by(fast, prompt, s, chance, fast.choose)
    return loop
