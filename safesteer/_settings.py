"""Values of settings: one check for every dataclass of settings.

A field with words takes one of them; a number lies within its bounds; a whole number is no larger than
2^31 - 1 and, where nothing else is said, not negative. NaN lies within no bounds.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from safesteer._errors import SafeSteerError

Number = int | float
LARGEST = 2**31 - 1
POSITIVE = (math.ulp(0.0), math.inf)
FINITE = (-1e30, 1e30)
SHARE = (0.0, 1.0)
AT_LEAST_1 = (1, LARGEST)


def check_settings(owner: Any, stage: str, bounds: Mapping[str, tuple[Number, Number]]) -> None:
    """Raise SafeSteerError naming the first setting of `owner` that has no sense. Bounds are inclusive."""
    hints = get_type_hints(type(owner))
    for name in (f.name for f in fields(owner)):
        value, hint = getattr(owner, name), hints[name]
        shown = f"{stage}.{name}" if stage else name
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise SafeSteerError(f"{shown} must be one of {get_args(hint)}, not '{value}'.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            usual = (0, LARGEST) if isinstance(value, int) else (-math.inf, math.inf)
            low, high = bounds.get(name, usual)
            if not low <= value <= high:
                raise SafeSteerError(f"{shown} {_range(low, high)}, not {value}.")


def _range(low: Number, high: Number) -> str:
    tail = {LARGEST: " and below 2^31", math.inf: "", FINITE[1]: " and finite"}.get(high)
    if low == POSITIVE[0]:
        return f"must be positive{tail}" if tail is not None else f"must lie above 0 and at most at {high:g}"
    if low == -math.inf:
        return "must be a number"
    if low == FINITE[0]:
        return "must be finite"
    return f"must be at least {low:g}{tail}" if tail is not None else f"must lie between {low:g} and {high:g}"
