"""TODO models.forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, context_length, hf_model, output_head
from safesteer.models.logits import logits_of

# Column where each row's answer starts, for the passes now running: steering with a scope asks.
ANSWER_START: ContextVar[Tensor | None] = ContextVar("answer_start", default=None)


@contextmanager
def answers_start(at: Int[Tensor, " rows"]) -> Iterator[None]:
    """Tell steering where the answers of the passes inside the block start."""
    token = ANSWER_START.set(at)
    try:
        yield
    finally:
        ANSWER_START.reset(token)


def _check_length(model: nn.Module, batch: PromptBatch) -> None:
    """Past its context a model reads nonsense, and attention costs the square of the length."""
    limit, n = context_length(model), batch.prompt_ids.shape[1]
    if limit and n > limit:
        raise SafeSteerError(
            f"A prompt with its answer has {int(batch.attention_mask.sum(1).max()):,} tokens, and the model"
            f" reads {limit:,}: shorten it or leave it out."
        )


def prefill(model: nn.Module, batch: PromptBatch, upto: int, times: int = 1) -> Cache:
    """Keys and values of the first `upto` columns, each row repeated `times`.

    The columns that all rows share are computed once and repeated, in a forward pass of their own.
    """
    _check_length(model, batch)
    decoder, n = hf_model(model).get_decoder(), batch.n_shared
    cache: Cache = DynamicCache(config=hf_model(model).config.get_text_config())
    with answers_start(batch.answer_start):
        if n > 0:
            cache = decoder(batch.prompt_ids[:1, :n], past_key_values=cache, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch.prompt_ids))
        if upto > n:
            cache = decoder(
                batch.prompt_ids[:, n:upto],
                attention_mask=batch.attention_mask[:, :upto],
                position_ids=batch.position_ids[:, n:upto],
                past_key_values=cache,
                use_cache=True,
            ).past_key_values
    if times > 1:
        cache.batch_repeat_interleave(times)
    return cache


def final_hidden(
    model: nn.Module, batch: PromptBatch, cache: Cache | None = None
) -> Float[Tensor, "batch rest d_model"]:
    """Hidden states after the final norm: what the output head reads. No logits are formed.

    Only the columns that no cache holds are returned: all but the shared ones, or those after the
    given `cache` (used up by this call). Count columns from the right.
    """
    _check_length(model, batch)
    if cache is None and batch.n_shared > 0:
        cache = prefill(model, batch, batch.n_shared)
    n = 0 if cache is None else cache.get_seq_length()
    with answers_start(batch.answer_start):
        out = hf_model(model).get_decoder()(
            batch.prompt_ids[:, n:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, n:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return out.last_hidden_state


@torch.no_grad()
def last_logits(
    chat: ChatModel, batch: PromptBatch, n_last: int = 1
) -> Float[Tensor, "batch n_last d_vocab"]:
    """Logits at the last positions only; no (position x vocabulary) tensor is formed."""
    return logits_of(final_hidden(chat.model, batch)[:, -n_last:], *output_head(chat.model))
