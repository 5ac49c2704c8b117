"""The precision of a model's weights, changed as loading in that precision would leave them.

Weights that a family keeps in float32 (routers, correction biases) stay there, and so do buffers: `model.to`
would round the frequencies of rotary embeddings, which no loader does.

A recipe may leave the precision to the machine: `settled_precision` says what its "auto" is on a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from safesteer._errors import SafeSteerError
from safesteer.models.adapter import shares_weights
from safesteer.models.chat_model import ChatModel
from safesteer.models.parts import hf_model, tensors_put_back
from safesteer.models.placement import is_offloaded
from safesteer.models.sharding import is_sharded

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # of processors, as torch lists them


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 where the device is known to have instructions that multiply it, else float32.

    Example:
        >>> from safesteer.models.precision import fast_dtype
        >>> fast_dtype("meta")
        torch.float32
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            has_instructions = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_instructions = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if has_instructions else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Ask torch, which asks the processor; emulated bfloat16 is slower than float32."""
    listed = getattr(torch.cpu, "get_capabilities", None)
    if listed is None:  # older versions of torch
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(listed().get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def settled_precision(precision: str, device: torch.device | str, before: str | None = None) -> str:
    """Return the precision that a setting names: "auto" is the one before, or the fast one of the device.

    `load_model(dtype="auto")` is another: the precision of the model's files.
    """
    if precision != "auto":
        return precision
    return before or str(fast_dtype(device)).removeprefix("torch.")


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the precision of the weights: that of the embedding."""
    return cast(Tensor, hf_model(model).get_input_embeddings().weight).dtype


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a torch dtype, also by its name.

    Raises:
        SafeSteerError: For a name that is no floating-point precision.

    Example:
        >>> from safesteer.models.precision import as_dtype
        >>> as_dtype("bfloat16")
        torch.bfloat16
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise SafeSteerError(f"'{dtype}' is no precision: use float32, bfloat16 or float16.")
    return named


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the precision of the weights in place.

    Raises:
        SafeSteerError: For weights that are offloaded: they come as they lie there.
    """
    if is_offloaded(model):
        raise SafeSteerError(
            "Weights in the CPU's memory or on the disk keep the precision that they were opened in: give"
            " load_model the dtype, and export.dtype=base."
        )
    wide = _kept_wide(model, dtype)
    for name, p in hf_model(model).named_parameters():
        if p.is_floating_point():
            is_wide = any(fnmatch(name, f"*{pattern}*") for pattern in wide)
            p.data = p.data.to(torch.float32 if is_wide else dtype)
    for config in _configs(model):
        config.dtype = dtype


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """List the model's configuration and those inside it, of which each names a precision."""
    config = hf_model(model).config
    inside = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in inside if isinstance(part, PretrainedConfig))]


def _kept_wide(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """List the parts that the family keeps in float32 when it is loaded in `dtype`."""
    inner: Any = hf_model(model)
    narrow = dtype in (torch.float16, torch.bfloat16)
    always = set(inner._keep_in_fp32_modules_strict or ()) if narrow else set()
    return always | (set(inner._keep_in_fp32_modules or ()) if dtype == torch.float16 else set())


@contextmanager
def in_precision_of(base: ChatModel, student: ChatModel) -> Iterator[None]:
    """Let a student have its base's precision inside the block, or rounding would count as drift.

    An adapter on the base shares it already. A sharded student keeps its own: a block is put together from
    the processes in the precision that trains.
    """
    keeps = shares_weights(base, student) or is_sharded(student.model)
    with in_precision(student.model, None if keeps else weight_dtype(base.model)):
        yield


@contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the weights have another precision inside the block; then the same tensors are back.

    None, and the precision that they have, change nothing.
    """
    if dtype in (None, weight_dtype(model)):
        yield
        return
    inner = hf_model(model)
    configured = [(config, config.dtype) for config in _configs(inner)]
    try:
        with tensors_put_back(inner.parameters()):
            cast_weights(model, cast(torch.dtype, dtype))
            yield
    finally:
        for config, name in configured:
            config.dtype = name
