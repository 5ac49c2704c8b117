"""Why a token is in S: where it was voted for, what came before it there, and which layers write it.

1. One pass over the counting positions, looking at S only: did the position vote for the token
   (is it among the position's top K' by lift), its probability and rank under base and teacher.
2. Direct contribution: steering adds c = coeff * d to the residual stream. What that part alone
   does to the token's logit, if the final norm keeps the steered scale s of the position:
   W_v (norm weight * c / s). The rest of the logit's change is what the layers between add. Logits
   matter only up to a constant, so both numbers are relative to the mean over the vocabulary.
3. Neighbours: the nearest rows of the unembedding by cosine; and the group (`word_groups.py`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safesteer._token_text import token_text
from safesteer.attribution.word_groups import by_cluster, group_of
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.head import normed, output_head
from safesteer.models.parts import final_norm
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.sampling import AnswerStates, logp_rows
from safesteer.tokens.token_set import Context, TokenSet

N_PLACES = 5  # strongest places per token
N_PROMPTS = 8  # prompts that logits are read on, and prompts listed per token
N_NEIGHBOURS = 6


@dataclass(frozen=True)
class Place(Context):
    """A position that voted for the token: a context with its step (from 1) and the token's ranks."""

    step: int
    rank_base: int
    rank_steered: int


@dataclass(frozen=True)
class PromptVotes:
    """Number of positions of one prompt's samples that voted for the token."""

    prompt: str
    votes: int


@dataclass(frozen=True)
class TokenStory:
    """The story of one token of S.

    `votes`, `lift`, probabilities, ranks and places are over the `n_positions` read here, which may be
    fewer than selection used. Lift and probabilities are means and ranks medians over the positions that
    voted (None without a vote). `direct` and `change` are logits (nats), relative to the mean over
    the vocabulary, averaged over the last positions of up to N_PROMPTS prompts. `direct` is None where the
    direction is clamped or ablated: then no vector is added whose own part could be read.
    """

    id: int
    text: str
    group: str
    group_reason: str
    n_positions: int
    votes: int
    votes_by_position: tuple[int, ...]
    votes_by_prompt: tuple[PromptVotes, ...]
    n_prompts_voting: int
    n_prompts: int
    lift: float | None
    p_base: float | None
    p_steered: float | None
    rank_base: float | None
    rank_steered: float | None
    places: tuple[Place, ...]
    direct: float | None
    change: float
    neighbours: tuple[tuple[str, float], ...]

    @property
    def later_layers(self) -> float | None:
        """What the layers after the steered one add to the logit's change, in nats."""
        return None if self.direct is None else self.change - self.direct


@dataclass(frozen=True, eq=False)
class _Vote:
    row: int
    step: int
    lift: float
    p_base: float
    p_steered: float
    rank_base: int
    rank_steered: int


@torch.no_grad()
def token_stories(
    chat: ModelLike,
    direction: Direction,
    tokens: TokenSet,
    sampled: AnswerStates,
    allowed: Bool[Tensor, " d_vocab"],
    *,
    k_vote: int,
) -> dict[int, TokenStory]:
    """Tell the story of every token of S.

    Args:
        chat: The base model.
        direction: The steering direction.
        tokens: The safety tokens S.
        sampled: Answers of the steered teacher, as selection samples them.
        allowed: The tokens that may receive votes.
        k_vote: Tokens that each position votes for.

    Returns:
        A story per token id, in the order of S.
    """
    chat, ids = as_chat(chat), tokens.ids.tolist()
    votes = _votes(chat, tokens.ids, sampled, allowed, k_vote)
    prompts = list(dict.fromkeys(sampled.prompts))
    direct, change = logit_parts(chat, direction, tokens.ids, prompts[:N_PROMPTS])
    near = neighbours(chat, tokens.ids, N_NEIGHBOURS)
    texts = [token_text(chat.tokenizer, token) for token in ids]
    by_rule = [group_of(text, close) for text, close in zip(texts, near, strict=True)]
    groups = by_cluster(by_rule, _contexts(sampled, votes), _centred_rows(chat, tokens.ids))
    stories = {}
    for column, token in enumerate(ids):
        voted, (group, reason) = votes[column], groups[column]
        steps = Counter(v.step for v in voted)
        by_prompt = Counter(sampled.prompts[v.row] for v in voted)
        stories[token] = TokenStory(
            id=token,
            text=texts[column],
            group=group,
            group_reason=reason,
            n_positions=int(sampled.valid.sum()),
            votes=len(voted),
            votes_by_position=tuple(steps.get(j, 0) for j in range(sampled.valid.shape[1])),
            votes_by_prompt=tuple(PromptVotes(p, n) for p, n in by_prompt.most_common(N_PROMPTS)),
            n_prompts_voting=len(by_prompt),
            n_prompts=len(prompts),
            lift=_mean([v.lift for v in voted]),
            p_base=_mean([v.p_base for v in voted]),
            p_steered=_mean([v.p_steered for v in voted]),
            rank_base=float(median(v.rank_base for v in voted)) if voted else None,
            rank_steered=float(median(v.rank_steered for v in voted)) if voted else None,
            places=_places(chat, sampled, voted),
            direct=None if direct is None else float(direct[column]),
            change=float(change[column]),
            neighbours=tuple(near[column]),
        )
    return stories


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _contexts(sampled: AnswerStates, votes: Sequence[Sequence[_Vote]]) -> Float[Tensor, "n_set d_model"]:
    """Return the mean steered hidden state over the positions that voted for each token, centred."""
    centre = sampled.teacher[sampled.valid].mean(0)
    means = [
        sampled.teacher[[v.row for v in voted], [v.step for v in voted]].mean(0) - centre
        if voted
        else torch.zeros_like(centre)
        for voted in votes
    ]
    return torch.stack(means)


