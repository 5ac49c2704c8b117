"""Safety tokens S: the few output tokens that steering moves (paper section 3.3).

1. Sample N continuations of H tokens from the steered teacher on harmless prompts (T = 1).
2. Score the same tokens with and without steering: Delta_j(v) = log pt(v) - log p0(v).
3. A position counts until p0's argmax has been an end-of-turn token, or the sample has ended.
4. Ban special tokens and tokens whose mean pt over counting positions is below a threshold.
5. Every counting position votes for its top K' allowed tokens by Delta; S = the K most voted.

Memory is O(vocabulary): samples are kept as final hidden states (rows x d_model) and turned into
logits a few rows at a time, once for the means and once for the votes.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, output_head
from safesteer.models.forward import final_hidden, prefill
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.logits import generalized_kl_terms, logits_of
from safesteer.settings import TokenConfig
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.token_set import Context, SafetyToken, TokenSet

ROWS = 32  # rows of (row x vocabulary) log-probabilities alive at once


@dataclass(frozen=True, eq=False)
class AnswerStates:
    """Sampled steps: final hidden states of teacher and base, and which positions count."""

    teacher: Float[Tensor, "rows horizon d_model"]
    base: Float[Tensor, "rows horizon d_model"]
    completion_ids: Int[Tensor, "rows horizon"]
    valid: Bool[Tensor, "rows horizon"]
    prompts: tuple[str, ...]  # one a row


@torch.no_grad()
def sample_answers(
    chat: ChatModel, direction: Direction, prompts: Sequence[str], config: TokenConfig
) -> AnswerStates:
    """Step 1 and 2: sample from teacher (or base), then read both on the same tokens."""
    parts, owners = [], []
    eos = torch.tensor(chat.eos_ids, device=chat.device)
    source = (lambda: steer(chat, direction)) if config.rollouts == "teacher" else nullcontext
    for rows, batch in chat.batched(prompts, config.batch_size):
        drawn = [uniforms((config.seed, i), config.n_samples, config.horizon) for i in rows]
        with source():
            ids = generate_ids(
                chat,
                batch,
                max_new_tokens=config.horizon,
                temperature=1.0,
                n_samples=config.n_samples,
                uniform=torch.cat(drawn),
            )
        if ids.shape[1] < config.horizon:  # every sample ended early
            missing = config.horizon - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, missing), value=chat.eos_ids[0])
        ended = torch.isin(ids, eos)
        valid = ended.cumsum(1) - ended.long() == 0
        with steer(chat, direction):
            teacher = _step_hidden(chat, batch, ids)
        parts.append((teacher, _step_hidden(chat, batch, ids), ids, valid))
        owners += [prompts[i] for i in rows for _ in range(config.n_samples)]
    teacher, base, ids, valid = (torch.cat(part) for part in zip(*parts, strict=True))
    weight, bias, softcap = output_head(chat.model)
    for at in torch.arange(len(ids)).split(ROWS):
        top = torch.stack([logits_of(h, weight, bias, softcap).argmax(-1) for h in base[at].unbind(1)], 1)
        valid[at] &= torch.isin(top, eos).cumsum(1) == 0
    return AnswerStates(teacher, base, ids, valid, tuple(owners))


def _step_hidden(
    chat: ChatModel, batch: PromptBatch, ids: Int[Tensor, "rows horizon"]
) -> Float[Tensor, "rows horizon d_model"]:
    """Hidden states that predict each id. A prompt is read once, however many samples it has."""
    full, upto = batch.extended(ids), batch.prompt_ids.shape[1] - 1
    cache = prefill(chat.model, batch, upto, len(ids) // len(batch.prompt_ids))
    return final_hidden(chat.model, full, cache)[:, :-1]


def logp_rows(
    chat: ChatModel, sampled: AnswerStates
) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " n"], Tensor, Tensor]]:
    """Counting positions, a few rows at a time: (row, step, log pt, log p0), each over V."""
    head = output_head(chat.model)
    row, step = sampled.valid.nonzero(as_tuple=True)
    for at in torch.arange(len(row)).split(ROWS):
        r, j = row[at], step[at]
        yield (
            r,
            j,
            logits_of(sampled.teacher[r, j], *head).log_softmax(-1),
            logits_of(sampled.base[r, j], *head).log_softmax(-1),
        )


def banned_ids(chat: ChatModel) -> Bool[Tensor, " d_vocab"]:
    """Tokens that can never be selected: special ones, those holding "<|", and padding rows."""
    tokenizer, n = chat.tokenizer, chat.d_vocab
    banned = torch.zeros(n, dtype=torch.bool)
    banned[len(tokenizer) :] = True  # type: ignore[arg-type]
    banned[[i for i in tokenizer.all_special_ids if i < n]] = True  # type: ignore[attr-defined]
    pieces = tokenizer.convert_ids_to_tokens(range(min(n, len(tokenizer))))  # type: ignore[attr-defined,arg-type]
    banned[[i for i, piece in enumerate(pieces) if piece is None or "<|" in piece]] = True
    return banned


@torch.no_grad()
def select_tokens(
    chat: ChatModel,
    direction: Direction,
    prompts: Sequence[str],
    config: TokenConfig | None = None,
    *,
    sampled: AnswerStates | None = None,
) -> TokenSet:
    """Select S on `prompts` (section 3.3). `sampled` reuses rollouts under other settings.

    Deterministic for a seed; votes that tie are ordered by mean delta, then by id. Raises
    SafeSteerError where no position counts or no token may be selected.
    """
    config = config or TokenConfig()
    sampled = sampled or sample_answers(chat, direction, prompts, config)
    n, n_vocab, device = int(sampled.valid.sum()), chat.d_vocab, chat.device
    if n == 0:
        raise SafeSteerError(
            "No position of the sampled answers counts: the base model ends every answer at once."
        )
    wide = {"dtype": torch.float64, "device": device}
    p_steered, p_base, delta = (torch.zeros(n_vocab, **wide) for _ in range(3))
    for _, _, logp_t, logp_0 in logp_rows(chat, sampled):
        p_steered += logp_t.exp().sum(0, dtype=torch.float64)
        p_base += logp_0.exp().sum(0, dtype=torch.float64)
        delta += (logp_t - logp_0).sum(0, dtype=torch.float64)
    p_steered, p_base, delta = p_steered / n, p_base / n, delta / n

    banned = banned_ids(chat).to(device) | (p_steered < config.min_steered_prob)
    n_allowed = int((~banned).sum())
    if n_allowed == 0:
        raise SafeSteerError(
            f"No token has a mean steered probability of {config.min_steered_prob:g} or more: lower"
            " min_steered_prob."
        )
    k_vote = min(config.k_vote, n_allowed)
    votes = torch.zeros((config.horizon, n_vocab), dtype=torch.long, device=device)
    for _, step, logp_t, logp_0 in logp_rows(chat, sampled):
        lift = (logp_t - logp_0).masked_fill_(banned, -torch.inf)
        top = lift.topk(k_vote, dim=-1).indices
        flat = (step[:, None].to(device) * n_vocab + top).flatten()
        votes += torch.bincount(flat, minlength=votes.numel()).view_as(votes)

    total = votes.sum(0)
    score = total.double() if config.method == "vote" else delta.masked_fill(banned, -torch.inf)
    pool = torch.nonzero(~banned & (total > 0 if config.method == "vote" else True)).flatten().tolist()
    ranked = sorted(pool, key=lambda v: (-float(score[v]), -float(delta[v]), v))[: config.k]
    contexts, coverage = _explain(chat, sampled, torch.tensor(ranked, device=device), config.n_contexts)
    tokens = tuple(
        SafetyToken(
            id=v,
            text=chat.tokenizer.decode([v]),  # type: ignore[attr-defined]
            votes=int(total[v]),
            votes_by_position=tuple(votes[:, v].tolist()),
            mean_delta=float(delta[v]),
            p_base=float(p_base[v]),
            p_steered=float(p_steered[v]),
            contexts=tuple(found),
        )
        for v, found in zip(ranked, contexts, strict=True)
    )
    return TokenSet(tokens, asdict(config), coverage, n)


def _explain(
    chat: ChatModel, sampled: AnswerStates, ids: Int[Tensor, " n_set"], n_contexts: int
) -> tuple[list[list[Context]], dict]:
    """For each selected token the places of strongest lift; for the set its coverage."""
    best: list[list[tuple[float, int, int, float, float]]] = [[] for _ in ids]
    inside = everywhere = mass_t = mass_0 = 0.0
    for row, step, logp_t, logp_0 in logp_rows(chat, sampled):
        # Generalized terms are >= 0 for every token, so shares of a part lie in 0..1.
        terms = generalized_kl_terms(logp_t, logp_0)
        everywhere += float(terms.sum())
        inside += float(terms[:, ids].sum())
        pt, p0 = logp_t[:, ids].exp(), logp_0[:, ids].exp()
        mass_t, mass_0 = mass_t + float(pt.sum()), mass_0 + float(p0.sum())
        top = (pt - p0).topk(min(n_contexts, len(row)), dim=0).indices
        for column, found in enumerate(top.T.tolist()):
            best[column] += [
                (
                    float(pt[i, column] - p0[i, column]),
                    int(row[i]),
                    int(step[i]),
                    float(p0[i, column]),
                    float(pt[i, column]),
                )
                for i in found
            ]
    contexts = []
    for places in best:
        chosen = []
        for _, row, step, p0, pt in sorted(places, reverse=True)[:n_contexts]:
            so_far = chat.tokenizer.decode(sampled.completion_ids[row, :step].tolist())  # type: ignore[attr-defined]
            chosen.append(Context(sampled.prompts[row], so_far, p0, pt))
        contexts.append(chosen)
    n = int(sampled.valid.sum())
    coverage = {
        "kl_share": inside / everywhere if everywhere > 0 else 0.0,
        "mass_teacher": mass_t / n,
        "mass_base": mass_0 / n,
        "kl_per_position": everywhere / n,
    }
    return contexts, coverage
