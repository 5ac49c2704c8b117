"""Votes of several subsets of the positions in one streaming pass, and the ranking each would give.

A subset of the counting positions is, for example, half of the prompts, half of the samples, or the
first h steps. With a 0/1 membership matrix M [positions x subsets],
1. means:  M^T p_steered and M^T (log p_steered - log p_base), both [subsets x vocabulary];
2. votes:  M^T X, where X [positions x vocabulary] marks each position's top K' tokens by lift.
Memory is O(subsets x vocabulary). Each subset ranks as `select_tokens` does: votes, then mean delta,
then id, of the tokens whose mean p_steered within the subset reaches the threshold.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer.models.chat_model import ChatModel
from safesteer.settings import TokenConfig
from safesteer.tokens.sampling import AnswerStates, logp_rows
from safesteer.tokens.selection import banned_ids


@dataclass(frozen=True, eq=False)
class Means:
    """Per subset: positions, mean p_steered and mean lift (nats); and mean p_base over everything."""

    n: Float[Tensor, " subsets"]
    p_steered: Float[Tensor, "subsets d_vocab"]
    delta: Float[Tensor, "subsets d_vocab"]
    p_base: Float[Tensor, " d_vocab"]


@torch.no_grad()
def subset_means(
    chat: ChatModel, sampled: AnswerStates, subsets: Bool[Tensor, "rows horizon subsets"]
) -> Means:
    """Return mean probabilities and mean lift of every token, per subset (step 1)."""
    shape = (subsets.shape[-1], chat.d_vocab)
    p_steered, delta = torch.zeros(shape), torch.zeros(shape)
    p_base, n = torch.zeros(chat.d_vocab, dtype=torch.float64), torch.zeros(subsets.shape[-1])
    for row, step, logp_steered, logp_base in logp_rows(chat, sampled):
        member = subsets[row.cpu(), step.cpu()].float()
        lift = logp_steered - logp_base
        p_base += logp_base.exp().sum(0, dtype=torch.float64).cpu()
        delta += (member.T.to(lift) @ lift).cpu()
        p_steered += (member.T.to(lift) @ logp_steered.exp()).cpu()
        n += member.sum(0)
    count = n.clamp(min=1)[:, None]
    return Means(n, p_steered / count, delta / count, (p_base / sampled.valid.sum().cpu()).float())


def allowed_ids(chat: ChatModel, means: Means, config: TokenConfig) -> Bool[Tensor, " d_vocab"]:
    """Return which tokens may be selected. Subset 0 must hold every counting position."""
    return ~banned_ids(chat) & (means.p_steered[0] >= config.min_steered_prob)


@torch.no_grad()
def subset_rankings(
    chat: ChatModel,
    sampled: AnswerStates,
    subsets: Bool[Tensor, "rows horizon subsets"],
    config: TokenConfig,
    n_best: int,
) -> tuple[list[list[int]], Means]:
    """Rank each subset's best `n_best` token ids in order of selection. Subset 0 must be everything.

    A position's top K' is taken among the tokens that all positions together allow; the subset's
    own threshold is applied when it ranks.
    """
    means = subset_means(chat, sampled, subsets)
    allowed = allowed_ids(chat, means, config)
    k_vote = max(1, min(config.k_vote, int(allowed.sum())))
    votes = torch.zeros((subsets.shape[-1], chat.d_vocab))
    if config.method == "vote":
        hidden = ~allowed.to(chat.device)
        for row, step, logp_steered, logp_base in logp_rows(chat, sampled):
            lift = (logp_steered - logp_base).masked_fill_(hidden, -torch.inf)
            marks = torch.zeros_like(lift).scatter_(-1, lift.topk(k_vote, -1).indices, 1.0)
            votes += (subsets[row.cpu(), step.cpu()].to(lift).T @ marks).cpu()
    rankings = []
    for g in range(subsets.shape[-1]):
        score = votes[g] if config.method == "vote" else means.delta[g]
        eligible = allowed & (means.p_steered[g] >= config.min_steered_prob)
        eligible &= votes[g] > 0 if config.method == "vote" else True
        rankings.append(_best(score, means.delta[g], eligible, n_best))
    return rankings, means


def _best(
    score: Float[Tensor, " d_vocab"],
    delta: Float[Tensor, " d_vocab"],
    eligible: Bool[Tensor, " d_vocab"],
    n_best: int,
) -> list[int]:
    pool: Int[Tensor, " n"] = eligible.nonzero()[:, 0]
    if len(pool) > n_best:  # everything that ties with the last place stays in the pool
        pool = pool[score[pool] >= score[pool].topk(n_best).values[-1]]
    ranked = sorted(pool.tolist(), key=lambda v: (-float(score[v]), -float(delta[v]), v))
    return ranked[:n_best]