def _centred_rows(chat: ChatModel, ids: Int[Tensor, " n_set"]) -> Float[Tensor, "n_set d_model"]:
    """Return the unembedding rows of `ids` relative to the mean over the real vocabulary."""
    weight = output_head(chat.model)[0][: len(chat.tokenizer)]
    return weight[ids.to(chat.device)].float() - weight.float().mean(0)


def _places(chat: ChatModel, sampled: AnswerStates, voted: Sequence[_Vote]) -> tuple[Place, ...]:
    """Return the places of largest rise in probability, at most one per (prompt, answer so far)."""
    places: dict[tuple[str, str], Place] = {}
    for v in sorted(voted, key=lambda v: v.p_base - v.p_steered):
        prompt = sampled.prompts[v.row]
        so_far = chat.decode(sampled.completion_ids[v.row, : v.step].tolist())
        place = Place(prompt, so_far, v.p_base, v.p_steered, v.step + 1, v.rank_base, v.rank_steered)
        places.setdefault((prompt, so_far), place)
        if len(places) == N_PLACES:
            break
    return tuple(places.values())


def _votes(
    chat: ChatModel,
    ids: Int[Tensor, " n_set"],
    sampled: AnswerStates,
    allowed: Bool[Tensor, " d_vocab"],
    k_vote: int,
) -> list[list[_Vote]]:
    """Return for each token of S the positions that voted for it (step 1)."""
    ids, hidden = ids.to(chat.device), ~allowed.to(chat.device)
    k_vote = max(1, min(k_vote, int(allowed.sum())))
    votes: list[list[_Vote]] = [[] for _ in ids]
    for row, step, logp_steered, logp_base in logp_rows(chat, sampled):
        lift = (logp_steered - logp_base).masked_fill_(hidden, -torch.inf)
        last_in = lift.topk(k_vote, -1).values[:, -1:]
        voted = lift[:, ids] >= last_in
        for column, token in enumerate(ids.tolist()):
            at = voted[:, column].nonzero()[:, 0]
            steered, base = logp_steered[at], logp_base[at]
            of_steered, of_base = steered[:, token : token + 1], base[:, token : token + 1]
            numbers = zip(
                row[at].tolist(),
                step[at].tolist(),
                lift[at, token].tolist(),
                of_base[:, 0].exp().tolist(),
                of_steered[:, 0].exp().tolist(),
                ((base > of_base).sum(-1) + 1).tolist(),
                ((steered > of_steered).sum(-1) + 1).tolist(),
                strict=True,
            )
            votes[column] += [_Vote(*n) for n in numbers]
    return votes


@contextmanager
def _before_norm(chat: ChatModel) -> Iterator[list[Tensor]]:
    """Collect the last position's residual stream, as the final norm reads it."""
    seen: list[Tensor] = []
    norm = final_norm(chat.model)
    handle = norm.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][:, -1].to(chat.device).float())
    )
    try:
        yield seen
    finally:
        handle.remove()


def _spread(norm: nn.Module, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Return what the norm divides by: root mean square, about the mean for a LayerNorm."""
    x = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    return x.pow(2).mean(-1).sqrt()


@torch.no_grad()
def logit_parts(
    chat: ChatModel, direction: Direction, ids: Int[Tensor, " n_set"], prompts: Sequence[str]
) -> tuple[Float[Tensor, " n_set"] | None, Float[Tensor, " n_set"]]:
    """Return (direct part, total change) of each token's logit when steering, in nats (step 2).

    At the last position of each prompt, averaged over prompts; relative to the vocabulary's mean; before any
    soft-capping. The direct part is None where the direction is not added. A norm's output does not depend on
    its input's scale, so weight * c / s is norm(c) * spread(c) / s.
    """
    rows = output_head(chat.model).scale * _centred_rows(chat, ids)
    norm = final_norm(chat.model)
    added = (direction.coeff * direction.vector).to(chat.device).float()
    # Scaled up so that the norm's epsilon does not count, and without a LayerNorm's bias.
    shaped = normed(chat.model, added * 1e3) - normed(chat.model, torch.zeros_like(added))
    direct, change = torch.zeros(len(ids)), torch.zeros(len(ids))
    for _, batch in chat.batched(prompts, 8):
        with _before_norm(chat) as seen:
            unsteered = final_hidden(chat.model, batch)[:, -1].float()
            with steer(chat, direction):
                steered = final_hidden(chat.model, batch)[:, -1].float()
        scale = _spread(norm, added) / _spread(norm, seen[-1])
        direct += (scale[:, None] * (rows @ shaped)).sum(0).cpu()
        change += ((steered - unsteered) @ rows.T).sum(0).cpu()
    return direct / len(prompts) if direction.operation == "add" else None, change / len(prompts)


@torch.no_grad()
def neighbours(chat: ChatModel, ids: Int[Tensor, " n_set"], n: int) -> list[list[tuple[str, float]]]:
    """Return (text, cosine) of the n nearest unembedding rows of each token, itself left out (step 3)."""
    weight = output_head(chat.model)[0][: len(chat.tokenizer)].float()
    unit = torch.nn.functional.normalize(weight, dim=-1)
    ids = ids.to(unit.device)
    cosine = unit[ids] @ unit.T
    cosine[torch.arange(len(ids)), ids] = -torch.inf
    top = cosine.topk(min(n, cosine.shape[1] - 1), -1)
    return [
        [(token_text(chat.tokenizer, v), c) for v, c in zip(row, cosines, strict=True)]
        for row, cosines in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
