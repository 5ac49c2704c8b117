"""Answers: greedy or sampled, batched by length, with the KV cache.

The columns that all prompts of a batch share are read once, and a prompt is read once however many
samples continue it. A sample is drawn from its own random numbers, so it does not depend on which
others are drawn beside it, in this process or in another.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, hf_model
from safesteer.models.forward import answers_start, prefill


def seed_of(key: tuple) -> int:
    """A 63-bit seed that depends on `key` alone, in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1


def uniforms(key: tuple, n_samples: int, n_tokens: int) -> Float[Tensor, "n_samples n_tokens"]:
    """Random numbers in [0, 1) that depend on `key` alone, the same on every device."""
    generator = torch.Generator().manual_seed(seed_of(key))
    return torch.rand((n_samples, n_tokens), generator=generator, dtype=torch.float64)


class _Sampling(LogitsProcessor):
    """Greedy search over what this leaves is pure sampling: the inverse of the distribution function."""

    def __init__(self, uniform: Tensor, temperature: float, name: str) -> None:
        self.uniform, self.temperature, self.name, self.step = uniform, temperature, name, 0

    def __call__(self, input_ids, scores):
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        cdf = (scores.to(wide) / self.temperature).softmax(-1).cumsum(-1)
        if not bool(cdf[:, -1].isfinite().all()):
            raise SafeSteerError(
                f"'{self.name}' gives logits that are not finite, so no answer can be sampled: its weights"
                " are damaged, or the steering coefficient is too large."
            )
        at = self.uniform[:, self.step, None].to(cdf) * cdf[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(cdf, at, right=True).clamp(max=cdf.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@torch.no_grad()
def generate_ids(
    chat: ChatModel,
    batch: PromptBatch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    n_samples: int = 1,
    uniform: Float[Tensor, "samples max_new_tokens"] | None = None,
    first_ids: Int[Tensor, " n_samples"] | None = None,
) -> Int[Tensor, "samples new_pos"]:
    """Answers as ids, padded after the end with the first EOS id. Temperature 0 is greedy.

    Sampling is pure (T as given, top-k and top-p off), so that rollouts are on-policy. Row order:
    all samples of prompt 0, then of prompt 1. `uniform` are the random numbers, one a sample and
    token (default: from torch's global generator). `first_ids` are put first, one a sample, and are
    not part of what is returned.
    """
    processors = []
    if temperature > 0:
        if uniform is None:
            uniform = torch.rand(len(batch.prompt_ids) * n_samples, max_new_tokens, dtype=torch.float64)
        processors = [_Sampling(uniform.to(batch.prompt_ids.device), temperature, chat.name)]
    eos, start = chat.eos_ids, batch.answer_start.repeat_interleave(n_samples)
    # All but the last column: a prompt is read once, however many samples continue it.
    read = batch.prompt_ids.shape[1] - (first_ids is None)
    cache = prefill(chat.model, batch, read, n_samples)
    ids = batch.prompt_ids.repeat_interleave(n_samples, 0)
    mask = batch.attention_mask.repeat_interleave(n_samples, 0)
    if first_ids is not None:
        ids = torch.cat([ids, first_ids.to(ids).repeat(len(batch.prompt_ids))[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(ids[:, -1:])], 1)
    with answers_start(start):
        out = hf_model(chat.model).generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=processors,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=eos,
            pad_token_id=eos[0] if eos else 0,
            use_cache=True,
        )
    return out[:, ids.shape[1] :]


def with_greedy_tokens(chat: ChatModel, batch: PromptBatch, n_tokens: int) -> PromptBatch:
    """Each prompt followed by the model's own first `n_tokens` greedy tokens; unchanged for 0."""
    return batch.extended(generate_ids(chat, batch, max_new_tokens=n_tokens)) if n_tokens > 0 else batch


def cut_at_eos(ids: Sequence[int], eos_ids: Sequence[int], *, keep_eos: bool) -> list[int]:
    """Ids up to the first end-of-answer id, with it or without it."""
    stop = next((i for i, t in enumerate(ids) if t in eos_ids), None)
    return list(ids) if stop is None else list(ids[: stop + keep_eos])


def generate(
    chat: ChatModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Answers to `prompts` as text, in their order. Batched by length, with the KV cache."""
    answers = [""] * len(prompts)
    for rows, batch in chat.batched(prompts, batch_size, system=system):
        drawn = None
        if temperature > 0:
            drawn = torch.cat([uniforms((seed, i), 1, max_new_tokens) for i in rows])
        out = generate_ids(chat, batch, max_new_tokens=max_new_tokens, temperature=temperature, uniform=drawn)
        for i, ids in zip(rows, out.tolist(), strict=True):
            kept = cut_at_eos(ids, chat.eos_ids, keep_eos=False)
            answers[i] = chat.tokenizer.decode(kept, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
    return answers
