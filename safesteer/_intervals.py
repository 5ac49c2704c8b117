"""Intervals: Wilson for rates, bootstrap over prompts for means."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a rate; z = 1.96 is 95 %."""
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0, n_draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, resampling prompts."""
    array = np.asarray(values)
    draws = np.random.default_rng(seed).choice(array, (n_draws, len(array))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_means(
    values: Float[np.ndarray, "n n_prompts"], seed: int = 0, n_draws: int = 1000
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the ends of each row's interval, all rows on the same resamples of the prompts."""
    n_prompts = values.shape[1]
    drawn = np.random.default_rng(seed).integers(0, n_prompts, (n_draws, n_prompts))
    counts = np.stack([np.bincount(d, minlength=n_prompts) for d in drawn]) / n_prompts
    low, high = np.percentile(values @ counts.T, [2.5, 97.5], axis=1)
    return low, high
