"""The token view: one answer, read by the base model, the steered teacher and the student.

1. Teacher-force prompt + answer through each model. The hidden state at position t - 1 predicts
   the token at position t, so row t of every number below belongs to token t of the answer.
2. Per token: probability and rank under each model, lift = log p_steered - log p_base (nats).
3. Per position: the generalized KL(teacher || base), whose parts per token are >= 0 (`logits.py`), so the
   parts on S and off S add up to the whole; `kl_share` is the part on S.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from rich.table import Table
from rich.text import Text
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._token_text import readable, token_text, visible
from safesteer.models.adapter import without_student
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import generalized_kl_terms, logits_of
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.token_set import TokenSet

MIN_KL = 1e-6  # nats; below it a position's divergence is rounding, and a share of it is noise
N_TOP = 5  # alternatives per position and model


@dataclass(frozen=True)
class Alternative:
    """A token that a model might say instead: id, text, probability."""

    id: int
    text: str
    p: float


@dataclass(frozen=True)
class TraceToken:
    """One token of an answer. Probabilities 0..1, ranks from 1, lift and kl in nats.

    `kl` is the generalized KL(teacher || base) of the whole position, `kl_share` (0..1) the part
    of it that lies on safety tokens. "steered" is the teacher. The student's fields are None where
    there is no student.
    """

    id: int
    text: str
    p_base: float
    p_steered: float
    p_student: float | None
    rank_base: int
    rank_steered: int
    rank_student: int | None
    lift: float
    kl: float
    kl_share: float
    in_s: bool
    top_base: tuple[Alternative, ...]
    top_steered: tuple[Alternative, ...]
    top_student: tuple[Alternative, ...]


@dataclass(frozen=True, repr=False)
class Trace:
    """An answer token by token. `author` wrote the answer ("base", "teacher", "student")."""

    prompt: str
    label: str
    author: str
    tokens: tuple[TraceToken, ...]

    @property
    def text(self) -> str:
        """The answer as far as it was read."""
        return "".join(t.text for t in self.tokens)

    def __repr__(self) -> str:
        return f"Trace({self.author}, {len(self.tokens)} tokens: {self.text[:60]!r})"

    def to_frame(self) -> pd.DataFrame:
        """Return one row per token, without the alternatives."""
        columns = [c for c in TraceToken.__dataclass_fields__ if not c.startswith("top_")]
        return pd.DataFrame([{c: getattr(t, c) for c in columns} for t in self.tokens], columns=columns)

    def _repr_html_(self) -> str:
        """Colour by lift: orange where steering raises the token, blue where it lowers it."""
        spans = []
        for t in self.tokens:
            rgb = "217,119,6" if t.lift > 0 else "37,99,235"
            line = ";border-bottom:2px solid currentColor" if t.in_s else ""
            facts = f"base {t.p_base:.3g}, steered {t.p_steered:.3g}"
            if t.p_student is not None:
                facts += f", student {t.p_student:.3g}"
            facts += f"; lift {t.lift:+.2f} nats; KL {t.kl:.2f} nats, {t.kl_share:.0%} on S"
            spans.append(
                f'<bdi title="{html.escape(f"{visible(t.text)} | {facts}")}" style="background:'
                f'rgba({rgb},{min(abs(t.lift) / 5, 1) * 0.6:.2f}){line}">'
                f"{html.escape(readable(t.text))}</bdi>"
            )
        return (
            f'<div style="line-height:2"><div><b>{html.escape(self.author)}</b> answers '
            f"<i><bdi>{html.escape(readable(self.prompt))}</bdi></i></div>"
            f'<div style="font-family:monospace;white-space:pre-wrap">{"".join(spans)}</div>'
            "<small>orange: steering raises the token, blue: it lowers it; underlined: in S</small>"
            "</div>"
        )

    def __rich__(self) -> Table:
        table = Table(title=Text(f"{self.author}: {visible(self.prompt)[:80]}"))
        for name in ("token", "base", "steered", "student", "lift, nats", "KL, nats", "on S", "S"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for t in self.tokens:
            student = "" if t.p_student is None else f"{t.p_student:.3f}"
            colour = "dark_orange" if t.lift > 0.5 else "blue" if t.lift < -0.5 else ""
            table.add_row(
                Text(visible(t.text)),
                f"{t.p_base:.3f}",
                f"{t.p_steered:.3f}",
                student,
                Text(f"{t.lift:+.2f}", style=colour),
                f"{t.kl:.2f}",
                f"{t.kl_share:.0%}",
                "yes" if t.in_s else "",
            )
        return table


def answer_ids(chat: ChatModel, answer: str | Sequence[int], max_tokens: int) -> list[int]:
    """Return an answer's first `max_tokens` token ids; ids pass through unchanged."""
    ids = chat.encode(answer) if isinstance(answer, str) else answer
    return list(ids)[:max_tokens]


