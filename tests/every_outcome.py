"""Chance without chance: every branch that a run can take, and the probability of each. With it a
distribution is computed, not sampled; and the distribution that it should be, by another route.
"""
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from speculative import Chance
from tests.helpers import decode, full_model, tokens


class Enumerating(Chance):
    """It follows a script of answers, then gives the first possible one, and notes the scripts of
    those not given. `weight` is the probability of all that it answered."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.taken: list[int] = []
        self.untaken: list[list[int]] = []
        self.weight = 1.0

    def answer(self, options: dict[Any, float]) -> Any:
        """One of these answers; their probabilities are given."""
        possible = [(value, w) for value, w in options.items() if w > 0]
        n = len(self.taken)
        pick = 0
        if n < len(self.script):
            pick = self.script[n]
        else:
            self.untaken += [[*self.taken, other] for other in range(1, len(possible))]
        value, w = possible[pick]
        self.taken.append(pick)
        self.weight *= w
        return value

    def accept(self, a: Tensor) -> Tensor:
        options = {}                                   # how many are accepted: how likely
        left = 1.0
        for n, each in enumerate(a.tolist()):
            options[n] = left * (1 - each)
            left *= each
        return torch.tensor([self.answer(options | {len(a): left})], device=a.device)

    def draw(self, p: Tensor) -> Tensor:
        token = self.answer(dict(enumerate((p / p.sum()).tolist())))
        return torch.tensor([token], device=p.device)


def every_outcome(run: Callable[[Chance], Any]) -> Iterator[tuple[Any, float]]:
    """Run `run` down every branch that chance can take: (its result, the branch's probability). The
    weights of equal results sum to the result's exact probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Enumerating(scripts.pop())
        result = run(chance)
        scripts += chance.untaken
        yield result, chance.weight


def filtered(logits, s):
    """`probabilities` by another route: Python's floats, a token at a time. -> a list."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    if s.temperature == 0:
        order = order[:1]
    elif 0 < s.top_k < len(order):
        kth = logits[order[s.top_k - 1]]
        order = [i for i in order if logits[i] >= kth]
    weight = [math.exp((logits[i] - logits[order[0]]) / (s.temperature or 1)) for i in order]
    total = sum(weight)
    mass = [0.0, *itertools.accumulate(w / total for w in weight)]          # of all likelier ones
    kept = [w for w, before in zip(weight, mass) if before < s.top_p]
    out = [0.0] * len(logits)
    for i, w in zip(order, kept):
        out[i] = w / sum(kept)
    return out


def target_distribution(model, prompt, s):
    """text -> probability: the product of the full model's conditionals, token by token."""
    out = {}

    def extend(new, weight):
        if len(new) == s.N or new and new[-1] in s.stop_ids:
            out[new] = weight
            return
        for token, w in enumerate(filtered(full_model(model, [*prompt, *new]), s)):
            if w > 0:
                extend((*new, token), weight * w)

    extend((), 1.0)
    return out


def distance(model, s, loop=None, prompt=(0, 1)):
    """The largest difference in probability of any text between the loop (real cache, real dynamic
    program, down every branch of chance) and the product of conditionals."""
    want = target_distribution(model, prompt, s)
    got = defaultdict(float)
    for text, weight in every_outcome(lambda c: tuple(tokens(decode(model, prompt, s, c, loop)))):
        got[text] += weight
    return max(abs(want.get(text, 0.0) - got.get(text, 0.0)) for text in want | got)
