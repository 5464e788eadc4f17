"""Layers chosen by several tokens, beyond the paper: what one token finds near may be its accident.

A candidate is then one skip set tried on each of the last r tokens of the text. To the dynamic
program its state is a vector of r * D numbers; here it is taken apart again. The tokens keep their
own positions, and each is tried as if it were the last: it reads what lies before it and itself.

    near(g, h[i]) = mean over the r tokens of cos(h[L], h[L] + g - h[i])

takes the place of cos(h[i], g): so g would come out if the layers after i added to it what they
added to h[i]. An error counts by its size at the end, not by its angle at depth i.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dp_layer_skip import Choice, Near, cosine
from llama import Cache, Rows
from speculative import Paper, Settings


def nearness(end: Tensor) -> Near:
    """How near states (J, r*D) come to those of a depth (r*D,), for tokens that end at (r, D)."""
    end = end.to(torch.promote_types(end.dtype, torch.float32))

    def near(g: Tensor, target: Tensor) -> Tensor:                          # -> (J,)
        error = g.to(end.dtype) - target.to(end.dtype)
        return cosine(end, end + error.view(-1, *end.shape)).mean(-1)
    return near


def candidates(cache: Cache, t: int, J: int, r: int) -> Rows:
    """J candidates of the r tokens up to position t, the tokens of one beside one another; as
    Cache.candidates, each in a scratch slot after t."""
    assert r <= t + 1 and t + J * r < cache.S, f"{J} x {r} slots after {t} in a cache of {cache.S}"
    return cache.rows(*places(cache.all_slots[:t + 1 + J * r], t, J, r))


def places(slot: Tensor, t: int | Tensor, J: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where they stand, (J*r,), which slots they write, (J*r,), and which of `slot`, 0 .. W-1, they
    may read, (J*r, W). A t on the device asks the host for nothing, so a CUDA graph can hold it."""
    position = (slot[:r] + t - r + 1).repeat(J)
    slots = slot[:J * r] + t + 1
    may_read = (slot < position[:, None]) | (slot == slots[:, None])
    return position, slots, may_read


def choose_by(r: int, choose: Callable[..., Choice], model: Any, cache: Any, text: Sequence[int],
              h: Tensor, M: int) -> tuple[Choice, Tensor]:
    """The layers to leave out by the last r tokens of text, and their states at the end, (r, D). h
    (L+1, D): those of the very last. The others are read once more: a pass of r rows."""
    r = min(r, len(text))
    t = len(text) - 1
    near = cosine
    h = h[:, None]                                                          # (L+1, 1, D)
    if r > 1:
        ids = torch.tensor(text[-r:], device=model.device)
        h = torch.stack(model.forward(ids, cache.sequence(t - r + 1, r), cache))    # (L+1, r, D)
        near = nearness(h[-1])
    rows = candidates(cache, t, M + 1, r)

    def run_layer(i: int, g: Tensor) -> Tensor:                             # (J, r*D)
        x = g.view(-1, h.shape[-1])                                         # -> (J*r, D)
        return model.layer(i, x, rows.first(len(x)), cache).view(g.shape)
    return choose(h.flatten(1), run_layer, M, near), h[-1]


class PaperByProbe(Paper):
    """The paper's loop, whose layers are chosen by r tokens instead of one."""

    def __init__(self, s: Settings, L: int, r: int) -> None:
        super().__init__(s, L)
        self.r = r
        self.slots = (s.M + 1) * r

    def optimise(self, choose: Callable[..., Choice], model: Any, cache: Any, text: Sequence[int],
                 h: Tensor) -> Choice:
        choice, _ = choose_by(self.r, choose, model, cache, text, h, self.s.M)
        self.skip = choice.skip()
        return choice
