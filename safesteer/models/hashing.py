"""A hash of a model's weights: tells two states of one model apart, fine-tunes too.

1. Take every weight by its name, and from each a few values that lie evenly in it, or all of them.
2. Round them to bfloat16, so that one model in two precisions has one hash. (Not float16, by which a value
   can come to lie on the other side of a boundary: compare with a hash that was made through float16.)
3. Hash names, shapes and values.
"""

import hashlib

import torch
from torch import Tensor, nn

from safesteer.models.parts import hf_model
from safesteer.models.placement import weights_in

N_VALUES = 64  # of each weight: a model of 70B parameters is hashed in a second


def weights_hash(
    model: nn.Module, n_values: int | None = N_VALUES, *, through: torch.dtype | None = None
) -> str:
    """Hash the weights of a model, as 16 hex digits.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        n_values: How many values of each weight are read; None: all.
        through: A precision that the weights were once rounded to; None: none.

    Example:
        >>> from safesteer.models.hashing import weights_hash
        >>> weights_hash(chat.model) == weights_hash(chat.copy().model)
        True
    """
    digest = hashlib.sha256()
    names = {n.replace("_original_component.", ""): n for n, _ in hf_model(model).named_parameters()}
    for name in sorted(names):
        owner, _, last = names[name].rpartition(".")
        with weights_in(hf_model(model).get_submodule(owner)) as weights:
            weight = weights[last]
            flat = weight.reshape(-1)
            # An odd step passes through all columns of a matrix whose width is a power of two.
            step = 1 if n_values is None else len(flat) // n_values | 1
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(bfloat16_bytes(flat[::step], through))
    return digest.hexdigest()[:16]


def bfloat16_bytes(values: Tensor, through: torch.dtype | None = None) -> bytes:
    """Return values as they are after rounding to bfloat16, in bytes that are hashed.

    Args:
        values: Weights in any precision.
        through: A precision that they are rounded to before; None: none.

    Example:
        >>> import torch
        >>> from safesteer.models.hashing import bfloat16_bytes
        >>> bfloat16_bytes(torch.ones(2)) == bfloat16_bytes(torch.ones(2, dtype=torch.float16))
        True
    """
    values = values.detach() if through is None else values.detach().to(through)
    return values.to(torch.bfloat16).float().cpu().numpy().tobytes()
