"""The same model on a GPU, its passes replayed from CUDA graphs: one graph *per layer*.

A CUDA graph is a recorded run of kernels, which one launch repeats at the same addresses. Launched
one by one, a layer's small kernels keep the host busy for longer than the GPU. A graph of a whole
pass would fix which layers run. So each layer is recorded alone, as an update in place of one
buffer x, and a draft step replays the layers that it keeps: a new skip set records nothing anew.

    draft       t, id  -> begin | 0 | 1 |   | 3 |   |   | 6 | ... | L-1 -> h
    verify      t, ids -> [ all layers, P = K + 1 rows ] -> h
    head        h[L]   -> [ the head, 1 row or P ] -> logits
    optimise    t, h   -> [ dp_layer_skip.table, (M + 1) * r rows per layer ] -> D, skipped, g

A plain step is a draft step that leaves out nothing. What differs between steps (t, ids, h) is put
into small buffers first. What was not recorded runs as it does without graphs: the long passes of a
prompt, a probe of fewer than r tokens. The tests hold every pass against the plain model's.
"""
import copy
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from command.cli import note
from dp_layer_skip import Choice, Near, RunLayer, choose_skip, cosine, table
from llama import Cache, Layer, Llama, ModelError, Rows
from policy.probe import nearness, places

Fuse = Callable[[Callable], Callable]                  # fused or unfused
SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidia0")                     # of a GPU
OLDEST = {"12": 525, "13": 580}                        # driver that a release of CUDA asks for


class Slots(Cache):
    """The cache of recorded passes. Their rows are made on the device, from a position t that lies
    there: one number moves a recording to another place in the text. They look at all S slots,
    since a recording cannot look at more of them the next time."""

    def __init__(self, model: Llama, S: int, P: int) -> None:
        super().__init__(model.cfg, S, model.device, model.dtype)
        self.P = P
        self.t = torch.zeros((), dtype=torch.long, device=model.device)

    def sequence(self, t: int, T: int) -> Rows | None:
        """Move the recordings to t; of up to P rows that is all (None). More are not recorded."""
        if T > self.P:
            return super().sequence(t, T)
        # On a GPU a slot too far is no exception here but the end of the process.
        assert t + self.P <= self.S, f"{self.P} rows at {t} in a cache of {self.S}"
        self.t.fill_(t)
        return None

    def rows(self, position: Tensor, slots: Tensor, may_read: Tensor) -> Rows:
        """As Cache.rows, for passes that are not recorded. The last of candidates is one of the
        probe's last token: that is where the recorded program has to move."""
        self.t.copy_(position[-1])
        return super().rows(position, slots, may_read)

    def text_rows(self, T: int) -> Rows:
        """`Cache.sequence` with the position on the device."""
        slots = self.all_slots[:T] + self.t
        return super().rows(slots, slots, self.all_slots <= slots[:, None])

    def candidate_rows(self, J: int, r: int) -> Rows:
        """`policy.probe.candidates` with the position on the device."""
        return super().rows(*places(self.all_slots, self.t, J, r))


