"""Why a token is in S: where it was voted for, what was said there, and who writes it.

1. One pass over the counting positions, looking at S only: did the position vote for the token
   (is it among the position's top K' by lift), its probability and rank under base and teacher.
2. Direct contribution: steering adds c = coeff * d to the residual stream. What that part alone
   does to the token's logit, if the final norm keeps the steered scale s of the position:
   W_v (norm weight * c / s). The rest of the logit's change is what the layers between add. Logits
   matter only up to a constant, so both numbers are relative to the mean over the vocabulary.
3. Neighbours: the nearest rows of the unembedding by cosine; and the group (`groups.py`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._token_text import token_text
from safesteer.attribution.word_groups import by_cluster, check_override, group_of
from safesteer.models.chat_model import ChatModel, final_norm, output_head
from safesteer.models.forward import final_hidden
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.selection import AnswerStates, logp_rows
from safesteer.tokens.token_set import TokenConfig, TokenSet


@dataclass(frozen=True)
class Place:
    """A position that voted for the token: what came before, its step (from 1), p and rank."""

    prompt: str
    answer_so_far: str
    step: int
    p_base: float
    p_teacher: float
    rank_base: int
    rank_teacher: int


@dataclass(frozen=True)
class PromptVotes:
    """How many positions of one prompt's samples voted for the token."""

    prompt: str
    votes: int


@dataclass(frozen=True)
class Why:
    """The story of one token of S.

    `votes`, probabilities, ranks and places are over the `n_positions` read here, which may be
    fewer than selection used. Probabilities are means and ranks medians over the positions that
    voted (None without a vote). `direct` and `change` are logits (nats), relative to the mean over
    the vocabulary, averaged over the last positions of `n_prompts_logit` prompts.
    """

    id: int
    text: str
    group: str
    group_reason: str
    n_positions: int
    votes: int
    votes_by_step: tuple[int, ...]
    votes_by_prompt: tuple[PromptVotes, ...]
    n_prompts_voting: int
    n_prompts: int
    p_base: float | None
    p_teacher: float | None
    rank_base: float | None
    rank_teacher: float | None
    places: tuple[Place, ...]
    direct: float
    change: float
    neighbours: tuple[tuple[str, float], ...]

    @property
    def later_layers(self) -> float:
        """What the layers after the steered one add to the logit's change."""
        return self.change - self.direct


@dataclass(frozen=True, eq=False)
class _Vote:
    row: int
    step: int
    p_base: float
    p_teacher: float
    rank_base: int
    rank_teacher: int


