"""Chance without chance: every branch that a run can take, and the probability of each. With it a
distribution is computed, not sampled; and the distribution that it should be, by another route.
"""
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from oracle.sampler.law import Branch, every
from speculative import Chance
from tests.helpers import decode, full_model, tokens


class Enumerating(Chance):
    """It answers by the branch that is followed. A branch is asked once for all verdicts."""

    def __init__(self, branch: Branch) -> None:
        self.branch = branch

    def accept(self, a: Tensor) -> Tensor:
        likely = []                                    # ... that so many are accepted
        left = 1.0
        for each in a.tolist():
            likely.append(left * (1 - each))
            left *= each
        return torch.tensor([self.branch.draw([*likely, left])], device=a.device)

    def draw(self, p: Tensor) -> Tensor:
        return torch.tensor([self.branch.draw(p.tolist())], device=p.device)


def every_outcome(run: Callable[[Chance], Any]) -> Iterator[tuple[float, Any]]:
    """Run `run` down every branch that chance can take: (the branch's probability, its result). The
    probabilities of equal results sum to the result's exact one."""
    return every(lambda branch: run(Enumerating(branch)))


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
    for weight, text in every_outcome(lambda c: tuple(tokens(decode(model, prompt, s, c, loop)))):
        got[text] += weight
    return max(abs(want.get(text, 0.0) - got.get(text, 0.0)) for text in want | got)
