"""Would other prompts, other samples or another horizon have chosen the same tokens?

Jaccard similarity |A & B| / |A | B| of the first K tokens that two groups of positions choose, as a
function of K:
  prompts    random halves of the prompts against each other
  samples    random halves of every prompt's samples: the same prompts, another random seed
  seeds      whole selections from rollouts with other seeds, where they are given
  horizon h  the first h steps against all of them
No new generation: the groups are cut out of rollouts that exist. `chance` is what two random sets
of K allowed tokens would share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Bool
from torch import Tensor

from safesteer.attribution.coverage import Range, range_of
from safesteer.attribution.votes import Means, allowed_ids, group_rankings
from safesteer.models.chat_model import ChatModel
from safesteer.tokens.selection import AnswerStates
from safesteer.tokens.token_set import TokenConfig


@dataclass(frozen=True)
class StabilityCurve:
    """Jaccard for each K over `n_pairs` comparisons."""

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


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """1 for equal sets, 0 for disjoint ones (and for two empty ones: nothing was found again)."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 0.0


def stability(
    chat: ChatModel,
    sampled: AnswerStates,
    config: TokenConfig,
    *,
    ks: Sequence[int] = (5, 10, 20, 30, 50, 75, 100, 150, 200),
    n_splits: int = 8,
    seed: int = 0,
    others: Sequence[AnswerStates] = (),
) -> tuple[Stability, list[int], Means]:
    """Stability of S, with the ranking and the means of all positions together (used elsewhere).

    `others` are rollouts of the same prompts with other seeds; by default none is generated.
    """
    prompt_of = _prompt_index(sampled)
    groups, names = _groups(sampled, prompt_of, n_splits, seed)
    rankings, means = group_rankings(chat, sampled, groups, config, max(ks))
    allowed = int(allowed_ids(chat, means, config).sum())
    ks = [k for k in sorted(set(ks)) if k <= max(1, len(rankings[0]))] or [1]
    curves = []
    for name, pairs in names.items():
        if pairs:
            rows = [[jaccard(rankings[a][:k], rankings[b][:k]) for k in ks] for a, b in pairs]
            curves.append(StabilityCurve(name, len(pairs), range_of(rows)))
    if others:
        whole = [rankings[0]]
        for other in others:
            everything = torch.ones((*other.valid.shape, 1), dtype=torch.bool)
            whole.append(group_rankings(chat, other, everything, config, max(ks))[0][0])
        rows = [[jaccard(a[:k], b[:k]) for k in ks] for a, b in combinations(whole, 2)]
        curves.append(StabilityCurve("seeds", len(rows), range_of(rows)))
    chance = tuple(k / (2 * allowed - k) if k < allowed else 1.0 for k in ks)
    n_prompts = int(prompt_of.max()) + 1
    return Stability(tuple(ks), tuple(curves), chance, n_prompts), rankings[0], means


def _prompt_index(sampled: AnswerStates) -> Tensor:
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(p, len(numbers)) for p in sampled.prompts])


def _groups(
    sampled: AnswerStates, prompt_of: Tensor, n_splits: int, seed: int
) -> tuple[Bool[Tensor, "rows horizon groups"], dict[str, list[tuple[int, int]]]]:
    """Membership of each position in each group, and which groups are compared."""
    rows, horizon = sampled.valid.shape
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.ones((rows, horizon), dtype=torch.bool)]
    names: dict[str, list[tuple[int, int]]] = {"prompts": [], "samples": []}

    def compare(name: str, half: Tensor) -> None:
        names[name].append((len(columns), len(columns) + 1))
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
                mine = (prompt_of == p).nonzero()[:, 0]
                half[mine[torch.randperm(len(mine), generator=generator)[: len(mine) // 2]]] = True
            compare("samples", half)
    step = torch.arange(horizon)
    for h in range(1, horizon):
        names[f"horizon {h}"] = [(len(columns), 0)]
        columns.append((step < h)[None].expand(rows, horizon))
    return torch.stack(columns, -1), names
