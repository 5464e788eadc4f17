"""A policy of ours, beyond the paper: how many layers to leave out, how long to draft, when to
choose the layers anew, and whether drafting pays at all. It goes by what passes cost and by what
was accepted; so it needs no settings, and where nothing pays it decodes plainly.

It takes the place of speculative.Paper, whose four methods it has. It knows the draft's confidence,
and p and q of tokens that have been judged; it drops nothing, so it changes no distribution.

Glossary
    look         a choice of layers, which also shows how near each budget comes
    c[j], v[n]   cost of a draft step with j layers left out, of a verify of n rows, in plain steps
    x            chance that a judged token was accepted, sum(min(p, q)); greedily 0 or 1
    risk[j]      chance that a drafted token is rejected, foretold: the mean of a prior (given, or
                 j/L, as of models that nobody trained for it) and of what each look showed
    keep(j)      1 - risk[j] * rejected / expected: corrected by what was seen since the look
    gain(j)      tokens per plain step: max over k of (1 + a + .. + a^k) / (k c[j] + v[k+1]),
                 a = keep(j)
"""
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dp_layer_skip import Choice
from policy.probe import choose_by
from speculative import Settings

REST = 64                    # while nothing pays, a look every so many verifications


def budgets(L: int) -> list[int]:
    """How many layers may be left out: 1/16 to 11/16 of them."""
    return sorted({max(1, round(L * k / 16)) for k in range(1, 12)})


def overlap(p: Tensor, q: Tensor) -> Tensor:                        # (..., V), (..., V) -> (...)
    """sum(min(p, q)): the chance that a token drafted from q is accepted."""
    return torch.minimum(p, q).sum(-1)


class Adaptive:
    """`draft` and `verify` are the tables c (for j = 0..L) and v (from 0 on), `optimise` is
    the cost of a look, `risk` the prior. K, M, exit_threshold and interval are the paper's numbers,
    each decided here where it is None; `probe` tokens choose the layers.
    `measure`: v is a guess; this gives the true one, called when it first matters."""

    def __init__(self, s: Settings, draft: Sequence[float], verify: Sequence[float],
                 optimise: float = 0.0, risk: Sequence[float] | None = None, *,
                 K: int | None = None, M: int | None = None, exit_threshold: float | None = None,
                 interval: int | None = None, probe: int = 1,
                 measure: Callable[..., Sequence[float]] | None = None) -> None:
        L = len(draft) - 1
        tried = budgets(L) if M is None else [M]
        self.c = draft
        self.v = verify
        self.measure = measure
        self.K = len(verify) - 2 if K is None else K
        self.M = max(tried)
        self.exit_threshold = exit_threshold
        self.interval = interval
        self.probe = probe
        self.slots = (self.M + 1) * probe
        self.left = s.N                                # tokens still to be written
        self.in_vain = 0.0 if risk else optimise       # what a look costs, if nothing comes of it
        self.looks = 0
        self.risk = {j: risk[j] if risk else j / L for j in tried}
        self.choice: Choice | None = None              # none is in use: decode plainly
        self.j = self.M                                # layers to leave out now: so many,
        self.skip = (False,) * L                       # and these
        self.kept = [0.0, 0.0]                         # of `seen` tokens, by confidence: below 0.5,
        self.seen = [0, 0]                             # and from there on
        self.begin_anew()

    def begin_anew(self) -> None:
        """Of the layers in use nothing was seen: as if one rejection was foretold, and came."""
        self.rejected = 1.0
        self.expected = 1.0
        self.alarm = 0.0

    # ------------------------------------------------------------------ the methods of a policy

    def goes_on(self, confidence: list[float]) -> bool:
        """A draft begins if there is a set that pays, and goes on while one more token pays: the
        chance that it comes out, per cost, must reach nine tenths of `gain`."""
        k = len(confidence)
        if self.choice is None or k == self.K:
            return False
        if k == 0:
            return True
        if self.exit_threshold is not None:
            return confidence[-1] >= self.exit_threshold
        reach = math.prod(map(self.likely, confidence))
        cost = self.c[self.j] + self.v[k + 2] - self.v[k + 1]
        return reach * self.keep(self.j) >= 0.9 * self.gain(self.j) * cost

    def judged(self, confidence: list[float], p: Tensor, q: list[Tensor], accepted: int) -> None:
        """Learn from the tokens that were judged: those accepted and the first that was not."""
        self.left -= accepted + 1
        n = min(accepted + 1, len(q))
        if n == 0:
            return
        for one, x in zip(confidence, overlap(p[:n], torch.stack(q[:n])).tolist()):
            b = int(one >= 0.5)
            self.kept[b] += x
            self.seen[b] += 1
            self.rejected += 1 - x
            self.expected += self.risk[self.j]
            # A one-sided CUSUM (Page 1954): rejections beyond 1.25 times the rate, never below 0.
            self.alarm = max(0.0, self.alarm + (1 - x) - 1.25 * (1 - self.keep(self.j)))
        self.decide()

    def due(self, n: int) -> bool:
        """Now and then where no set is in use; else where more is rejected than was (three that are
        close together are enough), or every `interval`. Looks that may be in vain only where all of
        them together cost at most 2 % of what is left."""
        if self.K == 0 or self.M == 0:
            return False
        if self.in_vain * (self.looks + 1) > 0.02 * self.left:
            return False
        if self.choice is None:
            return n % REST == 0
        if self.interval is not None:
            return n % self.interval == 0
        return self.alarm > 1.75

    def optimise(self, choose: Callable, model: Any, cache: Any, text: list[int],
                 h: Tensor) -> Choice:
        """A look, by the last tokens of text: choose layers, and estimate by how near they come
        what each budget risks. At temperature 1, whatever the settings: `keep` corrects it."""
        choice, h = choose_by(self.probe, choose, model, cache, text, h, self.M)
        g = choice.g[list(self.risk)].view(-1, h.shape[-1])                 # (budgets * r, D)
        full = model.head(h).softmax(-1)                                    # (r, V)
        drafts = model.head(g).softmax(-1).view(len(self.risk), *full.shape)
        self.looks += 1
        for j, a in zip(self.risk, overlap(full, drafts).mean(-1).tolist()):
            self.risk[j] += (1 - a - self.risk[j]) / (1 + self.looks)       # still the mean of all
        self.begin_anew()
        self.choice = choice
        self.decide()
        if self.measure:
            saved = (1 - 1 / self.gain(self.j)) * self.left
            if saved < 16:                             # to measure costs about 8
                self.choice = None
            else:
                self.v = self.measure(model, cache, text)
                self.measure = None
                self.decide()
        return choice

    # ----------------------------------------------------------------------------- the formulas

    def keep(self, j: int) -> float:
        return max(0.0, 1 - self.risk[j] * self.rejected / self.expected)

    def gain(self, j: int) -> float:
        a = self.keep(j)
        tokens = 1.0
        best = 0.0
        for k in range(1, self.K + 1):
            tokens = 1 + a * tokens
            best = max(best, tokens / (k * self.c[j] + self.v[k + 1]))
        return best

    def likely(self, one: float) -> float:
        """The chance that a token of this confidence is accepted: as others of its kind were, and
        four more, of which as many as it promises."""
        b = int(one >= 0.5)
        foretold = (self.keep(self.j) + one ** 0.5) / 2
        return (self.kept[b] + 4 * foretold) / (self.seen[b] + 4)

    def decide(self) -> None:
        """The budget of the next round, and its layers; or none, if none pays."""
        self.j = max(self.risk, key=self.gain)
        self.skip = self.choice.skip(self.j)
        if self.gain(self.j) <= 1:
            self.choice = None
