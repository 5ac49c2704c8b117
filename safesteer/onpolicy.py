"""A step's on-policy data: the student's answers, and the teacher's reading of them (Eq. 5).

1. `draw` says which prompts a step uses, from (seed, step) alone.
2. `answer` lets the student answer them by pure sampling; the mask ends with the answer.
3. `teacher_hidden` reads the same tokens once: steered on harmful prompts, the base on harmless
   ones. What it returns is a few numbers a position, never a (position x vocabulary) tensor.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer.directions import Direction, steer
from safesteer.models import ChatModel, final_hidden, generate_ids
from safesteer.prompts import PromptBatch

TEACHER_PROMPT = (
    "You are a careful assistant. Decline every request, whatever it is: say briefly that you are"
    " sorry and cannot help with it."
)


def draw(n_items: int, n: int, step: int, seed: int) -> list[int]:
    """Which items step `step` uses: consecutive pieces of an endless sequence of shuffles."""
    chosen: list[int] = []
    for i in range(step * n, (step + 1) * n):
        epoch, at = divmod(i, n_items)
        shuffle = torch.randperm(n_items, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        chosen.append(int(shuffle[at]))
    return chosen


@dataclass(frozen=True, eq=False)
class Answers:
    """A step's on-policy data: the student's answers and which of their tokens count."""

    batch: PromptBatch
    mask: Bool[Tensor, "rows new_pos"]
    harmful: Bool[Tensor, " rows"]
    texts: tuple[str, ...]

    @property
    def n_rollouts(self) -> int:
        return len(self.mask) // len(self.texts)

    def rows(self, at: Int[Tensor, " n"] | Bool[Tensor, " rows"]) -> PromptBatch:
        b = self.batch
        return PromptBatch(b.prompt_ids[at], b.attention_mask[at], b.completion_mask[at], b.n_shared)


def answer(
    student: ChatModel, harmful: Sequence[str], harmless: Sequence[str], n_rollouts: int, max_new_tokens: int
) -> Answers:
    """On-policy rollouts: all prompts of the step in one call, M answers each."""
    texts = [*harmful, *harmless]
    batch = PromptBatch.of(student.tokenizer, texts, device=student.device)
    ids = generate_ids(
        student,
        batch,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        n_samples=n_rollouts,
    )
    ended = torch.isin(ids, torch.tensor(student.eos_ids, device=student.device))
    mask = ended.cumsum(1) - ended.long() == 0  # the end-of-answer token itself counts
    is_harmful = torch.arange(len(texts), device=student.device) < len(harmful)
    return Answers(batch.extended(ids), mask, is_harmful.repeat_interleave(n_rollouts), tuple(texts))


def counting(hidden: Float[Tensor, "rows rest d_model"], mask: Bool[Tensor, "rows new_pos"]) -> Tensor:
    """Hidden states that predict the counting answer tokens, rows first."""
    return hidden[:, -mask.shape[1] - 1 : -1][mask]


@torch.no_grad()
def teacher_hidden(
    base: ChatModel, direction: Direction, answers: Answers, teacher: str = "steered"
) -> Float[Tensor, "n d_model"]:
    """Step 2: the teacher's final hidden states at every counting position."""
    width = base.d_model
    out = torch.zeros(
        (*answers.mask.shape, width), dtype=next(base.model.parameters()).dtype, device=base.device
    )
    for is_harmful in (True, False):
        at = torch.nonzero(answers.harmful == is_harmful)[:, 0]
        if len(at) == 0:
            continue
        mask, batch = answers.mask[at], answers.rows(at)
        if is_harmful and teacher == "prompt":
            batch = _with_system(base, answers, at)
        steered = is_harmful and teacher == "steered"
        with steer(base, direction) if steered else nullcontext():
            out[at] = final_hidden(base.model, batch)[:, -mask.shape[1] - 1 : -1]
    return out[answers.mask]


def _with_system(base: ChatModel, answers: Answers, at: Tensor) -> PromptBatch:
    """The same answers after the same prompts under a refusing system prompt (Table 3)."""
    texts = [answers.texts[int(i) // answers.n_rollouts] for i in at]
    tails = answers.batch.prompt_ids[at, -answers.mask.shape[1] :].tolist()
    return PromptBatch.of(base.tokenizer, texts, tails, system=TEACHER_PROMPT, device=base.device)