@torch.no_grad()
def why(
    base: ChatModel,
    direction: Direction,
    tokens: TokenSet,
    sampled: AnswerStates,
    config: TokenConfig,
    allowed: Bool[Tensor, " d_vocab"],
    *,
    n_places: int = 5,
    n_prompts: int = 8,
    n_neighbours: int = 6,
    groups: Mapping[str | int, str] | None = None,
) -> dict[int, Why]:
    """The story of every token of S, by id. `allowed` are the tokens that may receive votes.

    `groups` overrides the rules: token text or id -> group.
    """
    check_override(groups or {})
    votes = _votes(base, tokens.ids, sampled, config, allowed)
    texts = list(dict.fromkeys(sampled.prompts))
    direct, change = logit_parts(base, direction, tokens.ids, texts[:n_prompts])
    near = neighbours(base, tokens.ids, n_neighbours)
    n_positions, horizon = int(sampled.valid.sum()), sampled.valid.shape[1]
    found, names = {}, [token_text(base.tokenizer, token) for token in tokens.ids.tolist()]
    rules = [
        group_of(token, text, close, groups)
        for token, text, close in zip(tokens.ids.tolist(), names, near, strict=True)
    ]
    grouped = by_cluster(rules, _contexts(sampled, votes), _centred_rows(base, tokens.ids))
    for column, token in enumerate(tokens.ids.tolist()):
        mine = votes[column]
        steps = Counter(v.step for v in mine)
        by_prompt = Counter(sampled.prompts[v.row] for v in mine)
        best = sorted(mine, key=lambda v: v.p_base - v.p_teacher)
        group, reason = grouped[column]
        found[token] = Why(
            id=token,
            text=names[column],
            group=group,
            group_reason=reason,
            n_positions=n_positions,
            votes=len(mine),
            votes_by_step=tuple(steps.get(j, 0) for j in range(horizon)),
            votes_by_prompt=tuple(PromptVotes(p, n) for p, n in by_prompt.most_common(n_prompts)),
            n_prompts_voting=len(by_prompt),
            n_prompts=len(texts),
            p_base=_mean([v.p_base for v in mine]),
            p_teacher=_mean([v.p_teacher for v in mine]),
            rank_base=float(median(v.rank_base for v in mine)) if mine else None,
            rank_teacher=float(median(v.rank_teacher for v in mine)) if mine else None,
            places=_places(base, sampled, best, n_places),
            direct=float(direct[column]),
            change=float(change[column]),
            neighbours=tuple(near[column]),
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _contexts(sampled: AnswerStates, votes: Sequence[Sequence[_Vote]]) -> Float[Tensor, "n_set d_model"]:
    """Mean steered hidden state of each token's voting positions, about the mean of all that count."""
    middle = sampled.teacher[sampled.valid].mean(0)
    means = [
        sampled.teacher[[v.row for v in mine], [v.step for v in mine]].mean(0) - middle
        if mine
        else torch.zeros_like(middle)
        for mine in votes
    ]
    return torch.stack(means)


def _centred_rows(base: ChatModel, ids: Int[Tensor, " n_set"]) -> Float[Tensor, "n_set d_model"]:
    weight = output_head(base.model)[0][: len(base.tokenizer)]  # type: ignore[arg-type]
    return weight[ids.to(base.device)].float() - weight.float().mean(0)


def _places(
    base: ChatModel, sampled: AnswerStates, best: Sequence[_Vote], n_places: int
) -> tuple[Place, ...]:
    """The strongest places, at most one a (prompt, answer so far)."""
    found: dict[tuple[str, str], Place] = {}
    for v in best:
        prompt = sampled.prompts[v.row]
        so_far = base.tokenizer.decode(sampled.completion_ids[v.row, : v.step].tolist())  # type: ignore[attr-defined]
        place = Place(prompt, so_far, v.step + 1, v.p_base, v.p_teacher, v.rank_base, v.rank_teacher)
        found.setdefault((prompt, so_far), place)
        if len(found) == n_places:
            break
    return tuple(found.values())


def _votes(
    base: ChatModel,
    ids: Int[Tensor, " n_set"],
    sampled: AnswerStates,
    config: TokenConfig,
    allowed: Bool[Tensor, " d_vocab"],
) -> list[list[_Vote]]:
    """Step 1: for each token of S the positions that voted for it."""
    ids, hidden = ids.to(base.device), ~allowed.to(base.device)
    k_vote = max(1, min(config.k_vote, int(allowed.sum())))
    found: list[list[_Vote]] = [[] for _ in ids]
    for row, step, logp_t, logp_0 in logp_rows(base, sampled):
        lift = (logp_t - logp_0).masked_fill_(hidden, -torch.inf)
        last_in = lift.topk(k_vote, -1).values[:, -1:]
        voted = lift[:, ids] >= last_in
        for column, token in enumerate(ids.tolist()):
            at = voted[:, column].nonzero()[:, 0]
            t, b = logp_t[at], logp_0[at]
            p_t, p_0 = t[:, token : token + 1], b[:, token : token + 1]
            numbers = zip(
                row[at].tolist(),
                step[at].tolist(),
                p_0[:, 0].exp().tolist(),
                p_t[:, 0].exp().tolist(),
                ((b > p_0).sum(-1) + 1).tolist(),
                ((t > p_t).sum(-1) + 1).tolist(),
                strict=True,
            )
            found[column] += [_Vote(*n) for n in numbers]
    return found


@contextmanager
def _before_norm(chat: ChatModel) -> Iterator[list[Tensor]]:
    """Collects the last position's residual stream, as the final norm reads it."""
    seen: list[Tensor] = []
    norm = final_norm(chat.model)
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1].float()))
    try:
        yield seen
    finally:
        handle.remove()


def _spread(norm, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """What the norm divides by: root mean square, about the mean for a LayerNorm."""
    x = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
    return x.pow(2).mean(-1).sqrt()


@torch.no_grad()
def logit_parts(
    base: ChatModel, direction: Direction, ids: Int[Tensor, " n_set"], prompts: Sequence[str]
) -> tuple[Float[Tensor, " n_set"], Float[Tensor, " n_set"]]:
    """Step 2: (direct part, whole change) of each token's logit when steering, in nats.

    At the last position of each prompt, averaged over prompts; relative to the vocabulary's mean;
    before any soft-capping. A norm's output does not depend on its input's scale, so
    weight * c / s is norm(c) * spread(c) / s.
    """
    rows = _centred_rows(base, ids)
    norm = final_norm(base.model)
    added = (direction.coeff * direction.vector).to(base.device).float()
    # Scaled up so that the norm's epsilon does not count, and without a LayerNorm's bias.
    shaped = norm(added * 1e3).float() - norm(torch.zeros_like(added)).float()
    direct, change = torch.zeros(len(ids)), torch.zeros(len(ids))
    for at, batch in base.batched(prompts, 8):
        last = {}
        for steered in (False, True):
            with steer(base, direction) if steered else nullcontext(), _before_norm(base) as seen:
                last[steered] = final_hidden(base.model, batch)[:, -1].float()
        scale = _spread(norm, added) / _spread(norm, seen[-1])
        direct += (scale[:, None] * (rows @ shaped)).sum(0).cpu()
        change += ((last[True] - last[False]) @ rows.T).sum(0).cpu()
    return direct / len(prompts), change / len(prompts)


@torch.no_grad()
def neighbours(chat: ChatModel, ids: Int[Tensor, " n_set"], n: int) -> list[list[tuple[str, float]]]:
    """Step 3: the n nearest unembedding rows of each token by cosine, itself left out."""
    weight = output_head(chat.model)[0][: len(chat.tokenizer)].float()  # type: ignore[arg-type]
    unit = torch.nn.functional.normalize(weight, dim=-1)
    ids = ids.to(unit.device)
    cosine = unit[ids] @ unit.T
    cosine[torch.arange(len(ids)), ids] = -torch.inf
    top = cosine.topk(min(n, cosine.shape[1] - 1), -1)
    return [
        [(token_text(chat.tokenizer, v), c) for v, c in zip(row, cosines, strict=True)]
        for row, cosines in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
