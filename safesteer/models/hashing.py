"""A hash of a model's weights: tells two states of one model apart, fine-tunes too.

1. Take every weight by its name, and from each a few values that lie evenly in it, or all of them.
2. Round them to bfloat16, so that one model in two precisions has one hash.
3. Hash names, shapes and values.
"""

import hashlib

import torch
from torch import nn

from safesteer.models.parts import hf_model
from safesteer.models.placement import weights_in

N_VALUES = 64  # of each weight: a model of 70B parameters is hashed in a second


def weights_hash(model: nn.Module, n_values: int | None = N_VALUES) -> str:
    """Hash the weights of a model, as 16 hex digits.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        n_values: How many values of each weight are read; None: all.

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
            digest.update(flat[::step].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
