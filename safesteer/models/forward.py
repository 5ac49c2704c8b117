"""Forward passes that form no logits they do not need, by the short cuts that a model has earned.

1. `prefill` reads the columns that all rows of a batch share once, in a pass of their own, and repeats
   their keys and values for every row;
2. `final_hidden` reads what no cache holds yet and stops after the final norm;
3. `last_logits` puts the output head on the last positions alone.
`traits` says which models may share columns and repeat caches; for the others `earned` lays batches out in
the usual way, with all padding on the left, and every prompt is read in full.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache

from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.passes import has_differing_rows, read_cache, read_states
from safesteer.models.traits import require_padding, traits_of


def earned(model: nn.Module, batch: PromptBatch) -> PromptBatch:
    """Return the batch in a layout that the model reads right; columns keep their places from the right."""
    if batch.n_shared and (has_differing_rows(model) or not traits_of(model).shares_prefix):
        batch = batch.plain()
    require_padding(model, batch.attention_mask)
    return batch


def prefill(model: nn.Module, batch: PromptBatch, upto: int, times: int = 1) -> Cache | None:
    """Compute the keys and values of the first `upto` columns; None for a model that cannot repeat them.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        batch: The prompts. The columns that all rows share are computed once, in a pass of their own.
        upto: Number of columns to read.
        times: How often each row is repeated in the cache, for as many continuations.

    Raises:
        SafeSteerError: Where the batch is longer than the model's context.
    """
    traits = traits_of(model)
    if not (traits.repeats_cache and traits.decodes_cached):
        return None
    return read_cache(model, earned(model, batch), upto, times)


def final_hidden(
    model: nn.Module, batch: PromptBatch, cache: Cache | None = None
) -> Float[Tensor, "batch uncached d_model"]:
    """Compute the hidden states after the final norm: what the output head reads.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        batch: Prompts with their continuations.
        cache: Keys and values of the first columns, used up by this call (None: those of the shared
            columns are computed here).

    Returns:
        The columns that no cache holds, [batch, uncached, d_model]. Count them from the right.

    Raises:
        SafeSteerError: Where the batch is longer than the model's context, or the model cannot read padding.
    """
    return read_states(model, earned(model, batch), cache)


@torch.no_grad()
def last_logits(
    chat: ModelLike, batch: PromptBatch, n_last: int = 1
) -> Float[Tensor, "batch n_last d_vocab"]:
    """Compute the logits at the last positions only; no (position x vocabulary) tensor is formed."""
    chat = as_chat(chat)
    return logits_of(final_hidden(chat.model, batch)[:, -n_last:], *output_head(chat.model))
