"""One model over several GPUs (tensor parallelism), for the 70B and the 405B, which no GPU holds:

    torchrun --nproc-per-node 8 clasp_mini.py --model Meta-Llama-3-70B-Instruct --chat --prompt ...

One process per GPU, a *rank*, n of them. Each takes its share of the matrices from the memory map:

    q, k, v, gate, up    rows: its heads, its part of the feed-forward width
    out, down            the columns that read those
    head                 rows: a part of the vocabulary
    embedding, norms     all: a pass looks up one row per token, so a share would save no time, and
                         to save 1.8 GB of the 70B's 19.5 on 8 GPUs it would cost an exchange

What a rank's attention and feed-forward part add to the residual stream is part of a sum, so the
ranks' parts are added up, twice a layer (`total`); their logits are put side by side (`head`). All
else is what one GPU runs, at sizes H/n, G/n, ffn/n: attention, cache, dynamic program, sampler.

Every rank runs the whole command. All take the same decisions, for they have one seed and the same
logits to the last bit. This is not left to hope: after each round they compare what they decided. A
difference, a rank that is gone and one that does not answer end every rank with a line and status
1: one that went on alone would wait forever in the next exchange. (Should ranks ever run different
passes within a round, their exchanges do not fit: they abort, or wait until the alarm.)
"""
import argparse
import io
import os
import pickle
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from command.cli import UsageError
from command.job import Job
from dp_layer_skip import choose_skip
from llama import Config, Layer, Llama, Rows, attention, feed_forward, rms_norm
from speculative import Round

TIMEOUT = 600                # seconds: to find one another, to load, for a round
DIM = dict(q_proj=0, k_proj=0, v_proj=0, gate_proj=0, up_proj=0, lm_head=0, o_proj=1, down_proj=1)


