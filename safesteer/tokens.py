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
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from safesteer.directions import Direction, steer
from safesteer.divergence import logits_of
from safesteer.errors import SafeSteerError
from safesteer.files import read_json, write_json
from safesteer.generation import generate_ids, uniforms
from safesteer.models import ChatModel, final_hidden, output_head, prefill
from safesteer.prompts import PromptBatch, batches
from safesteer.settings import AT_LEAST_1, SHARE, check_settings

ROWS = 32  # rows of (row x vocabulary) log-probabilities alive at once


@dataclass(frozen=True)
class TokenConfig:
    """How S is selected. Defaults are the paper's for a small model (section 3.3)."""

    k: int = 50
    k_vote: int = 200
    horizon: int = 7
    n_samples: int = 8
    min_steered_prob: float = 1e-6
    method: Literal["vote", "mean"] = "vote"
    rollouts: Literal["teacher", "base"] = "teacher"
    prompts: Literal["harmless", "harmful"] = "harmless"
    seed: int = 0
    batch_size: int = 2  # prompts sampled at once: n_samples caches each
    n_contexts: int = 3

    def __post_init__(self) -> None:
        sizes = ("k", "k_vote", "horizon", "n_samples", "batch_size")
        check_settings(self, "tokens", {**dict.fromkeys(sizes, AT_LEAST_1), "min_steered_prob": SHARE})


@dataclass(frozen=True)
class Context:
    """One place where a token was lifted: what came before, and its probability there."""

    prompt: str
    answer_so_far: str
    p_base: float
    p_steered: float


@dataclass(frozen=True)
class SafetyToken:
    """A selected token and why: votes, mean log-ratio (nats), mean probabilities, examples."""

    id: int
    text: str
    votes: int
    votes_by_position: tuple[int, ...]
    mean_delta: float
    p_base: float
    p_steered: float
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True, repr=False)
class TokenSet:
    """The safety tokens in order of selection, with the settings that chose them.

    `coverage` says how much of what steering changes lies inside S, over counting positions:
    kl_share (of KL(teacher || base), generalized so that the parts add up), mass_teacher and
    mass_base (probability on S).
    """

    tokens: tuple[SafetyToken, ...]
    settings: dict
    coverage: dict
    n_positions: int

    @cached_property
    def ids(self) -> Int[Tensor, " n_set"]:
        return torch.tensor([t.id for t in self.tokens])

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        shown = " ".join(repr(t.text) for t in self.tokens[:10])
        return f"TokenSet({len(self)} tokens from {self.n_positions} positions: {shown} ...)"

    def to_frame(self) -> pd.DataFrame:
        columns = ["id", "text", "votes", "mean_delta", "p_base", "p_steered", "votes_by_position"]
        rows = [{c: getattr(t, c) for c in columns} for t in self.tokens]
        return pd.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        frame = self.to_frame().assign(text=[repr(t.text) for t in self.tokens])
        return frame.to_html(escape=True, index=False, float_format="{:.3g}".format)

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self)} safety tokens from {self.n_positions} positions")
        for name in ("token", "votes", "mean lift, nats", "p base", "p steered", "votes by step"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for t in self.tokens:
            numbers = str(t.votes), f"{t.mean_delta:+.2f}", f"{t.p_base:.2g}", f"{t.p_steered:.2g}"
            table.add_row(Text(repr(t.text)), *numbers, " ".join(map(str, t.votes_by_position)))
        return table

    def save(self, path: str | Path) -> None:
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "TokenSet":
        try:
            return cls.of(read_json(Path(path)))
        except (KeyError, TypeError) as error:
            raise SafeSteerError(f"{path} is not a token file of this version.") from error

    @classmethod
    def of(cls, raw: dict) -> "TokenSet":
        """From the plain values that `save` writes."""
        tokens = tuple(
            SafetyToken(
                **{
                    **t,
                    "votes_by_position": tuple(t["votes_by_position"]),
                    "contexts": tuple(Context(**c) for c in t["contexts"]),
                }
            )
            for t in raw["tokens"]
        )
        return cls(tokens, raw["settings"], raw["coverage"], raw["n_positions"])


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Sampled steps: final hidden states of teacher and base, and which positions count."""

    teacher: Float[Tensor, "rows horizon d_model"]
    base: Float[Tensor, "rows horizon d_model"]
    completion_ids: Int[Tensor, "rows horizon"]
    valid: Bool[Tensor, "rows horizon"]
    prompts: tuple[str, ...]  # one a row


@torch.no_grad()
def rollouts(chat: ChatModel, direction: Direction, prompts: Sequence[str], config: TokenConfig) -> Rollouts:
    """Step 1 and 2: sample from teacher (or base), then read both on the same tokens."""
    parts, owners = [], []
    eos = torch.tensor(chat.eos_ids, device=chat.device)
    source = (lambda: steer(chat, direction)) if config.rollouts == "teacher" else nullcontext
    for rows in batches(chat.tokenizer, prompts, config.batch_size):
        batch = PromptBatch.of(chat.tokenizer, [prompts[i] for i in rows], device=chat.device)
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
    return Rollouts(teacher, base, ids, valid, tuple(owners))


def _step_hidden(
    chat: ChatModel, batch: PromptBatch, ids: Int[Tensor, "rows horizon"]
) -> Float[Tensor, "rows horizon d_model"]:
    """Hidden states that predict each id. A prompt is read once, however many samples it has."""
    full, upto = batch.extended(ids), batch.prompt_ids.shape[1] - 1
    cache = prefill(chat.model, batch, upto, len(ids) // len(batch.prompt_ids))
    return final_hidden(chat.model, full, cache)[:, :-1]


def logp_rows(
    chat: ChatModel, sampled: Rollouts
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
    sampled: Rollouts | None = None,
) -> TokenSet:
    """Select S on `prompts` (section 3.3). `sampled` reuses rollouts under other settings.

    Deterministic for a seed; votes that tie are ordered by mean delta, then by id. Raises
    SafeSteerError where no position counts or no token may be selected.
    """
    config = config or TokenConfig()
    sampled = sampled or rollouts(chat, direction, prompts, config)
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
    chat: ChatModel, sampled: Rollouts, ids: Int[Tensor, " n_set"], n_contexts: int
) -> tuple[list[list[Context]], dict]:
    """For each selected token the places of strongest lift; for the set its coverage."""
    best: list[list[tuple[float, int, int, float, float]]] = [[] for _ in ids]
    inside = everywhere = mass_t = mass_0 = 0.0
    for row, step, logp_t, logp_0 in logp_rows(chat, sampled):
        # Generalized terms are >= 0 for every token, so shares of a part lie in 0..1.
        terms = logp_t.exp() * (logp_t - logp_0) - logp_t.exp() + logp_0.exp()
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
