"""Sample answers and read them as teacher and as base (paper section 3.3, steps 1 to 3).

1. Sample N continuations of H tokens from the teacher on harmless prompts (T = 1). The teacher is the steered
   model, or the model under a system prompt (Table 3).
2. Read the same tokens as teacher and as base: log pt and log p0 at every step.
3. A position counts until p0's argmax has been an end-of-turn token, or the sample has ended.

Memory is O(vocabulary): samples are kept as final hidden states (rows x d_model), and `logp_rows` turns
them into log-probabilities a few rows at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import final_hidden, prefill
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.processes import in_turns
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.settings import TokenConfig
from safesteer.steering.direction import Direction, steer

ROWS = 32  # rows of (row x vocabulary) log-probabilities alive at once


@dataclass(frozen=True, eq=False)
class AnswerStates:
    """Sampled answers: final hidden states of teacher and base at each step, and which steps count."""

    teacher: Float[Tensor, "rows horizon d_model"]
    base: Float[Tensor, "rows horizon d_model"]
    completion_ids: Int[Tensor, "rows horizon"]
    valid: Bool[Tensor, "rows horizon"]
    prompts: tuple[str, ...]  # one per row


@torch.no_grad()
def sample_answers(
    chat: ModelLike, direction: Direction, prompts: Sequence[PromptLike], config: TokenConfig
) -> AnswerStates:
    """Sample answers from the teacher (or the base), then read both models on the same tokens.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        direction: Makes the teacher of `chat`, but for the teacher "prompt".
        prompts: What is answered.
        config: The teacher, number and length of the answers, who samples them, and the seed.

    Returns:
        n_samples rows per prompt of `horizon` steps each, prompts of similar length side by side. A sample
        depends on the seed and its prompt's place, not on the batches.
    """
    chat, prompts = as_chat(chat), as_prompts(prompts)
    if not prompts:
        raise SafeSteerError("There are no prompts to select tokens on.")
    by_teacher = config.rollouts == "teacher"

    def sample(part: tuple[list[int], PromptBatch]) -> tuple[Tensor, Tensor, Tensor]:
        rows, batch = part
        told = _told(chat, batch, [prompts[i] for i in rows], config)
        uniform = torch.cat([uniforms((config.seed, i), config.n_samples, config.horizon) for i in rows])
        with _steered(chat, direction, config) if by_teacher else nullcontext():
            ids = generate_ids(
                chat,
                told if by_teacher else batch,
                max_new_tokens=config.horizon,
                min_new_tokens=0 if config.early_ends else config.horizon - 1,
                temperature=1.0,
                n_samples=config.n_samples,
                uniform=uniform,
            )
        if ids.shape[1] < config.horizon:  # every sample ended early
            missing = config.horizon - ids.shape[1]
            ids = torch.nn.functional.pad(ids, (0, missing), value=chat.eos_ids[0])
        with _steered(chat, direction, config):
            teacher = _step_hidden(chat, told, ids)
        return teacher, _step_hidden(chat, batch, ids), ids

    parts = list(in_turns(chat.batched(prompts, config.batch_size), sample, chat.device))
    prompt_of_row = [prompts[i] for (rows, _), _ in parts for i in rows for _ in range(config.n_samples)]
    teacher, base, ids = (torch.cat(made) for made in zip(*(states for _, states in parts), strict=True))
    return AnswerStates(teacher, base, ids, _counting(chat, base, ids), tuple(prompt_of_row))


def _steered(chat: ChatModel, direction: Direction, config: TokenConfig) -> AbstractContextManager[None]:
    """Steer inside, where that is what makes the teacher."""
    return steer(chat, direction) if config.teacher == "steered" else nullcontext()


def _told(
    chat: ChatModel, batch: PromptBatch, prompts: Sequence[PromptLike], config: TokenConfig
) -> PromptBatch:
    """Return the prompts of `batch` as the teacher reads them: the teacher "prompt" has its system prompt."""
    if config.teacher == "steered":
        return batch
    return PromptBatch.of(chat.tokenizer, prompts, system=config.system, device=chat.device)


def _step_hidden(
    chat: ChatModel, batch: PromptBatch, ids: Int[Tensor, "rows horizon"]
) -> Float[Tensor, "rows horizon d_model"]:
    """Return the hidden states that predict each id. A prompt is read once for all of its samples."""
    full, upto = batch.extended(ids), batch.prompt_ids.shape[1] - 1
    cache = prefill(chat.model, batch, upto, len(ids) // len(batch.prompt_ids))
    return final_hidden(chat.model, full, cache)[:, -ids.shape[1] - 1 : -1]


def _counting(
    chat: ChatModel, base: Float[Tensor, "rows horizon d_model"], ids: Int[Tensor, "rows horizon"]
) -> Bool[Tensor, "rows horizon"]:
    """Mark the positions that count: up to the sample's end, and before the base would end the answer."""
    head, eos = output_head(chat.model), torch.tensor(chat.eos_ids, device=chat.device)
    ended = torch.isin(ids, eos)
    valid = ended.cumsum(1) - ended.long() == 0
    for at in torch.arange(len(ids)).split(ROWS):
        top = torch.stack([logits_of(h, *head).argmax(-1) for h in base[at].unbind(1)], 1)
        valid[at] &= torch.isin(top, eos).cumsum(1) == 0
    return valid


def logp_rows(
    chat: ChatModel, sampled: AnswerStates
) -> Iterator[tuple[Int[Tensor, " n"], Int[Tensor, " n"], Tensor, Tensor]]:
    """Yield counting positions, a few at a time: (row, step, log pt, log p0), the last two [n, d_vocab]."""
    head = output_head(chat.model)
    row, step = sampled.valid.nonzero(as_tuple=True)
    for at in torch.arange(len(row)).split(ROWS):
        r, j = row[at], step[at]
        logp_t = logits_of(sampled.teacher[r, j], *head).log_softmax(-1)
        yield r, j, logp_t, logits_of(sampled.base[r, j], *head).log_softmax(-1)
