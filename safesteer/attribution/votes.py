"""Votes of several groups of positions in one streaming pass, and the ranking each would give.

A group is any subset of the counting positions: half of the prompts, half of the samples, the
first h steps. With a 0/1 membership matrix M [positions x groups],
1. means:  M^T pt and M^T (log pt - log p0), both [groups x vocabulary];
2. votes:  M^T X, where X [positions x vocabulary] marks each position's top K' tokens by lift.
Memory is O(groups x vocabulary). Each group ranks as `select_tokens` does: votes, then mean delta,
then id, of the tokens whose mean pt within the group reaches the threshold.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer.models.chat_model import ChatModel
from safesteer.tokens.selection import AnswerStates, banned_ids, logp_rows
from safesteer.tokens.token_set import TokenConfig


@dataclass(frozen=True, eq=False)
class Means:
    """Per group: positions, mean pt and mean log pt - log p0 (nats); and p0 over everything."""

    n: Float[Tensor, " groups"]
    p_steered: Float[Tensor, "groups d_vocab"]
    delta: Float[Tensor, "groups d_vocab"]
    p_base: Float[Tensor, " d_vocab"]


@torch.no_grad()
def group_means(chat: ChatModel, sampled: AnswerStates, groups: Bool[Tensor, "rows horizon groups"]) -> Means:
    shape = (groups.shape[-1], chat.d_vocab)
    p_steered, delta = torch.zeros(shape), torch.zeros(shape)
    p_base, n = torch.zeros(chat.d_vocab, dtype=torch.float64), torch.zeros(groups.shape[-1])
    for row, step, logp_t, logp_0 in logp_rows(chat, sampled):
        member = groups[row.cpu(), step.cpu()].float()
        lift = logp_t - logp_0
        p_base += logp_0.exp().sum(0, dtype=torch.float64).cpu()
        delta += (member.T.to(lift) @ lift).cpu()
        p_steered += (member.T.to(lift) @ logp_t.exp()).cpu()
        n += member.sum(0)
    count = n.clamp(min=1)[:, None]
    return Means(n, p_steered / count, delta / count, (p_base / sampled.valid.sum().cpu()).float())


def allowed_ids(chat: ChatModel, means: Means, config: TokenConfig) -> Bool[Tensor, " d_vocab"]:
    """Tokens that may be selected. Group 0 must hold every counting position."""
    return ~banned_ids(chat) & (means.p_steered[0] >= config.min_steered_prob)


@torch.no_grad()
def group_rankings(
    chat: ChatModel,
    sampled: AnswerStates,
    groups: Bool[Tensor, "rows horizon groups"],
    config: TokenConfig,
    n_best: int,
    means: Means | None = None,
) -> tuple[list[list[int]], Means]:
    """Each group's best `n_best` token ids in order of selection. Group 0 must be everything.

    A position's top K' is taken among the tokens that all positions together allow; the group's
    own threshold is applied when it ranks.
    """
    means = means or group_means(chat, sampled, groups)
    allowed = allowed_ids(chat, means, config)
    k_vote = max(1, min(config.k_vote, int(allowed.sum())))
    votes = torch.zeros((groups.shape[-1], chat.d_vocab))
    if config.method == "vote":
        hidden = ~allowed.to(chat.device)
        for row, step, logp_t, logp_0 in logp_rows(chat, sampled):
            lift = (logp_t - logp_0).masked_fill_(hidden, -torch.inf)
            marks = torch.zeros_like(lift).scatter_(-1, lift.topk(k_vote, -1).indices, 1.0)
            votes += (groups[row.cpu(), step.cpu()].to(lift).T @ marks).cpu()
    rankings = []
    for g in range(groups.shape[-1]):
        score = votes[g] if config.method == "vote" else means.delta[g]
        may = allowed & (means.p_steered[g] >= config.min_steered_prob)
        may &= votes[g] > 0 if config.method == "vote" else True
        rankings.append(_best(score, means.delta[g], may, n_best))
    return rankings, means


def _best(
    score: Float[Tensor, " d_vocab"],
    delta: Float[Tensor, " d_vocab"],
    may: Bool[Tensor, " d_vocab"],
    n_best: int,
) -> list[int]:
    pool: Int[Tensor, " n"] = may.nonzero()[:, 0]
    if len(pool) > n_best:  # everything that ties with the last place stays in the pool
        pool = pool[score[pool] >= score[pool].topk(n_best).values[-1]]
    ranked = sorted(pool.tolist(), key=lambda v: (-float(score[v]), -float(delta[v]), v))
    return ranked[:n_best]
