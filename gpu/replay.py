"""The same model on a GPU, its passes replayed from CUDA graphs: one graph *per layer*.

A CUDA graph is a recorded run of kernels, at fixed addresses, that one launch repeats; launched one
by one, they keep the host busy for longer than the GPU. A graph of a whole pass would fix which
layers run. So each layer is recorded alone, updating the buffer x in place; a draft step replays
those it keeps, and a new skip set records nothing anew:

    draft       t, id  -> begin | 0 | 1 |   | 3 |   |   | 6 | ... | L-1 | end -> logits
    verify      t, ids -> [ all layers, P = K + 1 rows, and the head ] -> logits, h
    optimise    t, h   -> [ dp_layer_skip.table, (M + 1) * r rows per layer ] -> D, parents, g

A pass of one row is a draft step that leaves out nothing, so a round without drafts costs one plain
step. What differs between steps (t, ids, h) is put into small buffers first. What was not recorded
runs as it does without graphs: a prompt's long passes, a probe of fewer than r tokens. `recorded`
is all that the command calls; the tests hold every pass against the plain model's.
"""
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_layer_skip import Choice, RunLayer, choose_skip, table
from llama import Cache, Llama, Rows, decoder_layer

Fuse = Callable[[Callable], Callable]                  # torch.compile or nothing


class Slots(Cache):
    """The cache of recorded passes. Their rows are made on the device, from a position t that lies
    there: one number moves a recording to another place in the text. They look at all S slots,
    since a recording cannot look at more of them the next time."""

    def __init__(self, model: Llama, S: int, P: int) -> None:
        super().__init__(model.cfg, S, model.device, model.dtype)
        self.P, self.t = P, torch.zeros((), dtype=torch.long, device=model.device)

    def sequence(self, t: int, T: int) -> Rows | None:
        """Move the recordings to t. Up to P rows are made there (`text_rows`), more here."""
        self.t.fill_(t)
        if T > self.P:
            return super().sequence(t, T)
        # On a GPU a slot too far is no exception here but the end of the process.
        assert t + self.P <= self.S, f"{self.P} rows at {t} in a cache of {self.S}"
        return None

    def candidates(self, t: int, J: int, r: int = 1) -> Rows:
        """Move the recordings to t. The rows are for who runs candidates without them."""
        self.t.fill_(t)
        return super().candidates(t, J, r)

    def text_rows(self, T: int) -> Rows:
        """`Cache.sequence` with the position on the device."""
        slots = self.slot[:T] + self.t
        return self.rows(slots, slots, self.slot <= slots[:, None])

    def candidate_rows(self, J: int, r: int) -> Rows:
        """`Cache.candidates` with the position on the device."""
        position = (self.slot[:r] + self.t - r + 1).repeat(J)[:, None]
        slots = self.slot[1:J * r + 1] + self.t
        return self.rows(position[:, 0], slots,
                         (self.slot < position) | (self.slot == slots[:, None]))


