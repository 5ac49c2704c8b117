"""Changes between two models on the same prompts, with the pairs kept together.

Two rates with an interval each do not say whether one is higher: the same prompts are hard for both. Here the
interval is that of the difference, prompt by prompt, and McNemar's exact test counts the prompts on which the
models differ. With several seeds, seeds and prompts are drawn together (a hierarchical bootstrap).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safesteer._errors import SafeSteerError
from safesteer._intervals import bootstrap

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


def paired_change(before: Sequence[bool | None], after: Sequence[bool | None], seed: int = 0) -> Change:
    """Compare two models on the same prompts; a prompt with an unknown verdict on either side is left out.

    Args:
        before: Whether it holds for each prompt, with the first model.
        after: With the second one, in the same order.
        seed: Of the bootstrap.

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
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if not pairs:
        raise SafeSteerError("No prompt has a verdict for both models.")
    differences = np.array([float(b) - float(a) for a, b in pairs])
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    low, high = bootstrap(differences.tolist(), seed)
    return Change(float(differences.mean()), low, high, gained, lost, p, len(pairs))


def change_over_seeds(
    before: Sequence[bool], after: Sequence[Sequence[bool]], seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean change, low, high) of several seeds' students against one base, on the same prompts.

    Args:
        before: The base's outcome per prompt.
        after: For each seed the student's.
        seed: Of the bootstrap.
    """
    differences = np.array(after, dtype=int) - np.array(before, dtype=int)[None]
    n_seeds, n_prompts = differences.shape
    random, means = np.random.default_rng(seed), []
    for _ in range(N_DRAWS):
        rows = random.integers(0, n_seeds, n_seeds)
        columns = random.integers(0, n_prompts, n_prompts)
        means.append(differences[np.ix_(rows, columns)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)
