"""Answers: greedy or sampled, batched by length, with the KV cache.

The columns that all prompts of a batch share are read once, and a prompt is read once however many
samples continue it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from safesteer.errors import SafeSteerError
from safesteer.models import ChatModel, answers_start, hf_model, prefill
from safesteer.prompts import PromptBatch, batches


@torch.no_grad()
def generate_ids(
    chat: ChatModel,
    batch: PromptBatch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    n_samples: int = 1,
    first_ids: Int[Tensor, " n_samples"] | None = None,
) -> Int[Tensor, "samples new_pos"]:
    """Answers as ids, padded after the end with the first EOS id. Temperature 0 is greedy.

    Sampling is pure (T as given, top-k and top-p off), so that rollouts are on-policy. Row order:
    all samples of prompt 0, then of prompt 1. `first_ids` are put first, one a sample, and are not
    part of what is returned.
    """
    sampling = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0}
    eos, start = chat.eos_ids, batch.answer_start.repeat_interleave(n_samples)
    # All but the last column: a prompt is read once, however many samples continue it.
    read = batch.prompt_ids.shape[1] - (first_ids is None)
    cache = prefill(chat.model, batch, read, n_samples)
    ids = batch.prompt_ids.repeat_interleave(n_samples, 0)
    mask = batch.attention_mask.repeat_interleave(n_samples, 0)
    if first_ids is not None:
        ids = torch.cat([ids, first_ids.to(ids).repeat(len(batch.prompt_ids))[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(ids[:, -1:])], 1)
    try:
        with answers_start(start):
            out = hf_model(chat.model).generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                repetition_penalty=1.0,
                eos_token_id=eos,
                pad_token_id=eos[0] if eos else 0,
                use_cache=True,
                **sampling,
            )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise SafeSteerError(
            f"'{chat.name}' gives logits that are not finite, so no answer can be sampled: its weights"
            " are damaged, or the steering coefficient is too large."
        ) from error
    return out[:, ids.shape[1] :]


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
    torch.manual_seed(seed)
    for rows in batches(chat.tokenizer, prompts, batch_size, system=system):
        batch = PromptBatch.of(chat.tokenizer, [prompts[i] for i in rows], system=system, device=chat.device)
        out = generate_ids(chat, batch, max_new_tokens=max_new_tokens, temperature=temperature)
        for i, ids in zip(rows, out.tolist(), strict=True):
            kept = cut_at_eos(ids, chat.eos_ids, keep_eos=False)
            answers[i] = chat.tokenizer.decode(kept, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
    return answers
