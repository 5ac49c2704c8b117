"""The token view: one given answer, read by the base model, the steered teacher and the student.

1. Teacher-force prompt + answer through each model. The hidden state at position t - 1 predicts
   the token at position t, so row t of every number below belongs to token t of the answer.
2. Per token: probability and rank under each model, lift = log pt - log p0 (nats).
3. Per position: generalized KL(teacher || base), sum over v of pt log(pt / p0) - pt + p0. Every
   term is >= 0, so the parts on S and off S add up to the whole; `kl_share` is the part on S.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from rich.table import Table
from rich.text import Text
from torch import Tensor

from safesteer._token_text import readable, token_text, visible
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, output_head
from safesteer.models.forward import final_hidden
from safesteer.models.logits import logits_of
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.token_set import TokenSet

MIN_KL = 1e-6  # nats; below it a position's divergence is rounding, and a share of it is noise


@dataclass(frozen=True)
class Alternative:
    """A token that a model would rather say: id, text, probability."""

    id: int
    text: str
    p: float


@dataclass(frozen=True)
class TraceToken:
    """One token of an answer. Probabilities 0..1, ranks from 1, lift and kl in nats.

    `kl` is the generalized KL(teacher || base) of the whole position, `kl_share` (0..1) the part
    of it that lies on safety tokens. The student's fields are None where there is no student.
    """

    id: int
    text: str
    p_base: float
    p_teacher: float
    p_student: float | None
    rank_base: int
    rank_teacher: int
    rank_student: int | None
    lift: float
    kl: float
    kl_share: float
    in_s: bool
    top_base: tuple[Alternative, ...]
    top_teacher: tuple[Alternative, ...]
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
        return "".join(t.text for t in self.tokens)

    def __repr__(self) -> str:
        return f"Trace({self.author}, {len(self.tokens)} tokens: {self.text[:60]!r})"

    def to_frame(self) -> pd.DataFrame:
        """A row for each token, without the alternatives."""
        skipped = ("top_base", "top_teacher", "top_student")
        columns = [c for c in TraceToken.__dataclass_fields__ if c not in skipped]
        return pd.DataFrame([{c: getattr(t, c) for c in columns} for t in self.tokens], columns=columns)

    def _repr_html_(self) -> str:
        """Coloured by lift: orange where steering raises the token, blue where it lowers it."""
        spans = []
        for t in self.tokens:
            rgb = "217,119,6" if t.lift > 0 else "37,99,235"
            line = ";border-bottom:2px solid currentColor" if t.in_s else ""
            facts = f"base {t.p_base:.3g}, steered {t.p_teacher:.3g}"
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
                f"{t.p_teacher:.3f}",
                student,
                Text(f"{t.lift:+.2f}", style=colour),
                f"{t.kl:.2f}",
                f"{t.kl_share:.0%}",
                "yes" if t.in_s else "",
            )
        return table


def answer_ids(tokenizer, answer: str | Sequence[int], max_tokens: int) -> list[int]:
    """An answer's token ids, cut to `max_tokens`; ids pass through unchanged."""
    ids = answer
    if isinstance(answer, str):
        ids = tokenizer(answer, add_special_tokens=False).input_ids
    return list(ids)[:max_tokens]  # type: ignore[arg-type]


def trace(
    base: ChatModel,
    student: ChatModel | None,
    direction: Direction,
    tokens: TokenSet,
    prompts: Sequence[str],
    answers: Sequence[str | Sequence[int]],
    *,
    labels: Sequence[str] | None = None,
    authors: Sequence[str] | None = None,
    max_tokens: int = 32,
    n_top: int = 5,
) -> tuple[Trace, ...]:
    """Read each answer with all models. `answers` are texts or token ids, one a prompt.

    `labels` ("harmful", "harmless") and `authors` are carried along for display. An answer without
    a token gives an empty trace.
    """
    labels = labels or [""] * len(prompts)
    authors = authors or [""] * len(prompts)
    found = []
    for prompt, given, label, author in zip(prompts, answers, labels, authors, strict=True):
        ids = answer_ids(base.tokenizer, given, max_tokens)
        read = _read(base, student, direction, tokens, prompt, ids, n_top) if ids else ()
        found.append(Trace(prompt, label, author, read))
    return tuple(found)


