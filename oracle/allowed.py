"""What may a correct program have made of these logits, up to rounding, and how far must running
sums be off for a number to draw a token? The checker's own sampler, plain and in float64, so that
it does not judge speculative.py by itself. Read by check_trace.py.
"""
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from llama import Tensor, torch
from speculative import Settings


def distribution(logits: Tensor, s: Settings) -> Tensor:                    # (V,) -> (V,) float64
    """What TRACE.md calls the filters: top-k, temperature, softmax, top-p."""
    x = logits.double()
    if s.temperature == 0:
        p = torch.zeros_like(x)
        p[x.argmax()] = 1
        return p
    if s.top_k:
        kth = x.sort(descending=True).values[min(s.top_k, len(x)) - 1]
        x = x.masked_fill(x < kth, -math.inf)
    p = ((x - x.max()) / s.temperature).exp()
    p = p / p.sum()
    if s.top_p < 1:
        order = p.argsort(descending=True, stable=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= s.top_p]] = 0
    return p / p.sum()


def allowed(logits: Tensor, s: Settings, X: float, about: Sequence[int]) -> list[Tensor]:
    """(V,) logits -> the distributions (V,) that a correct program may have made of them. Ours
    first; then those where of two logits 4 X apart, on either side of the edge of an argmax, top-k
    or top-p, the other is kept, with top-k also both, or neither where k are left; and where the
    mass that top-p cuts at is X more or less. Of many such logits three on each side are tried,
    those `about` first."""
    out = [distribution(logits, s)]
    if s.temperature > 0 and s.top_k == 0 and s.top_p == 1:
        return out                                     # nothing is cut off
    plain = replace(s, temperature=s.temperature or 1.0, top_k=0, top_p=1.0)
    ties = s.temperature > 0 and s.top_k > 0

    def near(which: Tensor) -> list[list[int]]:
        """None, or one of three such tokens."""
        return [[], *sorted(which.nonzero().tolist(), key=lambda i: i[0] not in about)[:3]]

    for off in (0, -X, X) if s.temperature > 0 and s.top_p < 1 else (0,):
        top_p = min(1.0, max(s.top_p + off / min(1, s.temperature or 1), 1e-300))
        kept = distribution(logits, replace(s, top_p=top_p)) > 0
        if off and kept.equal(out[0] > 0):
            continue                                   # a cut there is the same
        edge = logits[kept].amin()                     # of the last token kept
        more = near(~kept & (logits >= edge - 4 * X))
        less = near(kept & (logits <= edge + 4 * X))
        for i, j in itertools.product(more, less):
            changed = kept.clone()
            changed[i] = True
            changed[j] = False
            if len(i) == len(j) or ties and (i or changed.sum() >= s.top_k):
                out.append(distribution(logits.masked_fill(~changed, -math.inf), plain))
    return out


def owed(p: Tensor, q: Tensor | None) -> Tensor:                            # (V,), (V,) -> (V,)
    """What a token is drawn from: p, or given q what a rejection still owes. Not normalised, since
    where little is owed rounding is a large part of it, and must be allowed to be."""
    return p if q is None else (p - q).clamp(min=0)


def drawn_by(weights: Tensor, u: float) -> int:
    """The token that u draws from weights (V,), which need not sum to 1."""
    cdf = weights.cumsum(0)
    return int((cdf > u * cdf[-1]).int().argmax())


def distance(p: Tensor, q: Tensor | None, token: int, u: float) -> float:
    """How far the running sums must be off for u to draw `token`; 0 if it does, inf if none can."""
    weights = owed(p, q)
    cdf = weights.cumsum(0)
    at = u * cdf[-1]
    below = cdf[token] - weights[token]
    if p[token] == 0:
        return math.inf
    if weights[token] > 0 and below <= at < cdf[token]:
        return 0.0
    return max(below - at, at - cdf[token], 0 * at).item()
