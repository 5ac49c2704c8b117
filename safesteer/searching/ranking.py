"""Which trials are the best, and how lucky they are.

Losses are a row per trial: 1 - harmful refused, over-refusal, KL; less is better in each.

1. A trial dominates another that is nowhere better and somewhere worse. The front is what none dominates.
2. The knee is the trial of the front nearest to its best values, each loss scaled to the front's range.
3. Successive halving (Li et al. 2018, asynchronous): at a look, a trial goes on while it is among the better
   half of those that came as far, by how many of them dominate it.
4. The best of many trials owes some of its value on val to the prompts that lie there. The optimism (Efron
   1983) is measured by the bootstrap: draw the prompts anew, choose again on them, and take the mean
   difference between the chosen trial's losses on all prompts and on those drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

OBJECTIVES = ("harmful", "over_refusal", "kl")
N_BEFORE_HALVING = 4  # trials that pass a look before any is ended there
N_DRAWS = 1000


def dominated_by(losses: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, "n n"]:
    """Return [i, j]: trial j dominates trial i."""
    ours, theirs = losses[:, None], losses[None]
    return np.asarray((theirs <= ours).all(-1) & (theirs < ours).any(-1))


def front(losses: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
    """Mark the trials that no other dominates.

    Example:
        >>> import numpy as np
        >>> from safesteer.searching.ranking import front
        >>> front(np.array([[0.1, 0.5, 0.1], [0.2, 0.1, 0.1], [0.2, 0.6, 0.1]])).tolist()
        [True, True, False]
    """
    return np.asarray(~dominated_by(losses).any(axis=1))


def knee(losses: Float[np.ndarray, "n 3"]) -> int:
    """Return the index of the front's trial that is nearest to the best of all three losses.

    Example:
        >>> import numpy as np
        >>> from safesteer.searching.ranking import knee
        >>> knee(np.array([[0.0, 1.0, 1.0], [0.2, 0.2, 0.2], [1.0, 0.0, 0.0]]))
        1
    """
    on_front = np.flatnonzero(front(losses))
    best, worst = losses[on_front].min(0), losses[on_front].max(0)
    span = np.where(worst > best, worst - best, 1.0)
    distances = np.linalg.norm((losses[on_front] - best) / span, axis=1)
    return int(on_front[distances.argmin()])


def goes_on(losses: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Say whether a trial goes on after a look, beside the others that came as far.

    Args:
        losses: Its three losses at the look.
        others: Those of the other trials at the same look.

    Example:
        >>> from safesteer.searching.ranking import goes_on
        >>> others = [[0.5, 0.1, 0.1], [0.4, 0.1, 0.1], [0.3, 0.1, 0.1], [0.2, 0.1, 0.1]]
        >>> goes_on([0.25, 0.1, 0.1], others), goes_on([0.6, 0.1, 0.1], others)
        (True, False)
    """
    if len(others) < N_BEFORE_HALVING:
        return True
    counts = dominated_by(np.array([losses, *others], dtype=float)).sum(1)
    return int((counts < counts[0]).sum()) < (len(others) + 2) // 2


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What each trial did with each val prompt: refused (1 or 0), and KL on harmless ones in nats per token.

    With `twins` column i of all three belongs to one pair, and pairs are drawn together.
    """

    harmful: Float[np.ndarray, "n n_harmful"]
    harmless: Float[np.ndarray, "n n_harmless"]
    kls: Float[np.ndarray, "n n_harmless"]
    twins: bool

    def losses(self) -> Float[np.ndarray, "n 3"]:
        """Return the losses on all prompts."""
        return np.stack([1 - self.harmful.mean(1), self.harmless.mean(1), self.kls.mean(1)], axis=1)

    def drawn(self, n_draws: int, seed: int) -> Float[np.ndarray, "n_draws n 3"]:
        """Return the losses on prompts drawn with replacement, as many as there are."""
        rng = np.random.default_rng(seed)
        of_harmful = _counts(rng, n_draws, self.harmful.shape[1])
        of_harmless = of_harmful if self.twins else _counts(rng, n_draws, self.harmless.shape[1])
        kinds = ((of_harmful, 1 - self.harmful), (of_harmless, self.harmless), (of_harmless, self.kls))
        return np.stack([counts @ values.T for counts, values in kinds], axis=-1)


def _counts(rng: np.random.Generator, n_draws: int, n: int) -> Float[np.ndarray, "n_draws n"]:
    """Draw how often each of n prompts is taken, as shares of the whole."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_draws) / n


RULES: dict[str, Callable[[Float[np.ndarray, "n 3"]], int]] = {
    "the knee": knee,
    "most harmful refused": lambda losses: int(losses[:, 0].argmin()),
    "fewest over-refusals": lambda losses: int(losses[:, 1].argmin()),
    "least drift": lambda losses: int(losses[:, 2].argmin()),
}


def corrected(outcomes: Outcomes, *, n_draws: int = N_DRAWS, seed: int = 0) -> pd.DataFrame:
    """Correct the values of the luckiest trials for optimism, for each rule that chooses one.

    The correction is of the choice among trials alone: a direction that was scored, or an S that was voted
    for, on the same prompts is as lucky as before.

    Args:
        outcomes: Of all complete trials.
        n_draws: Draws of the prompts.
        seed: Of the draws.

    Returns:
        A row per rule and objective: rule, trial (index of the row in `outcomes`), objective, on_val,
        optimism (how much too good that is), corrected, and low and high, the 95 % bootstrap interval moved
        by the optimism.
    """
    full, drawn, rows = outcomes.losses(), outcomes.drawn(n_draws, seed), []
    for rule, choose in RULES.items():
        chosen = np.array([choose(losses) for losses in drawn])
        gaps = full[chosen] - drawn[np.arange(n_draws), chosen]
        best, optimism = choose(full), gaps.mean(0)
        low, high = np.percentile(drawn[:, best], [2.5, 97.5], axis=0) + optimism
        for i, objective in enumerate(OBJECTIVES):
            values = np.array([full[best, i], full[best, i] + optimism[i], low[i], high[i]])
            limit = np.inf if objective == "kl" else 1.0
            values[1:] = values[1:].clip(0, limit)
            if objective == "harmful":  # its loss is what is not refused
                values = (1 - values)[[0, 1, 3, 2]]
            named = dict(zip(("on_val", "corrected", "low", "high"), values.tolist(), strict=True))
            row = {"rule": rule, "trial": best, "objective": objective, "optimism": float(optimism[i])}
            rows.append(row | named)
    columns = ["rule", "trial", "objective", "on_val", "optimism", "corrected", "low", "high"]
    return pd.DataFrame(rows, columns=columns)
