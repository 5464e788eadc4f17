"""Chance without chance: every branch that a run can take, and the probability of each. With it a
distribution is computed, not sampled.
"""
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from speculative import Chance


class Enumerating(Chance):
    """Chance without chance: it follows a script of answers, then gives the first possible one, and
    notes the scripts of those not given. `weight` is the probability of all that it answered."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script, self.taken, self.untaken, self.weight = script, [], [], 1.0

    def _answer(self, options: list[tuple[int, float]]) -> int:
        k = len(self.taken)
        pick = self.script[k] if k < len(self.script) else 0
        if k >= len(self.script):
            self.untaken += [[*self.taken, other] for other in range(1, len(options))]
        self.taken.append(pick)
        self.weight *= options[pick][1]
        return options[pick][0]

    def accept(self, a: float) -> bool:
        return bool(self._answer([(v, w) for v, w in ((True, a), (False, 1 - a)) if w > 0]))

    def draw(self, p: Tensor) -> int:
        return self._answer([(token, w) for token, w in enumerate((p / p.sum()).tolist()) if w > 0])


def every_outcome(run: Callable[[Chance], Any]) -> Iterator[tuple[Any, float]]:
    """Run `run` down every branch that chance can take: (its result, the branch's probability). The
    weights of equal results sum to the result's exact probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Enumerating(scripts.pop())
        result = run(chance)
        scripts += chance.untaken
        yield result, chance.weight
