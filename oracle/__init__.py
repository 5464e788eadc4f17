"""What every part of the oracle uses: when are two values equal?"""
import math
from functools import partial
from typing import Any


def alike(ours: Any, theirs: Any, least: float = 1e-6) -> bool:
    """Equal, but for the rounding of floats: by a millionth of them, or by so little."""
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=least)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(partial(alike, least=least), ours, theirs))
    return ours == theirs
