"""What passes cost, in plain steps (decoding one token by one pass): tables for
policy.adaptive.Adaptive. Guessed from the bytes that a pass reads, measured where it first matters,
and kept, so that a seed means one text on one machine.
"""
import hashlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from llama import Config, ModelError, read_json, torch
from speculative import read


def fill(points: dict[int, float], size: int) -> list[float]:
    """Values at 0 .. size-1 from those at 0 and a few more: linear between and beyond the last."""
    out: list[float] = []
    for low, high in itertools.pairwise(sorted(points)):
        slope = (points[high] - points[low]) / (high - low)
        out[low:] = [round(points[low] + slope * (x - low), 3) for x in range(low, size)]
    return out


def layer_weights(c: Config) -> int:
    """How many numbers the matrices of one layer hold."""
    return 2 * c.D * (c.H + c.G) * c.hd + 3 * c.D * c.ffn


def guess(c: Config, K: int) -> dict[str, Any]:
    """The tables of a model that has not run yet. Of a draft step by bytes, which was right to .03
    on a CPU: the layers that it runs, and the head. A verify at the price of a plain step, so that
    what does not pay by this guess does not pay."""
    run = c.L * layer_weights(c)
    layers = run / (run + c.V * c.D)                   # their share of what a plain step reads
    return dict(draft=fill({0: 1.0, c.L: 1 - layers}, c.L + 1), verify=[1.0] * (K + 2),
                optimise=2.0)


@torch.inference_mode()
def measure(model: Any, cache: Any, text: list[int], K: int) -> list[float]:
    """The true cost of verifies of 0 .. K+1 rows after `text`, in its cache: of a few sizes the
    least of three runs. What they write there is overwritten like a rejected draft."""
    t = len(text)
    places = sorted({1, min(4, K + 1), K + 1})
    seconds = dict.fromkeys(places, float("inf"))
    for _ in range(3):
        for n in places:
            tokens = [text[-1]] * min(n, cache.S - t)
            began = time.perf_counter()
            model.head(read(model, tokens, t, cache)[-1])[0, 0].item()       # waits for a GPU
            seconds[n] = min(seconds[n], time.perf_counter() - began)
    costs = {n: max(1.0, seconds[n] / seconds[1]) for n in places}           # 1 is 1
    return fill({0: 1.0} | costs, K + 2)


def spread(L: int, j: int) -> list[bool]:
    """j of L layers, evenly spread: for passes whose cost alone matters."""
    return [(i + 1) * j // L > i * j // L for i in range(L)]


def shelf(folder: Path, *on: object) -> Path:
    """Where the table of a model is kept, in the user's cache folder: a name of what it depends on,
    the model's files and what it runs `on`."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in sorted(folder.glob("*.safetensors"))]
    what = repr((read_json(folder / "config.json"), files, torch.__version__, *on))
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "clasp-mini" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def keep(path: Path, costs: dict[str, Any]) -> bool:
    """Put tables on the shelf; False where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(costs), encoding="utf-8")
    except OSError:
        return False
    return True


def load(costs: str | dict, L: int, K: int) -> dict[str, Any]:
    """Tables from a file, alone or in the `settings` of what --json printed, or of a clasp.json;
    for a model of L layers. Those of a shorter K are drawn out."""
    where = "clasp.json"
    if not isinstance(costs, dict):
        where, costs = costs, read_json(Path(costs))
    try:
        costs = costs.get("settings", costs).get("costs", costs)
        draft, verify = costs["draft"], costs["verify"]
        sizes = dict(draft=L + 1, verify=len(verify), optimise=1, risk=L + 1)
        for name, value in costs.items():
            values = [value] if name == "optimise" else value
            if len(values) != sizes[name] or not all(0 <= x < 1e6 for x in values):
                raise ValueError
        verify = fill(dict(enumerate(verify)), K + 2) if len(verify) < K + 2 else verify
        if min(verify) <= 0:                           # so is what a falling table is drawn out to
            raise ValueError
        return dict(costs, draft=draft, verify=verify)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise ModelError(f"{where}: costs are \"draft\", {L + 1} numbers, \"verify\", 2 or more, "
                         "above 0, \"optimise\", one, in plain steps, as --json prints them, and "
                         f"\"risk\", if at all, {L + 1} chances") from None
