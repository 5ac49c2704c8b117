"""Residual streams of prompts: `resid_pre` of every layer, batch by batch.

The columns that all prompts of a batch share are read before hooks are set, so that hooks see every row
alike. Nothing but the arm's positions is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import earned, final_hidden, prefill
from safesteer.models.processes import in_turns
from safesteer.models.templates import suffix_length
from safesteer.prompts.conversation import PromptLike
from safesteer.steering.hooks import record_resid_pre


@dataclass(frozen=True)
class Arm:
    """One side of a contrast: texts, with what the model reads around them."""

    texts: Sequence[PromptLike]
    continuations: Sequence[str] | None = None  # one per text; the mean over its positions is read
    system: str | None = None


def read_activations(
    chat: ModelLike, arm: Arm, batch_size: int = 32
) -> Iterator[tuple[list[int], Float[Tensor, "batch n_pos n_layers d_model"]]]:
    """Yield (indices into the arm's texts, resid_pre of every layer at the arm's positions) per batch.

    Positions are the post-instruction ones, or the mean over the continuation.

    Raises:
        SafeSteerError: Where activations are not finite; the sentence names a layer and a prompt.
    """
    chat = as_chat(chat)
    n_pos, layers = suffix_length(chat.tokenizer), list(range(chat.n_layers))

    def read_batch(part: tuple[list[int], PromptBatch]) -> Tensor:
        rows, batch = part

        def read(h: Tensor) -> Tensor:
            if arm.continuations is None:
                return h[:, -n_pos:].clone()  # a view would keep every position alive
            weight = batch.completion_mask[:, -h.shape[1] :].double()
            weight = weight / weight.sum(-1, keepdim=True)
            return einsum(weight, h.double(), "b pos, b pos d -> b d")[:, None]

        cache = prefill_shared(chat, batch)
        with record_resid_pre(chat.model, layers, read) as recorded:
            final_hidden(chat.model, batch, cache)
        resid_pre = torch.stack([recorded[layer] for layer in layers], dim=2)
        check_finite(chat, resid_pre, [arm.texts[i] for i in rows])
        return resid_pre

    parts = chat.batched(arm.texts, batch_size, system=arm.system, continuations=arm.continuations)
    for (rows, _), resid_pre in in_turns(parts, read_batch, chat.device):
        yield rows, resid_pre


@torch.no_grad()
def last_resid_pre(
    chat: ChatModel, texts: Sequence[PromptLike], batch_size: int = 32
) -> Float[Tensor, "n n_layers d_model"]:
    """Read resid_pre of every layer at the last prompt position, in float64 on the CPU."""
    resid_pre = torch.zeros((len(texts), chat.n_layers, chat.d_model), dtype=torch.float64)
    for rows, h in read_activations(chat, Arm(texts), batch_size):
        resid_pre[rows] = h[:, -1].double().cpu()
    return resid_pre


@torch.no_grad()
def prefill_shared(chat: ChatModel, batch: PromptBatch) -> Cache | None:
    """Read the columns that all prompts share before hooks are set, so that hooks see every row."""
    n_shared = earned(chat.model, batch).n_shared
    return prefill(chat.model, batch, n_shared) if n_shared else None


def check_finite(
    chat: ChatModel, resid_pre: Float[Tensor, "batch n_pos n_layers d_model"], texts: Sequence[PromptLike]
) -> None:
    """Check that what was read of all layers is finite.

    Raises:
        SafeSteerError: Names the first layer that overflowed, and a prompt on which it did.
    """
    overflowed = ~resid_pre.isfinite().all(-1).all(1)
    if bool(overflowed.any()):
        layer = int(overflowed.any(0).int().argmax())
        prompt = texts[int(overflowed[:, layer].int().argmax())]
        raise SafeSteerError(
            f"resid_pre of layer {layer} of '{chat.name}' is not finite on the prompt {prompt[:80]!r}: its"
            " weights are damaged, or its activations do not fit its precision (try dtype='bfloat16' or"
            " 'float32')."
        )
