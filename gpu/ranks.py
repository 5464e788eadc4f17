"""The main command in several processes at once, as torchrun starts them: what its Job does
otherwise there (`Ranked`), and how all of them end together.

Every rank runs the whole command. All take the same decisions, for they have one seed and the same
logits to the last bit. This is not left to hope: after each round they compare what they decided. A
difference, a rank that is gone and one that does not answer end every rank with a line and status
1: one that went on alone would wait forever in the next exchange. (Should ranks ever run different
passes within a round, their exchanges do not fit: they abort, or wait until the alarm.)
"""
import argparse
import io
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from command.cli import UsageError
from gpu.parallel import Parallel
from speculative import Round

TIMEOUT = 600                # seconds: to find one another, to load, for a round


class Ranked:
    """A mixin: what makes of the command's Job one of which each rank does its share (`together`
    puts it in front); rank 0 alone reads stdin and writes a trace."""
    Model = Parallel

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
        self.told = 0
        if self.rank > 0:
            a.trace = None
        wait = timedelta(seconds=TIMEOUT)
        self.store, _, _ = next(dist.rendezvous("env://", timeout=wait))
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=n,
                                timeout=wait)

    def same(self, value: bytes) -> bytes:
        """Rank 0's value, on all ranks, which must ask in one order."""
        self.told += 1
        if self.rank == 0:
            self.store.set(f"value {self.told}", value)
        return self.store.get(f"value {self.told}")

    def prompt(self) -> list[int]:
        if self.a.prompt == "-":
            text = sys.stdin.buffer.read()             # of the others it is empty: see `together`
            sys.stdin = io.TextIOWrapper(io.BytesIO(self.same(text)))
        return super().prompt()

    def load(self) -> "Ranked":
        super().load()
        # All must decide by the same numbers.
        known = self.same(json.dumps([self.costs, self.costs_guessed]).encode())
        self.costs, self.costs_guessed = json.loads(known)
        # To the rest of the command the model is the whole one, with the sizes of the whole.
        names = ("device", "dtype", "cache", "forward", "layer", "head")
        own = {name: getattr(self.model, name) for name in names}
        self.model = SimpleNamespace(cfg=self.cfg, **own)
        return self

    def measure(self, *where: Any) -> list[float]:
        """All take rank 0's times."""
        own = super().measure(*where)
        self.costs["verify"] = json.loads(self.same(json.dumps(own).encode()))
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


def together(work: Callable[[type], int], job: type) -> int:
    """Run the command as one rank: `work` is handed the kind of `job` to make."""
    first, err = os.environ["RANK"] == "0", sys.stderr
    if not first:
        sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")
    try:
        status = work(type("RankedJob", (Ranked, job), {}))
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