class Replay:
    """Takes the place of a Llama in `generate`, and its `choose` that of choose_skip. What a pass
    returns is overwritten by the next, so it serves one run at a time."""

    def __init__(self, model: Llama, K: int, M: int, r: int, fuse: Fuse) -> None:
        self.cfg, self.device, self.dtype = model.cfg, model.device, model.dtype
        self.model, self.P, self.M, self.r = model, K + 1, M, r
        self.slots, self.side, self.pool = None, None, None
        self.fused, self.in_place = copy.copy(model), copy.copy(model)
        self.fused.block = fuse(decoder_layer)
        self.in_place.block = fuse(lambda w, x, *rest: x.copy_(decoder_layer(w, x, *rest)))
        self.ids = torch.zeros(self.P, dtype=torch.long, device=self.device)
        self.x = model.embed.new_zeros(1, self.cfg.D)
        self.h = model.embed.new_zeros(self.cfg.L + 1, r, self.cfg.D)

    def record(self, f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run f; its result, and what repeats it in place."""
        self.side = self.side or torch.cuda.Stream(self.device)    # one, to share memory
        self.side.wait_stream(here := torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for _ in range(2):          # first calls compile and set up libraries: not recorded
                f()
        here.wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
            out = f()                   # subtle: recorded, but not run; so `out` holds nothing yet
        self.pool = graph.pool()
        graph.replay()
        return out, graph.replay

    def cache(self, S: int) -> Slots:
        """Graphs belong to the memory they were recorded on, so all runs get the same cache: what
        an earlier one left there is overwritten like a rejected draft. It grows, never shrinks."""
        # Behind the last slot asked for: padding. And the dynamic program's, to be recorded.
        S = max(S + self.P, (self.M + 2) * self.r)
        if self.slots and S <= self.slots.S:
            return self.slots
        self.slots = None                              # frees what there was
        slots, m = Slots(self.model, -(-S // 512) * 512, self.P), self.fused

        def begin() -> Rows:
            self.x.copy_(F.embedding(self.ids[:1], m.embed))
            return slots.text_rows(1)

        def verify() -> tuple[Tensor, Tensor]:
            return m.forward(self.ids, slots.text_rows(self.P), slots, last=self.P, states=True)

        def optimise() -> tuple[Tensor, ...]:
            rows = slots.candidate_rows(J := self.M + 1, self.r)

            def run_layer(i: int, g: Tensor) -> Tensor:                     # (J, r, D)
                padded = F.pad(g, (0, 0, 0, 0, 0, J - len(g)))              # so compiled once
                return m.layer(i, padded.flatten(0, 1), rows, slots).view_as(padded)[:len(g)]
            return table(self.h, run_layer, self.M)

        slots.t.fill_(self.r - 1)                      # no token of a probe lies before position 0
        # subtle: replays come in another order than the recordings, and share one memory. x, h, t
        # and ids lie outside it; rows must outlive all of the recordings below, as it does here.
        rows, self.begin = self.record(begin)
        self.layers = [self.record(lambda i=i: self.in_place.layer(i, self.x, rows, slots))[1]
                       for i in range(self.cfg.L)]
        self.next_logits, self.end = self.record(lambda: m.head(self.x))
        (self.logits, self.states), self.verify = self.record(verify)
        self.found, self.optimise = self.record(optimise) if self.M else (None, None)
        self.slots = slots                             # now that all went well
        return slots

    def forward(self, ids: Tensor, rows: Rows | None, cache: Slots, skip: Sequence[bool] = (),
                last: int = 1, states: bool = False) -> tuple[Tensor, Tensor | None]:
        """As Llama.forward, at the position that `cache.sequence` was last asked for."""
        assert cache is self.slots, "the recordings are of another cache"
        if rows is not None:
            return self.model.forward(ids, rows, cache, skip, last, states)
        T = len(ids)
        self.ids[:T].copy_(ids)
        if T == 1:
            self.begin()
            h = []
            for i in range(self.cfg.L):
                if states:
                    h.append(self.x.clone())           # a layer's graph updates x in place
                if not (skip and skip[i]):
                    self.layers[i]()
            self.end()
            h = torch.stack([*h, self.x])[:, 1 - last:] if states else None
            return self.next_logits[1 - last:], h
        # Always P rows: old ids fill up, in slots that will be overwritten.
        assert not any(skip), "several rows are recorded for the full model alone"
        self.verify()
        # The next verify's states will go there: a copy, since a probe may keep some of them.
        return self.logits[T - last:T], self.states[:, T - last:T].clone() if states else None

    def layer(self, i: int, x: Tensor, rows: Rows, cache: Slots) -> Tensor:       # (T, D) -> (T, D)
        """As Llama.layer."""
        return self.model.layer(i, x, rows, cache)

    def head(self, x: Tensor) -> Tensor:                                    # (T, D) -> (T, V)
        """As Llama.head."""
        return self.model.head(x)

    def choose(self, h: Tensor, run_layer: RunLayer, M: int) -> Choice:
        """As choose_skip, at the position that `cache.candidates` was last asked for."""
        assert M == self.M, f"a budget of {M}, recorded for {self.M}"
        if h.shape != self.h.shape or not M:
            return choose_skip(h, run_layer, M)
        self.h.copy_(h)
        self.optimise()
        D, parents, g = self.found
        return Choice.read(D, parents, g.clone())      # the next replay, of whatever, may go there


def recorded(model: Llama, K: int, M: int, r: int, compile: bool = True) -> tuple[
        Replay, Callable[[Tensor, RunLayer, int], Choice]]:
    """What `generate` takes in the place of `model` and of choose_skip, for drafts of up to K
    tokens that leave M layers out at most, chosen by a probe of r tokens."""
    if sys.stderr.isatty():
        print("note: compiling and recording passes, which takes long the first time "
              "(--no-compile, --eager)", file=sys.stderr)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)            # some of PyTorch's calls name none
    replay = Replay(model, K, M, r, fusing(model.device) if compile else lambda f: f)
    return replay, replay.choose


def fusing(device: torch.device) -> Fuse:
    """torch.compile for Replay, tried out; where it cannot work, the identity, and a line that says
    so."""
    def fuse(f: Callable) -> Callable:
        # Tuned, a product with one row becomes a kernel of its own that the parts around it join.
        return torch.compile(f, fullgraph=True, dynamic=False,
                             options=dict(coordinate_descent_tuning=True))
    try:
        torch._dynamo.config.recompile_limit = 64      # per row count and size of the cache
        fuse(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception as e:  # whatever a compiler may say: without it all works, only slower
        print(f"note: no fused kernels, torch.compile fails here: {type(e).__name__} "
              f"{str(e).strip().partition(chr(10))[0]}", file=sys.stderr)
        return lambda f: f
    return fuse
