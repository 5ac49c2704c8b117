"""The way to TransformerLens: a TransformerBridge on a frozen copy of a model.

Booting a bridge rewires a model in place and breaks `save_pretrained`, so a student is never bridged:
`to_bridge` wraps a deep copy, for reading and steering. TransformerLens 4 has no HookedTransformer;
TransformerBridge is its successor. Compatibility mode stays off, so residual streams equal those of the
Hugging Face model.
"""

import copy
from typing import TYPE_CHECKING, cast

from torch import nn

from safesteer.models.chat_model import ModelLike, as_chat, hf_model, is_bridge, remember_bridge
from safesteer.models.loading import quiet_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:  # importing it takes seconds, and checks of annotations while running need a class
    TransformerBridge = nn.Module


def to_bridge(chat: ModelLike) -> TransformerBridge:
    """Wrap a frozen copy of a model in a TransformerLens TransformerBridge.

    `run_with_cache`, `hooks`, `ActivationCache` and the tools of TransformerLens are there at once, and
    every function of this package takes the bridge as it is.

    Args:
        chat: A ChatModel, (model, tokenizer), or a bridge, which is returned unchanged.

    Returns:
        The bridge, in evaluation mode, on the model's device and in its precision. Its tokenizer is a
        copy with a BOS token, as TransformerLens wants; chat templates render as before.

    Example:
        >>> bridge = ss.to_bridge(chat)
        >>> logits, cache = bridge.run_with_cache("Hello")
        >>> cache["blocks.0.hook_resid_pre"].shape[-1] == chat.d_model
        True
    """
    chat = as_chat(chat)
    if is_bridge(chat.model):
        remember_bridge(chat.model, chat)
        return cast(TransformerBridge, chat.model)
    from transformer_lens.model_bridge import TransformerBridge as Bridge

    source, tokenizer = copy.deepcopy(hf_model(chat.model)), copy.deepcopy(chat.tokenizer)
    source.config.architectures = source.config.architectures or [type(source).__name__]
    # TransformerLens gives a tokenizer a BOS, and loads it again by name unless told it adds one.
    tokenizer.init_kwargs |= {"name_or_path": chat.name, "add_bos_token": True}
    with quiet_transformers():
        bridge = Bridge.boot_transformers(
            chat.name,
            hf_model=source,
            tokenizer=tokenizer,
            device=str(chat.device),
            dtype=next(source.parameters()).dtype,
        )
    bridge.eval().requires_grad_(False)
    remember_bridge(bridge, chat)
    return bridge
