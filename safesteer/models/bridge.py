"""The way to TransformerLens: a TransformerBridge on a frozen copy of a model.

Booting a bridge rewires a model in place and breaks `save_pretrained`, so a student is never bridged:
`to_bridge` wraps a deep copy, for reading and steering. TransformerLens 4 has no HookedTransformer;
TransformerBridge is its successor. Compatibility mode stays off, so residual streams equal those of the
Hugging Face model.
"""

import copy
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from safesteer._errors import SafeSteerError, first_line
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat, remember_bridge
from safesteer.models.head import deviation, probe_ids, tolerance
from safesteer.models.parts import hf_model, is_bridge
from safesteer.models.passes import bare
from safesteer.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
else:  # importing it takes seconds, and checks of annotations while running need a class
    TransformerBridge = nn.Module

N_PROBE_IDS = 32
TOLERANCE = 3e-4  # of a bridge's logits, in units of their spread
HALF_TOLERANCE = 0.2  # below float32, where a bridge rounds elsewhere


def to_bridge(chat: ModelLike) -> TransformerBridge:
    """Wrap a frozen copy of a model in a TransformerLens TransformerBridge.

    `run_with_cache`, `hooks`, `ActivationCache` and the tools of TransformerLens are there at once, and
    every function of this package takes the bridge as it is.

    Args:
        chat: A ChatModel, (model, tokenizer), or a bridge, which is returned unchanged.

    Returns:
        The bridge, in evaluation mode, on the model's device and in its precision. Its tokenizer is a
        copy with a BOS token, as TransformerLens wants; chat templates render as before.

    Raises:
        SafeSteerError: For an architecture that TransformerLens does not know, a package that it needs and
            that is missing (nothing is installed), a bridge with other logits, or a model that a device map
            has spread.

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

    source, tokenizer = hf_model(chat.copy().model), copy.deepcopy(chat.tokenizer)
    source.config.architectures = source.config.architectures or [type(source).__name__]
    # TransformerLens gives a tokenizer a BOS, and loads it again by name unless told it adds one.
    tokenizer.init_kwargs |= {"name_or_path": chat.name, "add_bos_token": True}
    try:
        with quiet_transformers(), nothing_installed():
            bridge = Bridge.boot_transformers(
                chat.name,
                hf_model=source,
                tokenizer=tokenizer,
                device=str(chat.device),
                dtype=next(source.parameters()).dtype,
            )
    except Exception as error:  # an architecture that it does not know, or a part that it expects
        raise SafeSteerError(
            f"TransformerLens cannot bridge {type(source).__name__} ({_reason(error)}); every function takes"
            " the plain model too."
        ) from error
    bridge.eval().requires_grad_(False)
    _check_logits(bridge, chat)
    remember_bridge(bridge, chat)
    return bridge


def _reason(error: Exception) -> str:
    """Say why a bridge could not be built: with what to install, where that is missing."""
    command = re.search(r"pip install [\w./\[\],=<>~ -]+", str(error))
    return command[0].strip() if command else first_line(error, 120)


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Refuse every command that installs packages, inside the block.

    TransformerLens runs `pip install torchvision` where the image processor of a multimodal model does not
    load, which reading text never needs, and that may replace the torch that is there. It takes the refusal
    as a failed installation. Other commands run.
    """
    popen = subprocess.Popen

    class WithoutInstallers(popen):
        def __init__(self, args: Any, *more: Any, **options: Any) -> None:
            words = args.split() if isinstance(args, str) else list(map(str, args))
            if "install" in words:
                raise PermissionError(f"nothing is installed here; run it yourself: {' '.join(words)}")
            super().__init__(args, *more, **options)

    subprocess.Popen = WithoutInstallers
    try:
        yield
    finally:
        subprocess.Popen = popen


@torch.no_grad()
def _check_logits(bridge: nn.Module, chat: ChatModel) -> None:
    """Compare the bridge with the model that it wraps, on a few tokens.

    Raises:
        SafeSteerError: If it does not run, or gives other logits.
    """
    inner, family = hf_model(chat.model), type(hf_model(chat.model)).__name__
    ids = probe_ids(inner, N_PROBE_IDS)
    with bare():  # the bridge holds the model without steering
        want = inner(ids, use_cache=False).logits.double()
    try:
        got = bridge(ids).double()[..., : want.shape[-1]]
    except Exception as error:  # whatever a part that was wrapped wrongly raises
        raise SafeSteerError(
            f"The TransformerLens bridge of {family} does not run ({first_line(error, 120)}); every function"
            " takes the plain model too."
        ) from error
    if not bool(want.isfinite().all()):  # damaged weights: what reads them says so
        return
    error = deviation(got, want)
    if error > tolerance(next(inner.parameters()).dtype, HALF_TOLERANCE, TOLERANCE):
        raise SafeSteerError(
            f"The TransformerLens bridge of {family} gives other logits than the model (off by {error:.1%} of"
            " their spread); every function takes the plain model too."
        )
