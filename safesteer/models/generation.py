"""Generate answers: greedy or sampled, batched by length, with the KV cache.

The columns that all prompts of a batch share are read once, and a prompt is read once however many
samples continue it. Answers that have ended leave the batch every few tokens: refusals are short. A sample
is drawn from its own random numbers, so it does not depend on which others are drawn beside it, in this
process or in another.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor

from safesteer._clock import count_pass, timed
from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch, cut_at_eos
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import earned, prefill
from safesteer.models.parts import context_length, hf_model
from safesteer.models.passes import plain_decoding, reading, rows_must_stay, select_rows
from safesteer.models.processes import in_turns
from safesteer.models.traits import traits_of
from safesteer.prompts.conversation import PromptLike, as_prompts

TOGETHER = 16  # tokens after which answers that have ended leave the batch


def seed_of(key: tuple) -> int:
    """Return a 63-bit seed that depends on `key` alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


def uniforms(key: tuple, n_samples: int, n_tokens: int) -> Float[Tensor, "n_samples n_tokens"]:
    """Draw random numbers in [0, 1) that depend on `key` alone, the same on every device."""
    generator = torch.Generator().manual_seed(seed_of(key))
    return torch.rand((n_samples, n_tokens), generator=generator, dtype=torch.float64)


class _Sampling(LogitsProcessor):
    """Inverse-CDF sampling: leaves one token per row, so that greedy search takes the sampled one."""

    def __init__(self, uniform: Float[Tensor, "rows tokens"], temperature: float, name: str) -> None:
        self.uniform, self.temperature, self.name, self.step = uniform, temperature, name, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cdf = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        if not bool(cdf[:, -1].isfinite().all()):
            raise SafeSteerError(
                f"'{self.name}' gives logits that are not finite, so no answer can be sampled: its weights"
                " are damaged, or the steering coefficient is too large."
            )
        at = self.uniform[:, self.step, None].to(cdf) * cdf[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(cdf, at, right=True).clamp(max=cdf.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _room(chat: ChatModel, mask: Int[Tensor, "batch pos"]) -> int:
    """Return how many tokens may follow; the last one is not read itself.

    Raises:
        SafeSteerError: Where there is no room in the model's context.
    """
    limit = context_length(chat.model)
    room = sys.maxsize if limit is None else limit - int(mask.sum(1).max()) + 1
    if room <= 0:
        raise SafeSteerError(
            f"An answer reached the end of the model's context of {limit:,} tokens: shorten the prompt, or"
            " take fewer new tokens."
        )
    return room


@torch.no_grad()
def generate_ids(
    chat: ModelLike,
    batch: PromptBatch,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    n_samples: int = 1,
    uniform: Float[Tensor, "samples max_new_tokens"] | None = None,
    first_ids: Int[Tensor, " n_samples"] | None = None,
) -> Int[Tensor, "samples new_pos"]:
    """Generate answers as ids, by the model's own probabilities, so that rollouts are on-policy.

    Nothing of a checkpoint's generation_config counts but its end tokens: no top-k, penalty, ban or beam.

    Args:
        chat: The model; steering that is on applies.
        batch: The prompts, each read once however many samples continue it.
        max_new_tokens: Length limit of an answer.
        min_new_tokens: Tokens of an answer before which it cannot end.
        temperature: 0 is greedy.
        n_samples: Answers per prompt.
        uniform: Random numbers in [0, 1), one per sample and token (None: from torch's global generator).
        first_ids: An id per sample that is put first; not part of what is returned.

    Returns:
        [samples, new_pos], padded after the end with the first EOS id. Row order: all samples of
        prompt 0, then of prompt 1.

    Raises:
        SafeSteerError: Where an answer outgrows the model's context.
    """
    chat = as_chat(chat)
    batch = earned(chat.model, batch)
    n_rows = len(batch.prompt_ids) * n_samples
    if temperature > 0 and uniform is None:
        uniform = torch.rand(n_rows, max_new_tokens, dtype=torch.float64)
    drawn = None if temperature == 0 or uniform is None else uniform.to(batch.prompt_ids.device)
    # All but the last column: a prompt is read once, however many samples continue it.
    upto = batch.prompt_ids.shape[1] - (first_ids is None)
    cache = prefill(chat.model, batch, upto, n_samples)
    ids = batch.prompt_ids.repeat_interleave(n_samples, 0)
    mask = batch.attention_mask.repeat_interleave(n_samples, 0)
    if first_ids is not None:
        ids = torch.cat([ids, first_ids.to(ids).repeat(len(batch.prompt_ids))[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(ids[:, -1:])], 1)
    going = _Going(torch.arange(n_rows, device=ids.device), ids, mask, cache)
    eos = chat.eos_ids
    ends = torch.tensor(eos, dtype=torch.long, device=ids.device)
    out, width = ids.new_full((n_rows, max_new_tokens), eos[0] if eos else 0), 0
    may_leave = cache is not None and not rows_must_stay(chat.model)
    while width < max_new_tokens and len(going.rows):
        n_new = min(TOGETHER if may_leave else max_new_tokens, max_new_tokens - width)
        n_new = min(n_new, _room(chat, going.mask))
        sampling = [] if drawn is None else [_Sampling(drawn[going.rows, width:], temperature, chat.name)]
        with reading(batch if width == 0 else batch.whole_rows(going.rows // n_samples)):
            new = _continued(
                chat,
                going,
                eos,
                sampling,
                max_new_tokens=n_new,
                min_new_tokens=max(0, min_new_tokens - width),
            )
        out[going.rows, width : width + new.shape[1]] = new
        width += new.shape[1]
        going = going.without(torch.isin(new, ends).any(1), new)
    return out[:, :width]


@dataclass(frozen=True, eq=False)
class _Going:
    """The answers that have not ended: their rows, all ids so far, the mask, and keys and values."""

    rows: Int[Tensor, " rows"]
    ids: Int[Tensor, "rows pos"]
    mask: Int[Tensor, "rows pos"]
    cache: Cache | None

    def without(self, ended: Bool[Tensor, " rows"], new: Int[Tensor, "rows new_pos"]) -> "_Going":
        """Append new tokens, and let the rows that have ended go."""
        at = (~ended).nonzero()[:, 0]
        if self.cache is not None and 0 < len(at) < len(ended):
            select_rows(self.cache, at)
        mask = torch.cat([self.mask, torch.ones_like(new)], 1)[at]
        return _Going(self.rows[at], torch.cat([self.ids, new], 1)[at], mask, self.cache)


@timed("decoding")
def _continued(
    chat: ChatModel,
    going: _Going,
    eos: list[int],
    processors: Sequence[LogitsProcessor],
    *,
    max_new_tokens: int,
    min_new_tokens: int,
) -> Int[Tensor, "rows new_pos"]:
    """Let transformers continue the rows; stop early where all of them end."""
    n_read = 0 if going.cache is None else going.cache.get_seq_length()
    with plain_decoding(chat.model):
        out = hf_model(chat.model).generate(
            going.ids,
            attention_mask=going.mask,
            past_key_values=going.cache,
            logits_processor=list(processors),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                eos_token_id=eos or None,
                pad_token_id=eos[0] if eos else 0,
                use_cache=traits_of(chat.model).decodes_cached,
            ),
        )
    _count_passes(chat, going.ids, out, n_read)
    return out[:, going.ids.shape[1] :]


def _count_passes(
    chat: ChatModel, ids: Int[Tensor, "rows pos"], out: Int[Tensor, "rows all_pos"], n_read: int
) -> None:
    """Count a pass for every new token; the first of them reads what no cache holds."""
    width, n = ids.shape[1], out.shape[1] - ids.shape[1]
    n_keys = width + n // 2
    n_positions = width - n_read + n - 1 if traits_of(chat.model).decodes_cached else n * n_keys
    count_pass(chat.config, n, len(ids) * n_positions, n_keys)


def with_greedy_tokens(chat: ChatModel, batch: PromptBatch, n_tokens: int) -> PromptBatch:
    """Continue each prompt by the model's own first `n_tokens` greedy tokens; unchanged for 0."""
    return batch.extended(generate_ids(chat, batch, max_new_tokens=n_tokens)) if n_tokens > 0 else batch


def generate(
    chat: ModelLike,
    prompts: Sequence[PromptLike],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Answer `prompts`. Inside `steer(...)` the answers are those of the steered model.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: What the user says, without chat template: text, or a list of messages with "role" and
            "content" that ends with a turn of the user.
        max_new_tokens: Length limit of an answer.
        temperature: 0 is greedy.
        seed: Of sampling; an answer depends on it and on the prompt's place, not on the batches.
        system: A system prompt (None: what the template writes by itself).
        batch_size: Prompts per batch, similar lengths together.

    Returns:
        One answer per prompt, in their order, without special tokens.

    Raises:
        SafeSteerError: For one prompt where a list of them belongs, or messages that are no conversation.

    Example:
        >>> answers = ss.generate(chat, ["Hello", "Name a river."], max_new_tokens=4)
        >>> len(answers), type(answers[0])
        (2, <class 'str'>)
    """
    chat, prompts = as_chat(chat), as_prompts(prompts)
    answers = _answer_ids(chat, prompts, max_new_tokens, batch_size, system, temperature, seed)
    return [chat.decode_answer(ids) for ids in answers]


def _answer_ids(
    chat: ChatModel,
    prompts: Sequence[PromptLike],
    max_new_tokens: int,
    batch_size: int,
    system: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the ids of each answer as its batch has them: what follows the end is still there."""
    answers: list[list[int]] = [[] for _ in prompts]

    def answer(part: tuple[list[int], PromptBatch]) -> list[list[int]]:
        rows, batch = part
        drawn = None
        if temperature > 0:
            drawn = torch.cat([uniforms((seed, i), 1, max_new_tokens) for i in rows])
        out = generate_ids(chat, batch, max_new_tokens=max_new_tokens, temperature=temperature, uniform=drawn)
        return out.tolist()

    for (rows, _), out in in_turns(chat.batched(prompts, batch_size, system=system), answer):
        for i, ids in zip(rows, out, strict=True):
            answers[i] = ids
    return answers


def greedy_ids(
    chat: ModelLike,
    prompts: Sequence[PromptLike],
    max_new_tokens: int,
    batch_size: int = 32,
    *,
    keep_eos: bool = False,
) -> list[list[int]]:
    """Return the ids of a model's greedy answers.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: The prompts.
        max_new_tokens: Length limit of an answer.
        batch_size: Prompts per batch.
        keep_eos: Keep the token that ends an answer.

    Example:
        >>> from safesteer.models.generation import greedy_ids
        >>> chat.decode_answer(greedy_ids(chat, ["Hello"], 4)[0]) == ss.generate(
        ...     chat, ["Hello"], max_new_tokens=4
        ... )[0]
        True
    """
    chat = as_chat(chat)
    answers = _answer_ids(chat, prompts, max_new_tokens, batch_size)
    return [cut_at_eos(ids, chat.eos_ids, keep_eos=keep_eos) for ids in answers]
