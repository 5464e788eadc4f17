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
else is what one GPU runs, at sizes H/n, G/n, ffn/n: attention, cache, dynamic program, sampler. How
the processes find one another, agree and end is the business of ranks.py.
"""
from dataclasses import replace
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llama import Config, Layer, Llama, Rows, attention, feed_forward, rms_norm

DIM = dict(q_proj=0, k_proj=0, v_proj=0, gate_proj=0, up_proj=0, lm_head=0, o_proj=1, down_proj=1)


def share(x: Tensor, dim: int) -> Tensor:
    """This rank's part of x. What n does not divide, as may be the vocabulary, ends in a smaller
    one."""
    rank = dist.get_rank()
    size = -(-x.shape[dim] // dist.get_world_size())   # rounded up
    return x.transpose(0, dim)[rank * size:(rank + 1) * size].transpose(0, dim)


def own_part(name: str, x: Tensor) -> Tensor:
    """What this rank takes of a tensor of the file. Nothing of x has been read yet."""
    dim = DIM.get(name.split(".")[-2])
    return x if dim is None else share(x, dim)


def total(x: Tensor) -> Tensor:
    """The sum over ranks, in the place of x; made once and sent to all, so to the last bit the same
    everywhere."""
    dist.all_reduce(x)
    return x


def decoder_layer(w: Layer, x: Tensor, rows: Rows, keys: Tensor, values: Tensor, c: Config,
                  eps: Tensor) -> Tensor:                                   # (T, D) -> (T, D)
    """llama.decoder_layer, of which each rank computes a part."""
    x = x + total(attention(w, x, rows, keys, values, c, eps))
    return x + total(feed_forward(w, x, eps))


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
