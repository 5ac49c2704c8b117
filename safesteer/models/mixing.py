"""A dial between a base and its student: weights on the line through both.

At strength s each weight is base + s (student - base): 0 is the base, 1 the student. Above 1 the line goes on
in the direction of the training, below 0 away from it (task arithmetic, Ilharco et al. 2023). An adapter is
linear in its scale, so there the dial is the scale.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.adapter import shares_weights
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.parts import is_bridge, is_quantized, tensors_put_back


@contextmanager
def between(base: ModelLike, student: ModelLike, strength: float) -> Iterator[ChatModel]:
    """Let the student have the weights at `strength` on the line from the base inside the block.

    Only weights that differ are made anew, and they go when the block ends: then the student has its own
    tensors again. The base stays as it is.

    Args:
        base: The model that was trained.
        student: What it became: a plain model of the same architecture, or an adapter on the base itself.
        strength: 0 is the base, 1 the student; other values lie on the same line.

    Yields:
        The student.

    Raises:
        SafeSteerError: For a strength that is not finite, another architecture, a bridge, or weights that are
            quantized and differ.

    Example:
        >>> from safesteer.models.mixing import between
        >>> with between(chat, chat.copy(), 0.5) as half:
        ...     len(ss.generate(half, ["Hello"], max_new_tokens=4))
        1
    """
    base, student = as_chat(base), as_chat(student)
    if not math.isfinite(strength):
        raise SafeSteerError(f"The strength must be a number, not {strength}.")
    if is_bridge(student.model) or is_bridge(base.model):
        raise SafeSteerError("A TransformerBridge has no line between weights: pass as_chat(bridge).copy().")
    if shares_weights(base, student):
        with _scaled(student.model, strength):
            yield student
        return
    pairs = _differing(base, student)
    with tensors_put_back(weight for weight, _ in pairs):
        for weight, origin in pairs:
            weight.data = _on_the_line(origin, weight.data, strength)
        yield student


def _differing(base: ChatModel, student: ChatModel) -> list[tuple[nn.Parameter, Tensor]]:
    """Return (weight of the student, the base's) for each weight that training changed."""
    if is_quantized(base.model) or is_quantized(student.model):
        raise SafeSteerError("There is no line between quantized weights: load both without quantize.")
    origins = {name: p.detach() for name, p in base.model.named_parameters()}
    weights = dict(student.model.named_parameters())
    if {n: p.shape for n, p in weights.items()} != {n: p.shape for n, p in origins.items()}:
        raise SafeSteerError(
            f"'{student.name}' is not a student of '{base.name}': their weights differ in shape."
        )
    pairs = [(p, origins[name].to(p.device)) for name, p in weights.items()]
    return [(p, origin) for p, origin in pairs if not torch.equal(p.detach().float(), origin.float())]


def _on_the_line(origin: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Return base + strength (student - base) in the student's precision; exact at 0 and 1."""
    return torch.lerp(origin.float(), weight.float(), strength).to(weight.dtype)


@contextmanager
def _scaled(model: nn.Module, strength: float) -> Iterator[None]:
    """Let the adapters of a model count `strength` times as much inside the block."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: strength * scale for name, scale in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