class Replay:
    """Takes the place of a Llama in `generate`, and its `choose` that of choose_skip. What a call
    returns is overwritten by later ones (states by the next pass, logits by the next head; a
    Choice never), so it serves one run at a time."""

    def __init__(self, model: Llama, K: int, M: int, r: int, fuse: Fuse) -> None:
        self.cfg = model.cfg
        self.device = model.device
        self.dtype = model.dtype
        self.model = model
        self.layer = model.layer
        self.P = K + 1
        self.M = M
        self.r = r
        self.slots = None                              # the cache of the recordings,
        self.side = None                               # the stream that they are made on,
        self.pool = None                               # and their memory
        block = model.block

        def update(w: Layer, x: Tensor, before: Tensor, *rest: Any) -> None:
            """The layer in place; `before` keeps its input. One function, to be fused."""
            before.copy_(x)
            x.copy_(block(w, x, *rest))
        self.update = fuse(update)
        self.fused = copy.copy(model)
        self.fused.block = fuse(block)
        self.ids = torch.zeros(self.P, dtype=torch.long, device=self.device)
        self.x = model.embed.new_zeros(1, self.cfg.D)
        self.before = model.embed.new_zeros(self.cfg.L, 1, self.cfg.D)
        self.last = model.embed.new_zeros(self.P, self.cfg.D)               # h[L]
        self.h = model.embed.new_zeros(self.cfg.L + 1, r * self.cfg.D)      # of the probe

    def record(self, f: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run f; its result, and what repeats it in place. Raises ModelError."""
        self.side = self.side or torch.cuda.Stream(self.device)    # one, to share memory
        here = torch.cuda.current_stream(self.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            for _ in range(2):          # first calls compile and set up libraries: not recorded
                f()
        here.wait_stream(self.side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
                out = f()               # subtle: recorded, but not run; so `out` holds nothing yet
        except RuntimeError as e:
            why = first_line(e.__context__ or e)       # what broke a recording hides behind its end
            raise ModelError(f"a CUDA graph could not be recorded: {why} (--eager runs without)"
                             ) from None
        self.pool = graph.pool()
        graph.replay()
        return out, graph.replay

    def cache(self, S: int) -> Slots:
        """Graphs belong to the memory they were recorded on, so all runs get the same cache: what
        an earlier one left there is overwritten like a rejected draft. It grows, never shrinks."""
        need = S + self.P                              # a verify always writes P rows
        if self.slots is None or need > self.slots.S:
            self.slots = None                          # frees what there was
            # Room for the program's candidates, so that drafts may follow on a plain run.
            most = need + (self.M + 2) * self.r
            slots = Slots(self.model, -(-most // 512) * 512, self.P)
            self.record_passes(slots)
            self.slots = slots                         # now that all went well
        return self.slots

    def record_passes(self, slots: Slots) -> None:
        wake(self.device)
        m = self.fused

        def begin() -> Rows:
            self.x.copy_(F.embedding(self.ids[:1], m.embed))
            return slots.text_rows(1)

        def layer(i: int) -> None:
            keys, values = slots.layers[i]
            self.update(m.layers[i], self.x, self.before[i], rows, keys, values, m.cfg)

        def verify() -> list[Tensor]:
            return m.forward(self.ids, slots.text_rows(self.P), slots)

        def optimise() -> tuple[Tensor, ...]:
            near = cosine
            if self.r > 1:
                near = nearness(self.h[-1].view(self.r, self.cfg.D))
            rows = slots.candidate_rows(self.M + 1, self.r)

            def run_layer(i: int, g: Tensor) -> Tensor:                     # (J, r*D)
                x = g.view(-1, self.cfg.D)                                  # -> (J*r, D)
                missing = len(rows.slots) - len(x)     # always as many rows: compiled once
                y = m.layer(i, F.pad(x, (0, 0, 0, missing)), rows, slots)
                return y[:len(x)].view(g.shape)
            return table(self.h, run_layer, self.M, near)

        slots.t.fill_(self.r - 1)                      # no token of a probe lies before position 0
        # subtle: replays come in another order than the recordings, and share one memory. What a
        # recording returns may lie where an earlier one works, but not where a later one does, as
        # long as it is kept. So the head, which is replayed before a verify's states are read, is
        # recorded after it. x, before, last, h, t and ids lie outside; rows is kept to the end.
        rows, self.begin = self.record(begin)
        self.layers = [self.record(lambda i=i: layer(i))[1] for i in range(self.cfg.L)]
        if self.P > 1:
            self.states, self.verify = self.record(verify)
        self.heads = {T: self.record(lambda T=T: m.head(self.last[:T])) for T in {1, self.P}}
        if self.M > 0:
            self.found, self.optimise = self.record(optimise)

    def forward(self, ids: Tensor, rows: Rows | None, cache: Slots, skip: Sequence[bool] = ()
                ) -> list[Tensor]:
        """As Llama.forward, at the position that `cache.sequence` was last asked for."""
        assert cache is self.slots, "the recordings are of another cache"
        if rows is not None:                           # more than are recorded
            return self.model.forward(ids, rows, cache, skip)
        T = len(ids)
        self.ids[:T].copy_(ids)
        if T > 1:
            # Always P rows: old ids fill up, in slots that will be overwritten.
            assert not any(skip), "several rows are recorded for the full model alone"
            self.verify()
            return [x[:T] for x in self.states]
        runs = [not (skip and skip[i]) for i in range(self.cfg.L)]
        self.begin()
        for i in range(self.cfg.L):
            if runs[i]:
                self.layers[i]()
        h = [self.x]
        for i in reversed(range(self.cfg.L)):          # what a skipped layer was given is its end
            h.insert(0, self.before[i] if runs[i] else h[0])
        return h

    def head(self, x: Tensor) -> Tensor:                                    # (T, D) -> (T, V)
        """As Llama.head."""
        T = len(x)
        if T > self.P:
            return self.model.head(x)
        self.last[:T].copy_(x)
        logits, again = self.heads[1 if T == 1 else self.P]
        again()
        return logits[:T]

    def choose(self, h: Tensor, run_layer: RunLayer, M: int, near: Near = cosine) -> Choice:
        """As choose_skip, for the token whose candidates the cache was last asked for."""
        if M == 0 or M != self.M or h.shape != self.h.shape:
            return choose_skip(h, run_layer, M, near)
        self.h.copy_(h)
        self.optimise()
        D, skipped, g = self.found
        return Choice(D.tolist(), skipped.tolist(), g.clone())  # the next replay may write there


def recorded(model: Llama, K: int, M: int, r: int, compile: bool = True) -> tuple[
        Replay, Callable[..., Choice]]:
    """What `generate` takes in the place of `model` and of choose_skip, for drafts of up to K
    tokens that leave M layers out at most, chosen by a probe of r tokens."""
    if sys.stderr.isatty():
        note("compiling and recording passes, which takes long the first time (--no-compile, "
             "--eager)")
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)            # some of PyTorch's calls name none
    replay = Replay(model, K, M, r, fused if compile else unfused)
    return replay, replay.choose


def wake(device: torch.device) -> None:
    """Keep a GPU busy for 0.3 s. An idle one may run at a fifth of its clock, and leaves it after
    0.1 s of work: till then what is timed, by us or by the compiler as it tunes, says nothing."""
    if device.type != "cuda":
        return
    x = torch.ones(4096, 4096, device=device)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        x @ x
        torch.cuda.synchronize(device)


def fused(f: Callable) -> Callable:
    """f, compiled where it is first called. Where that fails, for whatever arguments, f as it is
    from then on, and a line that says so."""
    run = None

    def call(*args: Any) -> Any:
        nonlocal run
        if run is not f:
            try:
                if run is None:
                    torch._dynamo.config.recompile_limit = 64      # per row count and cache size
                    # Tuned, a product with one row becomes a kernel that the parts around it join.
                    run = torch.compile(f, fullgraph=True, dynamic=False,
                                        options=dict(coordinate_descent_tuning=True))
                return run(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # whatever a compiler may say: all works without, only slower
                note(f"no fused kernels, torch.compile fails here: {first_line(e)}")
                run = f
        return f(*args)
    return call


def unfused(f: Callable) -> Callable:
    """In the place of `fused`: plain kernels."""
    return f


def first_line(e: BaseException) -> str:
    return f"{type(e).__name__} {str(e).strip().partition(chr(10))[0]}"


def unusable() -> str | None:
    """What to say where PyTorch was built for CUDA, a driver or device is there, and no GPU can be
    used: an 8B would run on the CPU without a word. None where nothing is amiss or the GPUs are
    hidden on purpose."""
    cuda = torch.version.cuda
    if cuda is None or torch.cuda.is_available():
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    if not any(Path(sign).exists() for sign in SIGNS) and not shutil.which("nvidia-smi"):
        return None
    line = f"there seems to be a GPU, but PyTorch, which was built for CUDA {cuda}, can use none"
    oldest = OLDEST.get(cuda.partition(".")[0])
    if oldest:
        line += f"; it asks for driver {oldest} or later (nvidia-smi shows yours)"
    return line
