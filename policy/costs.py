"""What passes cost, in plain steps (decoding one token by one pass): measured once, made into
tables for policy.adaptive.Adaptive. A table that is kept gives a seed one text everywhere (--costs).
"""
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama import ModelError, Tensor, read_json, torch
from policy.adaptive import budgets
from policy.probe import choose_by
from speculative import read


def fill(points: dict[int, float], size: int) -> list[float]:
    """Values at 0 .. size-1 from those at a few places: linear between them and beyond the last."""
    places, out = sorted(points), []
    for x in range(size):
        b = next((i for i, place in enumerate(places) if place >= x and i), len(places) - 1)
        lo, hi = places[b - 1], places[b]
        out.append(points[lo] + (points[hi] - points[lo]) * (x - lo) / (hi - lo))
    return [round(value, 3) for value in out]


def spread(L: int, j: int) -> list[bool]:
    """j of L layers, evenly spread: for passes whose cost alone matters."""
    return [(i + 1) * j // L > i * j // L for i in range(L)]


@torch.inference_mode()
def measure(model: Any, choose: Callable[..., Any], K: int, M: int, r: int, t: int = 128,
            repeats: int = 5) -> dict[str, Any]:
    """draft[j] a draft step with j layers left out, verify[n] a verify of n rows (from 1 on),
    optimise a choice of up to M layers by r tokens; after t tokens, medians of interleaved runs."""
    L = model.cfg.L
    cache = model.cache(t + max(K + 2, (M + 1) * r))
    one = torch.zeros(1, dtype=torch.long, device=model.device)
    h = read(model, [0] * t, 0, cache)
    probe = torch.stack([x[-1] for x in h])                                 # (L+1, D)

    def draft(j: int) -> Tensor:
        return model.head(model.forward(one, cache.sequence(t, 1), cache, spread(L, j))[-1])

    def verify(n: int) -> Tensor:
        return model.head(read(model, [0] * n, t, cache)[-1])

    def optimise(_: int) -> Tensor:
        choice, end = choose_by(r, choose, model, cache, [0] * t, probe, M)
        g = choice.g.view(-1, end.shape[-1])
        model.head(end)
        return model.head(g[:len(budgets(L)) * len(end)])                   # as the policy does

    passes = [(draft, j) for j in sorted({1, L // 3, 2 * L // 3, L} - {0})]
    passes += [(verify, n) for n in (1, 2, 4, 8, K + 1) if n <= K + 1]
    passes += [(optimise, 0)]
    times = {(call.__name__, x): [] for call, x in passes}
    for _ in range(1 + repeats):
        for call, x in passes:
            began = time.perf_counter()
            call(x)[0, 0].item()                       # waits for a GPU
            times[call.__name__, x].append(time.perf_counter() - began)
    took = {name: statistics.median(every[1:]) for name, every in times.items()}
    cost = {name: seconds / took["verify", 1] for name, seconds in took.items()}
    drafts = {0: 1.0} | {j: min(1.0, cost["draft", j]) for kind, j in cost if kind == "draft"}
    verifies = {0: 1.0} | {n: max(1.0, cost["verify", n]) for kind, n in cost if kind == "verify"}
    return dict(draft=fill(drafts, L + 1), verify=fill(verifies, K + 2),
                optimise=round(cost["optimise", 0], 3))


def load(costs: str | dict, L: int, K: int) -> dict[str, Any]:
    """Tables from a file, alone or in the `settings` of what --json printed, or of a clasp.json;
    for a model of L layers. Those of a shorter K are drawn out."""
    where = "clasp.json"
    if not isinstance(costs, dict):
        where, costs = costs, read_json(Path(costs))
    try:
        costs = costs.get("settings", costs).get("costs", costs)
        draft, verify = costs["draft"], costs["verify"]
        sizes = dict(draft=L + 1, verify=None, optimise=0, risk=L + 1)
        for name, value in costs.items():
            values = [value] if sizes[name] == 0 else value
            if sizes[name] and len(values) != sizes[name] or not all(0 <= x < 1e6 for x in values):
                raise ValueError
        verify = fill(dict(enumerate(verify)), K + 2) if len(verify) < K + 2 else verify
        if min(verify) <= 0:                           # so is what a falling table is drawn out to
            raise ValueError
        return dict(costs, draft=draft, verify=verify)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise ModelError(f"{where}: costs are \"draft\", {L + 1} numbers, \"verify\", 2 or more, "
                         "above 0, \"optimise\", one, in plain steps, as --json prints them, and "
                         f"\"risk\", if at all, {L + 1} chances") from None
