"""What passes cost, in plain steps (decoding one token by one pass): measured once, made into
tables for speculative.Adaptive. A table that is kept gives a seed one text everywhere (--costs).
"""
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_layer_skip import Choice
from llama import ModelError, Tensor, read_json, torch
from speculative import Adaptive, read


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


def chosen(model: Any, choose: Callable[..., Choice], cache: Any, h: Tensor, t: int,
           M: int) -> Choice:
    """What `choose` makes of the states h (L+1, r, D) of r tokens, the last at position t, as in
    speculative.generate."""
    rows = cache.candidates(t, M + 1, h.shape[1])
    return choose(h, lambda i, g: model.layer(i, g.flatten(0, 1), rows, cache).view_as(g), M)


@torch.inference_mode()
def measure(model: Any, choose: Callable[..., Any], K: int, M: int, r: int, t: int = 128,
            repeats: int = 5) -> dict[str, Any]:
    """draft[j] a draft step with j layers left out, verify[n] a verify of n rows (from 1 on),
    optimise a choice of up to M layers by r tokens; after t tokens, medians of interleaved runs."""
    L, cache, passes = model.cfg.L, model.cache(t + max(K + 2, (M + 1) * r)), {}
    one = torch.zeros(1, dtype=torch.long, device=model.device)
    _, h = read(model, [0] * t, 0, cache, last=r, states=True)

    def draft(j: int) -> Callable[[], Any]:
        skip = spread(L, j)
        return lambda: model.forward(one, cache.sequence(t, 1), cache, skip)[0]

    def optimise() -> Any:
        chosen(model, choose, cache, h, t - 1, M)
        return model.head(h[-1].repeat(len(Adaptive.budgets(L)), 1))        # as the policy does

    for j in sorted({1, L // 3, 2 * L // 3, L} - {0}):
        passes["draft", j] = draft(j)
    for n in sorted({1, 2, 4, 8, K + 1} & set(range(1, K + 2))):
        passes["verify", n] = lambda n=n: read(model, [0] * n, t, cache, last=n)[0]
    passes["optimise", 0] = optimise
    times = {name: [] for name in passes}
    for _ in range(1 + repeats):
        for name, call in passes.items():
            began = time.perf_counter()
            call()[0].tolist()                         # waits for a GPU
            times[name].append(time.perf_counter() - began)
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
