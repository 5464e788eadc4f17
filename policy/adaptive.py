"""A policy of ours, beyond the paper: how many layers to leave out, how long to draft, when to
choose the layers anew, and whether drafting pays at all. It goes by what passes cost and by what
was accepted; so it needs no settings, and where nothing pays it decodes plainly.

It takes the place of speculative.Paper, whose four methods it has. It knows the draft's confidence,
and p and q of tokens that have been judged; it drops nothing, so it changes no distribution.

Glossary
    c[j], v[n]   cost of a draft step with j layers left out, of a verify of n rows, in plain steps
    risk[j]      chance that a drafted token is rejected, foretold: the mean of a prior (given, or
                 j/L, as of models that nobody trained for it) and of all that choices showed
    keep(j)      1 - risk[j] * rejected / expected: corrected by what was seen, the old fading
    gain(j)      tokens per plain step: max over k of (1 + a + .. + a^k) / (k c[j] + v[k+1]),
                 a = keep(j)
    x            chance that a judged token was accepted, sum(min(p, q)); greedily 0 or 1
    stale        no choice of layers is in use: none was made yet, or none paid
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dp_layer_skip import Choice
from policy.probe import choose_by
from speculative import Settings

REST = 64                    # rounds of plain decoding where nothing pays; each time twice as many


def budgets(L: int) -> list[int]:
    """How many layers may be left out: 1/16 to 11/16 of them."""
    return sorted({max(1, round(L * k / 16)) for k in range(1, 12)})


def overlap(p: Tensor, q: Tensor) -> Tensor:                        # (..., V), (..., V) -> (...)
    """sum(min(p, q)): the chance that a token drafted from q is accepted."""
    return torch.minimum(p, q).sum(-1)


class Alarm:
    """Are more tokens rejected than at first? A one-sided CUSUM (Page 1954): it adds up rejections
    beyond 1.5 times the rate so far, and never falls below 0. Above 1.5 it rings: two rejections
    close together are enough where few were foretold. At a rate of .1 it rings for no reason once
    in 50 tokens, and where the rate triples, after 8 (simulated)."""

    def __init__(self, foretold: float) -> None:
        self.level = 0.0
        self.rejected = 16 * foretold                  # as if of 16 tokens so many had been
        self.judged = 16.0

    def hear(self, x: float) -> None:
        """A token was judged, of which x was accepted."""
        rate = self.rejected / self.judged
        self.level = max(0.0, self.level + (1 - x) - 1.5 * rate)
        self.rejected += 1 - x
        self.judged += 1

    def rings(self) -> bool:
        return self.level > 1.5


class Adaptive:
    """`draft` and `verify` are the tables c (for j = 0..L) and v (from 0 on), `optimise` is
    the cost of a choice of layers, risk the prior. K, M, exit_threshold and interval are the
    paper's numbers, each decided here where it is None; `probe` tokens choose the layers.
    `measure`: v is a guess; this gives the true one, called when it first matters."""

    def __init__(self, s: Settings, draft: Sequence[float], verify: Sequence[float],
                 optimise: float = 0.0, risk: Sequence[float] | None = None, *,
                 K: int | None = None, M: int | None = None, exit_threshold: float | None = None,
                 interval: int | None = None, probe: int = 1,
                 measure: Callable[..., Sequence[float]] | None = None) -> None:
        L = len(draft) - 1
        self.left = s.N                                # tokens still to be written
        self.c = draft
        self.v = verify
        self.in_vain = 0.0 if risk else optimise       # what a look costs, if nothing comes of it
        self.measure = measure
        self.K = len(verify) - 2 if K is None else K
        self.exit_threshold = exit_threshold
        self.interval = interval
        self.probe = probe
        tried = budgets(L) if M is None else [M]
        self.prior = {j: risk[j] if risk else j / L for j in tried}
        self.risk = dict(self.prior)
        self.shown = dict.fromkeys(tried, 0.0)         # sums over the choices made
        self.choices = 0
        self.j = max(tried)                            # layers to leave out now
        self.M = max(tried)                            # and at most
        self.slots = (self.M + 1) * probe
        self.skip = (False,) * L
        self.stale = True
        self.choice: Choice | None = None
        self.alarm = Alarm(0.0)
        self.kept = [0.0, 0.0]                         # of `seen` tokens, by confidence: below 0.5,
        self.seen = [0, 0]                             # and from there on
        self.rejected = 1.0
        self.expected = 1.0                            # so many were foretold to be rejected
        self.rest = 0                                  # rounds to decode plainly from now on
        self.next_rest = REST

    # ------------------------------------------------------------------ the methods of a policy

    def goes_on(self, confidence: list[float]) -> bool:
        """A draft begins if there is a set that pays, and goes on while one more token pays: per
        cost it has to bring nine tenths of `gain`, which takes all tokens to be alike."""
        k = len(confidence)
        if self.stale or self.rest > 0 or k == self.K:
            return False
        if k == 0:
            return True
        if self.exit_threshold is not None:
            return confidence[-1] >= self.exit_threshold
        a = self.keep(self.j)
        reach = 1.0                                    # chance that all drafted so far is accepted
        for one in confidence:
            b = int(one >= 0.5)
            # Kept as others of such confidence were; foretold, as if 4 of them had been judged.
            foretold = (a + one ** 0.5) / 2
            reach *= (self.kept[b] + 4 * foretold) / (self.seen[b] + 4)
        cost = self.c[self.j] + self.v[k + 2] - self.v[k + 1]
        return reach * a >= 0.9 * self.gain(self.j) * cost

    def judged(self, confidence: list[float], p: Tensor, q: list[Tensor], accepted: int) -> None:
        """Learn from the tokens that were judged: those accepted and the first that was not."""
        self.left -= accepted + 1
        self.rest = max(0, self.rest - 1)
        n = min(accepted + 1, len(q))
        if n == 0:
            return
        for one, x in zip(confidence, overlap(p[:n], torch.stack(q[:n])).tolist()):
            b = int(one >= 0.5)
            self.kept[b] += x
            self.seen[b] += 1
            self.rejected = 0.98 * self.rejected + 1 - x
            self.expected = 0.98 * self.expected + self.risk[self.j]
            self.alarm.hear(x)
        self.decide()

    def due(self, n: int) -> bool:
        """Where no set is in use, or the alarm rings, or every `interval`; but looks that may be in
        vain only where all of them together cost at most 2 % of what is left."""
        if self.rest > 0 or self.K == 0 or self.M == 0:
            return False
        if self.in_vain * (self.choices + 1) > 0.02 * self.left:
            return False
        if self.interval is not None:
            return n % self.interval == 0
        return self.stale or self.alarm.rings()

    def optimise(self, choose: Callable, model: Any, cache: Any, text: list[int],
                 h: Tensor) -> Choice:
        """Choose layers by the last tokens of text, and estimate by how near they come what each
        budget risks. At temperature 1, whatever the settings: `keep` corrects it."""
        choice, h = choose_by(self.probe, choose, model, cache, text, h, self.M)
        g = choice.g[list(self.risk)].view(-1, h.shape[-1])                 # (budgets * r, D)
        full = model.head(h).softmax(-1)                                    # (r, V)
        drafts = model.head(g).softmax(-1).view(len(self.risk), *full.shape)
        self.choice = choice
        self.choices += 1
        for j, a in zip(self.risk, overlap(full, drafts).mean(-1).tolist()):
            self.shown[j] += 1 - a
            self.risk[j] = (self.prior[j] + self.shown[j]) / (1 + self.choices)
        self.stale = False
        self.decide()
        if self.measure and not self.stale:
            # What could be saved has to be twice what measuring costs, about 8 plain steps.
            if (1 - 1 / self.gain(self.j)) * self.left < 16:
                self.give_up()
            else:
                self.v = self.measure(model, cache, text)
                self.measure = None
                self.decide()
        self.alarm = Alarm(1 - self.keep(self.j))
        return choice

    # ----------------------------------------------------------------------------- the formulas

    def keep(self, j: int) -> float:
        return 1 - min(max(self.risk[j] * self.rejected / max(self.expected, 1e-9), 0.005), 0.99)

    def gain(self, j: int) -> float:
        a = self.keep(j)
        tokens = 1.0
        best = 0.0
        for k in range(1, self.K + 1):
            tokens = 1 + a * tokens
            best = max(best, tokens / (k * self.c[j] + self.v[k + 1]))
        return best

    def decide(self) -> None:
        """The budget of the next round, and its layers; or none, if none pays."""
        self.j = max(self.risk, key=self.gain)
        self.skip = self.choice.skip(self.j)
        if self.gain(self.j) <= 1:
            self.give_up()

    def give_up(self) -> None:
        """Decode plainly for a while, then look again, with what was seen forgotten."""
        self.stale = True
        self.rest = self.next_rest
        self.next_rest *= 2
        self.rejected = 1.0
        self.expected = 1.0
