"""Score candidates by successive halving: all of them on a few prompts, the best on more.

1. Score every candidate on the first pairs of prompts.
2. Put them in the order of the selection, by what they have so far.
3. Score the best quarter on as many pairs again, and so on, until every pair is used.

Nothing is scored twice, and a candidate's numbers are means over the prompts that it was scored on.
With n candidates, 32 pairs and 8 of them first, n/4 go on to 16 and n/16 to 32: 0.38 of the passes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer.progress import Progress, no_progress
from safesteer.prompts.prompt_set import LABELS, PromptSet

KEPT = 4  # one of so many goes on
AT_LEAST = 8  # candidates that go on, for controls and held-out scores of the best

Scores: TypeAlias = dict[str, Float[Tensor, "some prompt"]]
# Scores some candidates, by index, on some prompts.
ScoreSome: TypeAlias = Callable[[Int[Tensor, " some"], PromptSet, Progress], Scores]
# Puts candidates in order, best first, by their scores so far.
Order: TypeAlias = Callable[[Scores], Int[Tensor, " some"]]


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of all candidates by prompt, of which row i counts up to pair `n_pairs[i]`."""

    scores: Scores
    n_pairs: Int[Tensor, " n"]

    def groups(self, name: str) -> list[tuple[Int[Tensor, " some"], Float[Tensor, "some prompt"]]]:
        """Return the candidates that saw the same prompts, with one of their scores on these."""
        groups = []
        for count in self.n_pairs.unique().tolist():
            at = (self.n_pairs == count).nonzero()[:, 0]
            groups.append((at, self.scores[name][at, :count]))
        return groups


def rounds(n: int, n_pairs: int, first: int | None) -> list[tuple[int, int, int]]:
    """Plan the rounds: how many candidates are scored on which pairs.

    Args:
        n: How many candidates there are.
        n_pairs: How many pairs of prompts.
        first: Pairs of the first round; None: all of them, in one round.

    Example:
        >>> from safesteer.directions.halving import rounds
        >>> rounds(96, 32, 8)
        [(96, 0, 8), (24, 8, 16), (8, 16, 32)]
    """
    plan, low, high = [], 0, min(first or n_pairs, n_pairs)
    while low < n_pairs:
        plan.append((n, low, high))
        n, low, high = min(n, max(AT_LEAST, math.ceil(n / KEPT))), high, min(2 * high, n_pairs)
    return plan


def score_by_halving(
    score_some: ScoreSome,
    n: int,
    prompts: PromptSet,
    first: int | None,
    order: Order,
    progress: Progress = no_progress,
) -> Scored:
    """Score all candidates on the first pairs, and the best ones on the others.

    Args:
        score_some: Scores some candidates on some prompts.
        n: How many candidates there are.
        prompts: Harmful and harmless prompts.
        first: Pairs that every candidate is scored on; None: all of them.
        order: Puts candidates in order by their scores so far.
        progress: Called with the share done.

    Returns:
        The scores; those on prompts that a candidate has not seen are 0 and do not count.
    """
    harmful, harmless = ([p for p in prompts.prompts if p.label == label] for label in LABELS)
    plan = rounds(n, max(len(harmful), len(harmless)), first)
    total, done = sum(k * (high - low) for k, low, high in plan), 0
    scores: Scores = {}
    n_pairs, alive = torch.zeros(n, dtype=torch.long), torch.arange(n)
    for k, low, high in plan:
        if low:
            alive = alive[order({name: values[alive, :low] for name, values in scores.items()})[:k]]
        part = PromptSet((*harmful[low:high], *harmless[low:high]), prompts.name)
        cost = k * (high - low)
        for name, values in score_some(alive, part, _part_of(progress, done / total, cost / total)).items():
            width = len(harmful) if name == "ablation_refusal" else len(harmless)
            whole = scores.setdefault(name, torch.zeros((n, width), dtype=values.dtype))
            whole[alive, low : low + values.shape[1]] = values
        n_pairs[alive] = high
        done += cost
    return Scored(scores, n_pairs)


def _part_of(progress: Progress, start: float, share: float) -> Progress:
    """Report a part's progress as that of the whole."""
    return lambda done: progress(start + share * done)
