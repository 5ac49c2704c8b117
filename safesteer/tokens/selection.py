"""Safety tokens S: the few output tokens that steering moves (paper section 3.3, steps 4 and 5).

`sampling.py` takes steps 1 to 3: it samples answers and says which positions count. Then, with
Delta_j(v) = log pt(v) - log p0(v) at position j:

4. Ban special tokens and tokens whose mean pt over counting positions is below a threshold.
5. Every counting position votes for its top K' allowed tokens by Delta; S = the K most voted.

The vocabulary is read three times, a few rows at a time: for the means, for the votes, and for the
contexts and the coverage of what was selected.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError, expect
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.logits import generalized_kl_terms
from safesteer.models.templates import control_ids
from safesteer.prompts.conversation import PromptLike
from safesteer.prompts.prompt_set import load_prompts
from safesteer.settings import TokenConfig
from safesteer.steering.direction import Direction
from safesteer.tokens.sampling import AnswerStates, logp_rows, sample_answers
from safesteer.tokens.token_set import Context, SafetyToken, TokenSet


@torch.no_grad()
def select_tokens(
    chat: ModelLike,
    direction: Direction,
    prompts: Sequence[PromptLike] | None = None,
    config: TokenConfig | None = None,
    *,
    sampled: AnswerStates | None = None,
) -> TokenSet:
    """Select the safety tokens S: those that steering lifts where the model answers (section 3.3).

    Deterministic for a seed; votes that tie are ordered by mean Delta, then by id.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        direction: Makes the teacher of `chat`.
        prompts: What is answered; None: the val split of the project's own prompts, harmless or harmful
            as `config.prompts` says.
        config: Settings of stage 2; None: the defaults.
        sampled: Answers from `sample_answers` with the same horizon, to select again under other settings.

    Returns:
        At most `config.k` tokens in order of selection, each with its votes, mean Delta (nats),
        probabilities and contexts; and the coverage of the set.

    Raises:
        SafeSteerError: Where no position counts, or no token may be selected.

    Example:
        >>> config = ss.TokenConfig(k=10, horizon=3, n_samples=2, min_steered_prob=1e-4)
        >>> tokens = ss.select_tokens(chat, direction, ["Hello", "Name a river."], config)
        >>> len(tokens)
        10
        >>> tokens.to_frame().votes.is_monotonic_decreasing
        True
    """
    chat, config = as_chat(chat), config or TokenConfig()
    expect(TokenConfig, config)
    if sampled is None:
        prompts = load_prompts().split("val").texts(config.prompts) if prompts is None else prompts
        sampled = sample_answers(chat, direction, prompts, config)
    elif sampled.valid.shape[1] != config.horizon:
        raise SafeSteerError(
            f"The answers were sampled with a horizon of {sampled.valid.shape[1]}, and the settings have"
            f" {config.horizon}: give both the same."
        )
    means = _means(chat, sampled)
    allowed = _allowed(chat, means, config)
    votes = _votes(chat, sampled, allowed, config)
    ids = _rank(means, votes.sum(0), allowed, config)
    contexts, coverage = _contexts_and_coverage(chat, sampled, ids, config.n_contexts)
    tokens = tuple(
        SafetyToken(
            id=v,
            text=chat.decode([v]),
            votes=int(votes[:, v].sum()),
            votes_by_position=tuple(votes[:, v].tolist()),
            mean_delta=float(means.delta[v]),
            p_base=float(means.p_base[v]),
            p_steered=float(means.p_steered[v]),
            contexts=of_token,
        )
        for v, of_token in zip(ids, contexts, strict=True)
    )
    return TokenSet(tokens, asdict(config), coverage, int(sampled.valid.sum()))


class _Means(NamedTuple):
    """Means over the counting positions, in float64."""

    p_steered: Float[Tensor, " d_vocab"]
    p_base: Float[Tensor, " d_vocab"]
    delta: Float[Tensor, " d_vocab"]  # nats


def _means(chat: ChatModel, sampled: AnswerStates) -> _Means:
    n = int(sampled.valid.sum())
    if n == 0:
        raise SafeSteerError(
            "No position of the sampled answers counts: the base model ends every answer at once."
        )
    p_steered, p_base, delta = torch.zeros((3, chat.d_vocab), dtype=torch.float64, device=chat.device)
    for _, _, logp_t, logp_0 in logp_rows(chat, sampled):
        p_steered += logp_t.exp().sum(0, dtype=torch.float64)
        p_base += logp_0.exp().sum(0, dtype=torch.float64)
        delta += (logp_t - logp_0).sum(0, dtype=torch.float64)
    if not bool((p_steered + p_base).isfinite().all()):
        raise SafeSteerError(
            f"The probabilities of '{chat.name}', steered or not, are not finite: lower the coefficient, or"
            " load the model in float32."
        )
    return _Means(p_steered / n, p_base / n, delta / n)


def banned_ids(chat: ChatModel) -> Bool[Tensor, " d_vocab"]:
    """Mark the tokens that can never be selected: special and control ones, those with "<|", padding rows."""
    tokenizer, n = chat.tokenizer, chat.d_vocab
    banned = torch.zeros(n, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    banned[[i for i in control_ids(tokenizer) if i < n]] = True
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(n, len(tokenizer)))))
    banned[[i for i, piece in enumerate(pieces) if piece is None or "<|" in piece]] = True
    return banned


def _allowed(chat: ChatModel, means: _Means, config: TokenConfig) -> Bool[Tensor, " d_vocab"]:
    """Apply step 4."""
    allowed = ~(banned_ids(chat).to(chat.device) | (means.p_steered < config.min_steered_prob))
    if not bool(allowed.any()):
        raise SafeSteerError(
            f"No token has a mean steered probability of {config.min_steered_prob:g} or more: lower"
            " min_steered_prob."
        )
    return allowed


def _votes(
    chat: ChatModel, sampled: AnswerStates, allowed: Bool[Tensor, " d_vocab"], config: TokenConfig
) -> Int[Tensor, "horizon d_vocab"]:
    """Count the votes that each token gets at each step of the answers."""
    d_vocab, k_vote, banned = chat.d_vocab, min(config.k_vote, int(allowed.sum())), ~allowed
    votes = torch.zeros((config.horizon, d_vocab), dtype=torch.long, device=chat.device)
    for _, step, logp_t, logp_0 in logp_rows(chat, sampled):
        delta = (logp_t - logp_0).masked_fill_(banned, -torch.inf)
        top = delta.topk(k_vote, dim=-1).indices
        flat = (step[:, None].to(chat.device) * d_vocab + top).flatten()
        votes += torch.bincount(flat, minlength=votes.numel()).view_as(votes)
    return votes


def _rank(
    means: _Means, votes: Int[Tensor, " d_vocab"], allowed: Bool[Tensor, " d_vocab"], config: TokenConfig
) -> list[int]:
    """Order tokens by votes (or by mean Delta), then by mean Delta, then by id; return the first K."""
    by_votes = config.method == "vote"
    score = votes.double() if by_votes else means.delta
    pool = torch.nonzero(allowed & (votes > 0) if by_votes else allowed).flatten().tolist()
    return sorted(pool, key=lambda v: (-float(score[v]), -float(means.delta[v]), v))[: config.k]


class _Place(NamedTuple):
    """One position where a token is lifted. Places sort by lift, the rise of its probability."""

    lift: float
    row: int
    step: int
    p_base: float
    p_steered: float


def _contexts_and_coverage(
    chat: ChatModel, sampled: AnswerStates, ids: list[int], n_contexts: int
) -> tuple[list[tuple[Context, ...]], dict[str, float]]:
    """Return the places of strongest lift of each selected token, and the coverage of their set."""
    places: list[list[_Place]] = [[] for _ in ids]
    columns, first = torch.tensor(ids, device=chat.device), _first_places(sampled).to(chat.device)
    kl_inside = kl = mass_t = mass_0 = 0.0
    for row, step, logp_t, logp_0 in logp_rows(chat, sampled):
        # Generalized terms are >= 0 for every token, so shares of a part lie in 0..1.
        terms = generalized_kl_terms(logp_t, logp_0)
        kl += float(terms.sum())
        kl_inside += float(terms[:, columns].sum())
        pt, p0 = logp_t[:, columns].exp(), logp_0[:, columns].exp()
        mass_t, mass_0 = mass_t + float(pt.sum()), mass_0 + float(p0.sum())
        fresh = first[row, step]
        lift = (pt - p0).masked_fill(~fresh[:, None], -torch.inf)
        top = lift.topk(min(n_contexts, int(fresh.sum())), dim=0).indices
        for column, best in enumerate(top.T.tolist()):
            for i in best:
                a, b = pt[i, column], p0[i, column]
                places[column].append(_Place(float(a - b), int(row[i]), int(step[i]), float(b), float(a)))
    contexts = [
        tuple(_context(chat, sampled, place) for place in sorted(of_token, reverse=True)[:n_contexts])
        for of_token in places
    ]
    n = int(sampled.valid.sum())
    coverage = {
        "kl_share": kl_inside / kl if kl > 0 else 0.0,
        "mass_teacher": mass_t / n,
        "mass_base": mass_0 / n,
        "kl_per_position": kl / n,
    }
    return contexts, coverage


def _first_places(sampled: AnswerStates) -> Bool[Tensor, "rows horizon"]:
    """Mark each place once: samples of one prompt that begin alike share their first places."""
    seen: set[tuple] = set()
    first = torch.zeros_like(sampled.valid)
    for row, step in sampled.valid.nonzero().tolist():
        place = (repr(sampled.prompts[row]), *sampled.completion_ids[row, :step].tolist())
        first[row, step] = place not in seen
        seen.add(place)
    return first


def _context(chat: ChatModel, sampled: AnswerStates, place: _Place) -> Context:
    answer_so_far = chat.decode(sampled.completion_ids[place.row, : place.step].tolist())
    return Context(sampled.prompts[place.row], answer_so_far, place.p_base, place.p_steered)
