"""Would other prompts, other samples or another horizon have chosen the same tokens?

Jaccard similarity |A & B| / |A | B| of the first K tokens that two subsets of the positions choose, as a
function of K:
  prompts    random halves of the prompts against each other
  samples    random halves of every prompt's samples: the same prompts, another random seed
  horizon h  the first h steps against all of them
Nothing is generated again: the subsets are cut out of samples that exist. `chance` is what two random sets
of K allowed tokens would share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safesteer.attribution.coverage import KS, Range, range_of
from safesteer.attribution.votes import Means, allowed_ids, subset_rankings
from safesteer.models.chat_model import ChatModel
from safesteer.settings import TokenConfig
from safesteer.tokens.sampling import AnswerStates


@dataclass(frozen=True)
class StabilityCurve:
    """Jaccard similarity for each K, over `n_pairs` comparisons."""

    name: str
    n_pairs: int
    jaccard: Range


@dataclass(frozen=True)
class Stability:
    """Curves over `ks`; `chance` is the expected overlap of two random sets (0..1)."""

    ks: tuple[int, ...]
    curves: tuple[StabilityCurve, ...]
    chance: tuple[float, ...]
    n_prompts: int


@dataclass(frozen=True, eq=False)
class Reselection:
    """Stability of S, with the ranking and the means of all positions together."""

    stability: Stability
    ranking: list[int]
    means: Means


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Return 1 for equal sets, 0 for disjoint ones (and for two empty ones: nothing was chosen twice)."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 0.0


def measure_stability(
    chat: ChatModel,
    sampled: AnswerStates,
    config: TokenConfig,
    *,
    ks: Sequence[int] = KS,
    n_splits: int = 8,
    seed: int = 0,
) -> Reselection:
    """Select S again from subsets of the sampled answers, and compare.

    Args:
        chat: The base model.
        sampled: Answers of the steered teacher on the selection's prompts.
        config: The settings of the selection.
        ks: Sizes of S at which two selections are compared.
        n_splits: Random halvings of the prompts, and as many of the samples.
        seed: Seed of the halvings.
    """
    prompt_of = _prompt_index(sampled)
    subsets, comparisons = _subsets(sampled, prompt_of, n_splits, seed)
    rankings, means = subset_rankings(chat, sampled, subsets, config, max(ks))
    n_allowed = int(allowed_ids(chat, means, config).sum())
    ks = [k for k in sorted(set(ks)) if k <= max(1, len(rankings[0]))] or [1]
    curves = []
    for name, pairs in comparisons.items():
        if pairs:
            rows = [[jaccard(rankings[a][:k], rankings[b][:k]) for k in ks] for a, b in pairs]
            curves.append(StabilityCurve(name, len(pairs), range_of(rows)))
    chance = tuple(k / (2 * n_allowed - k) if k < n_allowed else 1.0 for k in ks)
    n_prompts = int(prompt_of.max()) + 1
    return Reselection(Stability(tuple(ks), tuple(curves), chance, n_prompts), rankings[0], means)


def _prompt_index(sampled: AnswerStates) -> Int[Tensor, " rows"]:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(p, len(numbers)) for p in sampled.prompts])


def _subsets(
    sampled: AnswerStates, prompt_of: Int[Tensor, " rows"], n_splits: int, seed: int
) -> tuple[Bool[Tensor, "rows horizon subsets"], dict[str, list[tuple[int, int]]]]:
    """Return which positions each subset holds, and which subsets are compared."""
    rows, horizon = sampled.valid.shape
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.ones((rows, horizon), dtype=torch.bool)]
    comparisons: dict[str, list[tuple[int, int]]] = {"prompts": [], "samples": []}

    def compare(name: str, half: Tensor) -> None:
        comparisons[name].append((len(columns), len(columns) + 1))
        columns.extend([half[:, None].expand(rows, horizon), ~half[:, None].expand(rows, horizon)])

    n_prompts = int(prompt_of.max()) + 1
    if n_prompts > 1:
        for _ in range(n_splits):
            order = torch.randperm(n_prompts, generator=generator)
            compare("prompts", torch.isin(prompt_of, order[: n_prompts // 2]))
    if rows > n_prompts:
        for _ in range(n_splits):
            half = torch.zeros(rows, dtype=torch.bool)
            for p in range(n_prompts):
                samples = (prompt_of == p).nonzero()[:, 0]
                half[samples[torch.randperm(len(samples), generator=generator)[: len(samples) // 2]]] = True
            compare("samples", half)
    step = torch.arange(horizon)
    for h in range(1, horizon):
        comparisons[f"horizon {h}"] = [(len(columns), 0)]
        columns.append((step < h)[None].expand(rows, horizon))
    return torch.stack(columns, -1), comparisons