def trace(
    chat: ModelLike,
    direction: Direction,
    tokens: TokenSet,
    prompts: Sequence[PromptLike],
    answers: Sequence[str | Sequence[int]],
    student: ModelLike | None = None,
    *,
    authors: Sequence[str] | None = None,
    max_tokens: int = 32,
) -> tuple[Trace, ...]:
    """Read each answer with the base model, the steered teacher and the student.

    Args:
        chat: The base model; with the direction added it is the teacher.
        direction: The steering direction.
        tokens: The safety tokens S.
        prompts: The requests.
        answers: One answer per prompt, as text or token ids. Nothing is generated.
        student: The distilled model, if there is one.
        authors: Who wrote each answer, for display.
        max_tokens: Tokens read per answer.

    Returns:
        One trace per answer; an answer without a token gives an empty one. `lift` of a token is
        log p_steered - log p_base, in nats.

    Raises:
        SafeSteerError: For a direction or safety tokens of another model, or another number of answers or
            authors than of prompts.

    Example:
        >>> from safesteer.attribution.tracing import trace
        >>> (answer,) = trace(chat, direction, tokens, ["How do I pick a lock?"], ["I cannot help"])
        >>> answer.text
        'I cannot help'
        >>> answer.to_frame()[["text", "p_base", "p_steered", "lift"]].shape[1]
        4
    """
    chat, student = as_chat(chat), None if student is None else as_chat(student)
    tokens.check(chat)
    prompts = as_prompts(prompts)
    names = authors or [""] * len(prompts)
    if isinstance(answers, str) or not len(prompts) == len(answers) == len(names):
        raise SafeSteerError(
            f"A trace needs one answer per prompt, and an author for each or none: {len(prompts)} prompts,"
            f" {1 if isinstance(answers, str) else len(answers)} answers, {len(names)} authors."
        )
    traces = []
    for prompt, answer, author in zip(prompts, answers, names, strict=True):
        ids = answer_ids(chat, answer, max_tokens)
        shown = _read_answer(chat, direction, tokens, prompt, ids, student) if ids else ()
        traces.append(Trace(prompt, "", author, shown))
    return tuple(traces)


@torch.no_grad()
def answer_logps(
    chat: ChatModel, prompt: PromptLike, answers: Sequence[Sequence[int]]
) -> list[Float[Tensor, "_ d_vocab"]]:
    """Read answers to one prompt in one pass; steering that is on applies.

    Returns:
        Per answer log p(. | prompt, answer so far) in nats, float32 on the CPU: row t predicts its token t.
    """
    head, logps = output_head(chat.model), {}
    for rows, batch in chat.batched([prompt] * len(answers), len(answers), continuations=answers):
        for i, states in zip(rows, final_hidden(chat.model, batch), strict=True):
            before = states[-len(answers[i]) - 1 : -1]
            logps[i] = logits_of(before, *head).log_softmax(-1).float().cpu()
    return [logps[i] for i in range(len(answers))]


def _read_answer(
    chat: ChatModel,
    direction: Direction,
    tokens: TokenSet,
    prompt: str,
    ids: list[int],
    student: ChatModel | None,
) -> tuple[TraceToken, ...]:
    """Take step 1 for one answer."""
    with without_student(chat, student):
        (base,) = answer_logps(chat, prompt, [ids])
        with steer(chat, direction):
            (steered,) = answer_logps(chat, prompt, [ids])
    taught = None if student is None else answer_logps(student, prompt, [ids])[0]
    return trace_tokens(chat, tokens, ids, base, steered, taught)


def trace_tokens(
    chat: ChatModel,
    tokens: TokenSet,
    ids: Sequence[int],
    base: Float[Tensor, "n d_vocab"],
    steered: Float[Tensor, "n d_vocab"],
    student: Float[Tensor, "n d_vocab"] | None = None,
    *,
    n_top: int = N_TOP,
) -> tuple[TraceToken, ...]:
    """Measure an answer's tokens (steps 2 and 3) from the log-probabilities of all models.

    Args:
        chat: Whose tokens they are.
        tokens: The safety tokens S.
        ids: The tokens.
        base: Log-probabilities of the base that predict each token, in nats, float32 on the CPU.
        steered: The same of the steered base.
        student: The same of the student, if there is one.
        n_top: Alternatives per token and model.
    """
    at = torch.arange(len(ids))
    read_base, read_steered = _measure(chat, base, ids, n_top), _measure(chat, steered, ids, n_top)
    taught = _Reading([None] * len(ids), [None] * len(ids), [()] * len(ids))
    if student is not None:
        taught = _measure(chat, student, ids, n_top)

    lift = (steered - base)[at, list(ids)].tolist()
    terms = generalized_kl_terms(steered, base).clamp(min=0)
    kl, inside = terms.sum(-1), terms[:, tokens.ids.cpu()].sum(-1)
    share = torch.where(kl > MIN_KL, inside / kl.clamp(min=MIN_KL), 0.0).clamp(0, 1).tolist()
    in_s = set(tokens.ids.tolist())
    return tuple(
        TraceToken(
            id=token,
            text=token_text(chat.tokenizer, token),
            p_base=read_base.p[t],
            p_steered=read_steered.p[t],
            p_student=taught.p[t],
            rank_base=read_base.rank[t],
            rank_steered=read_steered.rank[t],
            rank_student=taught.rank[t],
            lift=lift[t],
            kl=max(0.0, float(kl[t])),
            kl_share=share[t],
            in_s=token in in_s,
            top_base=read_base.top[t],
            top_steered=read_steered.top[t],
            top_student=taught.top[t],
        )
        for t, token in enumerate(ids)
    )


class _Reading(NamedTuple):
    """Probability and rank (1 = most probable) of each answer token, and the top alternatives."""

    p: list
    rank: list
    top: list[tuple[Alternative, ...]]


def _measure(chat: ChatModel, logp: Float[Tensor, "n d_vocab"], ids: Sequence[int], n_top: int) -> _Reading:
    chosen = logp[torch.arange(len(ids)), list(ids)]
    rank = (logp > chosen[:, None]).sum(-1) + 1
    top = logp.topk(min(n_top, logp.shape[-1]), -1)
    alternatives = [
        tuple(Alternative(v, token_text(chat.tokenizer, v), p) for v, p in zip(row, ps, strict=True))
        for row, ps in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    ]
    return _Reading(chosen.exp().tolist(), rank.tolist(), alternatives)