def share(x: Tensor, dim: int) -> Tensor:
    """This rank's part of x. Where n does not divide it, as a vocabulary, the last is smaller."""
    rank = dist.get_rank()
    size = -(-x.shape[dim] // dist.get_world_size())   # rounded up
    return x.transpose(0, dim)[rank * size:(rank + 1) * size].transpose(0, dim)


def own_part(name: str, x: Tensor) -> Tensor:
    """What this rank takes of a tensor of the file. Nothing of x has been read yet."""
    dim = DIM.get(name.split(".")[-2])
    return x if dim is None else share(x, dim)


def total(x: Tensor) -> Tensor:
    """The sum over ranks, in the place of x; made once and sent to all: the same bits."""
    dist.all_reduce(x)
    return x


def decoder_layer(w: Layer, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, c: Config
                  ) -> Tensor:                                              # (T, D) -> (T, D)
    """llama.decoder_layer, of which each rank computes a part."""
    x = x + total(attention(w, x, rows, keys, values, c))
    return x + total(feed_forward(w, x))


class Parallel(Llama):
    """A rank's share of a model, which answers as the whole would."""

    def __init__(self, c: Config, embed: Tensor, layers: list[Layer], norm: Tensor,
                 head: Tensor) -> None:
        self.n = dist.get_world_size()
        own = replace(c, H=c.H // self.n, G=c.G // self.n, ffn=c.ffn // self.n)
        super().__init__(own, embed, layers, norm, share(head, 0) if c.tied else head)
        self.block = decoder_layer

    @classmethod
    def load(cls, *where: Any, part: Callable = lambda name, x: x) -> "Parallel":
        """As Llama.load; `part` sees whole tensors, of which nothing has been read yet."""
        return super().load(*where, part=lambda name, x: own_part(name, part(name, x)))

    def head(self, x: Tensor) -> Tensor:                                    # (T, D) -> (T, V)
        """As Llama.head. Every logit is computed by one rank, so all have the same bits."""
        T = len(x)
        m = -(-self.cfg.V // self.n)                                        # V/n, rounded up
        own = F.linear(rms_norm(x, self.norm, self.eps), self.lm_head)
        own = F.pad(own, (0, m - own.shape[1]))                             # (T, m)
        every = own.new_empty(self.n * T, m)
        # Its name in PyTorch 2.13, and in 2.11.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(every, own)
        every = every.view(self.n, T, m).transpose(0, 1).reshape(T, self.n * m)
        return every[:, :self.cfg.V].type(self.eps.dtype)


# ------------------------------------------------------------------------------ the command

class RankedJob(Job):
    """The command's Job, of which each rank does its share; rank 0 alone reads stdin and writes a
    trace."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__(a)
        n = int(os.environ["WORLD_SIZE"])
        c = self.cfg
        if c.G % n or c.ffn % n:
            fit = [str(i) for i in range(1, c.G + 1) if c.G % i == c.ffn % i == 0]
            raise UsageError(f"{n} processes cannot share {c.G} key/value heads and a feed-forward "
                             f"width of {c.ffn} evenly; take {' or '.join(fit)}")
        backend = "gloo"
        if self.device.type == "cuda":
            backend = "nccl"
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            gpus = torch.cuda.device_count()
            if here > gpus:
                raise UsageError(f"{here} processes need a GPU each, and PyTorch sees {gpus}")
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self.rank = int(os.environ["RANK"])
        self.asked = 0
        if self.rank > 0:
            a.trace = None
        wait = timedelta(seconds=TIMEOUT)
        self.store, _, _ = next(dist.rendezvous("env://", timeout=wait))
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=n,
                                timeout=wait)

    def same(self, value: Any) -> Any:
        """Rank 0's value, on all ranks, which must ask in one order."""
        self.asked += 1
        if self.rank == 0:
            self.store.set(f"value {self.asked}", pickle.dumps(value))
        return pickle.loads(self.store.get(f"value {self.asked}"))

    def prompt(self) -> list[int]:
        if self.flags.prompt == "-":
            text = sys.stdin.buffer.read()             # of the others it is empty: see `together`
            sys.stdin = io.TextIOWrapper(io.BytesIO(self.same(text)))
        return super().prompt()

    def load(self, model: type[Llama] = Llama, choose: Callable = choose_skip) -> "RankedJob":
        super().load(Parallel, choose)                 # its share, whatever `model` is
        # All must decide by the same numbers.
        self.costs, self.costs_guessed = self.same((self.costs, self.costs_guessed))
        # To the rest of the command the model is the whole one, with the sizes of the whole.
        names = ("device", "dtype", "cache", "forward", "layer", "head")
        own = {name: getattr(self.model, name) for name in names}
        self.model = SimpleNamespace(cfg=self.cfg, **own)
        return self

    def measure(self, *where: Any) -> list[float]:
        """All take rank 0's times."""
        self.costs["verify"] = self.same(super().measure(*where))
        return self.costs["verify"]

    def guarded(self, rounds: Iterator[Round]) -> Iterator[Round]:
        """The rounds of a run, each compared across ranks before it is yielded, and the end too."""
        while True:
            alarm = threading.Timer(TIMEOUT, lost, [
                f"no round ended within {TIMEOUT} seconds (on GPUs --eager may help)"])
            alarm.daemon = True
            alarm.start()
            try:
                r = next(rounds, None)
                told = r and (r.skip, r.drafted, r.emitted, r.choice and r.choice.skipped)
                both = torch.tensor([1, -1], device=self.device) * zlib.crc32(repr(told).encode())
                dist.all_reduce(both, dist.ReduceOp.MAX)    # the largest and minus the smallest
                if both.sum() != 0:
                    lost("the ranks decided differently in this round, so none can be trusted")
            finally:
                alarm.cancel()
            if r is None:
                return
            yield r


def lost(why: str, status: int = 1) -> None:
    """End this process, whatever its threads and its GPU are waiting for."""
    print(f"{Path(sys.argv[0]).name}: rank {os.environ['RANK']}: {why}", file=sys.__stderr__,
          flush=True)
    os._exit(status)


def together(work: Callable[[type[Job]], int]) -> int:
    """Run the command as one rank: `work` is handed the kind of Job to make."""
    first, err = os.environ["RANK"] == "0", sys.stderr
    if not first:
        sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")
    try:
        status = work(RankedJob)
        dist.destroy_process_group()
        return status
    except UsageError:                                 # all were asked for the same
        if first:
            raise
        return 2
    except KeyboardInterrupt:
        lost("interrupted", 130)
    except RuntimeError as e:                          # of PyTorch: an exchange, or memory
        lost(f"{str(e).partition(chr(10))[0].partition('. ')[0]} (did another rank end?)")
    finally:
        sys.stderr = err
