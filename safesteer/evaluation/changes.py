"""Changes between two models on the same prompts, with the pairs kept together.

Two rates with an interval each do not say whether one is higher: the same prompts are hard for both. Here the
interval is that of the difference, prompt by prompt, and McNemar's exact test counts the prompts on which the
models differ. The interval is Newcombe's, made of both rates' Wilson intervals and of how the verdicts go
together: a bootstrap would shrink to nothing where no prompt differs. With several seeds, seeds and prompts
are drawn together (a hierarchical bootstrap).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safesteer._errors import SafeSteerError
from safesteer._intervals import wilson

N_DRAWS = 2000


@dataclass(frozen=True)
class Change:
    """After minus before, with its 95 % interval, how many prompts went each way, and McNemar's p."""

    value: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    n: int


def paired_change(before: Sequence[bool | float | None], after: Sequence[bool | float | None]) -> Change:
    """Compare two models on the same prompts; a prompt with an unknown verdict on either side is left out.

    Unknown is None, or NaN, which pandas reads in its place.

    Args:
        before: Whether it holds for each prompt, with the first model.
        after: With the second one, in the same order.

    Raises:
        SafeSteerError: Where no prompt has both verdicts, or the lists differ in length.

    Example:
        >>> from safesteer.evaluation.changes import paired_change
        >>> change = paired_change([False] * 20, [True] * 10 + [False] * 10)
        >>> change.value, change.gained, change.p < 0.01
        (0.5, 10, True)
    """
    from scipy.stats import binomtest  # slow to import

    if len(before) != len(after):
        raise SafeSteerError(f"{len(before)} verdicts cannot be paired with {len(after)}.")
    pairs = [
        (bool(a), bool(b))
        for a, b in zip(before, after, strict=True)
        if not (a is None or b is None or math.isnan(a) or math.isnan(b))
    ]
    if not pairs:
        raise SafeSteerError("No prompt has a verdict for both models.")
    n, both = len(pairs), sum(a and b for a, b in pairs)
    gained, lost = sum(not a and b for a, b in pairs), sum(a and not b for a, b in pairs)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    low, high = _paired_interval(both, gained, lost, n)
    return Change((gained - lost) / n, low, high, gained, lost, p, n)


def _paired_interval(both: int, gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired rates (Newcombe 1998, method 10)."""
    neither = n - both - gained - lost
    before, after = (both + lost) / n, (both + gained) / n
    (low_before, high_before), (low_after, high_after) = wilson(both + lost, n), wilson(both + gained, n)
    margins = (both + lost) * (neither + gained) * (both + gained) * (neither + lost)
    together = both * neither - gained * lost
    together = max(together - n / 2, 0) if together > 0 else together  # a correction for continuity
    phi = together / math.sqrt(margins) if margins else 0.0

    def spread(of_after: float, of_before: float) -> float:
        return math.sqrt(max(of_after**2 - 2 * phi * of_after * of_before + of_before**2, 0.0))

    change = after - before
    low = change - spread(after - low_after, high_before - before)
    return low, change + spread(high_after - after, before - low_before)


def change_over_seeds(
    before: Sequence[bool], after: Sequence[Sequence[bool]], seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean change, low, high) of several seeds' students against one base, on the same prompts.

    Args:
        before: The base's outcome per prompt.
        after: For each seed the student's.
        seed: Of the bootstrap.
    """
    return drawn_over_seeds(np.array(after, dtype=int) - np.array(before, dtype=int)[None], seed)


def drawn_over_seeds(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return (mean, low, high) of values by seeds x prompts: both are drawn, a 95 % interval.

    Example:
        >>> from safesteer.evaluation.changes import drawn_over_seeds
        >>> drawn_over_seeds(np.ones((3, 50)))
        (1.0, 1.0, 1.0)
    """
    n_seeds, n_prompts = values.shape
    random, means = np.random.default_rng(seed), []
    for _ in range(N_DRAWS):
        rows = random.integers(0, n_seeds, n_seeds)
        columns = random.integers(0, n_prompts, n_prompts)
        means.append(values[np.ix_(rows, columns)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
