"""How much one forward pass holds where a setting leaves that to the device.

A processor is busy with a few prompts, and more of them only take memory. A GPU takes longer to start the
kernels of a small pass than to compute them, so its passes are larger, and columns that rows share get a pass
of their own only where that saves many.
"""

from typing import NamedTuple

import torch


class PassSizes(NamedTuple):
    """Prompts and tokens of a pass of the sweep."""

    prompts: int
    tokens: int


ON_CPU = PassSizes(prompts=8, tokens=1536)
ON_GPU = PassSizes(prompts=32, tokens=8192)
# Positions that a pass for shared columns has to save on a GPU: about what is read in the time that starting
# a pass takes (estimated for an H200: 1,000 positions of an 8B, 7,000 of a 0.5B).
SAVED = 4096


def sizes_on(device: torch.device | str) -> PassSizes:
    """Return the sizes for a device.

    Example:
        >>> from safesteer.models.pass_sizes import sizes_on
        >>> sizes_on("cpu").prompts
        8
    """
    return ON_CPU if torch.device(device).type == "cpu" else ON_GPU


def pays_to_share(saved: int, device: torch.device | str) -> bool:
    """Return whether a pass of their own for shared columns costs less than the positions that it saves."""
    return torch.device(device).type == "cpu" or saved >= SAVED