@torch.no_grad()
def _answer_logps(chat: ChatModel, prompt: str, ids: list[int]) -> Float[Tensor, "n d_vocab"]:
    """log p(. | prompt, answer so far) for each answer token: row t predicts ids[t]."""
    batch = PromptBatch.of(chat.tokenizer, [prompt], [ids], device=chat.device)
    hidden = final_hidden(chat.model, batch)[0, -len(ids) - 1 : -1]
    return logits_of(hidden, *output_head(chat.model)).log_softmax(-1).float().cpu()


def _read(
    base: ChatModel,
    student: ChatModel | None,
    direction: Direction,
    tokens: TokenSet,
    prompt: str,
    ids: list[int],
    n_top: int,
) -> tuple[TraceToken, ...]:
    read = {"base": _answer_logps(base, prompt, ids)}
    with steer(base, direction):
        read["teacher"] = _answer_logps(base, prompt, ids)
    if student is not None:
        read["student"] = _answer_logps(student, prompt, ids)
    columns = {name: _columns(base.tokenizer, logp, ids, n_top) for name, logp in read.items()}
    nothing = ([None] * len(ids), [None] * len(ids), [()] * len(ids))
    base_p, base_rank, base_top = columns["base"]
    teacher_p, teacher_rank, teacher_top = columns["teacher"]
    student_p, student_rank, student_top = columns.get("student", nothing)

    logp_t, logp_0 = read["teacher"], read["base"]
    at = torch.arange(len(ids))
    lift = (logp_t - logp_0)[at, ids].tolist()
    terms = kl_terms(logp_t, logp_0)
    kl, inside = terms.sum(-1), terms[:, tokens.ids.cpu()].sum(-1)
    share = torch.where(kl > MIN_KL, inside / kl.clamp(min=MIN_KL), 0.0).clamp(0, 1).tolist()
    in_s = set(tokens.ids.tolist())
    return tuple(
        TraceToken(
            id=token,
            text=token_text(base.tokenizer, token),
            p_base=base_p[t],
            p_teacher=teacher_p[t],
            p_student=student_p[t],
            rank_base=base_rank[t],
            rank_teacher=teacher_rank[t],
            rank_student=student_rank[t],
            lift=lift[t],
            kl=max(0.0, float(kl[t])),
            kl_share=share[t],
            in_s=token in in_s,
            top_base=base_top[t],
            top_teacher=teacher_top[t],
            top_student=student_top[t],
        )
        for t, token in enumerate(ids)
    )


def kl_terms(
    logp_t: Float[Tensor, "n d_vocab"], logp_0: Float[Tensor, "n d_vocab"]
) -> Float[Tensor, "n d_vocab"]:
    """Each token's part of the generalized KL(teacher || base), nats: pt log(pt/p0) - pt + p0."""
    p_t = logp_t.exp()
    return (p_t * (logp_t - logp_0) - p_t + logp_0.exp()).clamp(min=0)


def _columns(
    tokenizer, logp: Float[Tensor, "n d_vocab"], ids: list[int], n_top: int
) -> tuple[list[float], list[int], list[tuple[Alternative, ...]]]:
    """Probability and rank (1 = most probable) of each answer token, and the top alternatives."""
    mine = logp[torch.arange(len(ids)), ids]
    rank = (logp > mine[:, None]).sum(-1) + 1
    top = logp.topk(min(n_top, logp.shape[-1]), -1)
    alternatives = [
        tuple(Alternative(v, token_text(tokenizer, v), p) for v, p in zip(row, ps, strict=True))
        for row, ps in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    ]
    return mine.exp().tolist(), rank.tolist(), alternatives
