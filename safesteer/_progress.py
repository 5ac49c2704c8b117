"""Progress of long work: a function that is told the share done, from 0 to 1."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[float], None]


def no_progress(share: float) -> None:
    """Ignore the share done."""
