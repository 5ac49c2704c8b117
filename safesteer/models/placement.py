"""Where a model's weights lie: on one device, or spread by accelerate over GPUs, CPU memory and disk.

A map says where each block lies. What stands outside the blocks (embedding, final norm, head) always lies on
the model's first device, together with inputs and final hidden states, so little else of SafeSteer needs to
know of a map. A block in the CPU's memory or on the disk comes to that device for as long as it runs.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeAlias, cast

import torch
from accelerate.utils import align_module_device, compute_module_sizes, get_max_memory
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.parts import blocks, decoder, hf_model

Place: TypeAlias = int | str  # an accelerator, "cpu" or "disk"
DeviceMap: TypeAlias = str | Mapping[str, Place]  # "auto", "disk", or a place for each part by its name
WORDS = ("auto", "disk")
ROOM = 0.85  # of free memory that weights may fill; activations and caches need memory too
SLOW = ("cpu", "disk")


def input_device(model: nn.Module) -> torch.device:
    """Return the device of the embedding: where inputs must be.

    Raises:
        SafeSteerError: For an embedding that another loader has put on the disk.
    """
    device = cast(Tensor, hf_model(model).get_input_embeddings().weight).device
    if device.type == "meta":
        raise _foreign_map(model)
    return device


def require_head_with_embedding(model: nn.Module) -> None:
    """Raise SafeSteerError where another loader has put the head on another device than the embedding."""
    head = cast(nn.Linear, hf_model(model).get_output_embeddings())
    if head.weight.device != input_device(model):
        raise _foreign_map(model)


def _foreign_map(model: nn.Module) -> SafeSteerError:
    return SafeSteerError(
        f"Embedding and head of {type(hf_model(model)).__name__} are not together on one device: open the"
        " model with safesteer.load_model(name, device_map='auto')."
    )


def is_spread(model: nn.Module) -> bool:
    """Return whether a map has put the model on several places."""
    places = {str(place) for place in getattr(hf_model(model), "hf_device_map", {}).values()}
    return len(places) > 1 or "disk" in places


def is_offloaded(model: nn.Module) -> bool:
    """Return whether some weights are on their device only while they are used."""
    return is_spread(model) and any(p.is_meta for p in hf_model(model).parameters())


def require_together(model: nn.Module) -> None:
    """Raise SafeSteerError for a model that a map has spread: its hooks and files belong to it alone."""
    if is_spread(model):
        raise SafeSteerError(
            f"A {type(hf_model(model)).__name__} that a device map has spread cannot be copied: load it again"
            " (safesteer.load_model), or give `align` its name, with the map as the recipe's device_map."
        )


def require_trainable(weights: Iterable[Tensor]) -> None:
    """Raise SafeSteerError where some of the weights are on their device only while they are used."""
    if any(weight.is_meta for weight in weights):
        raise SafeSteerError(
            "Weights that a device map has put into the CPU's memory or on the disk cannot train: train an"
            " adapter (distill.lora_rank=16), or spread the blocks over processes (distill.sharded, no map)."
        )


@contextmanager
def weights_in(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the weights that a module itself holds, by name; offloaded ones are there inside the block."""
    with align_module_device(module):
        yield {name: weight.detach() for name, weight in module.named_parameters(recurse=False)}


def read_map(device_map: DeviceMap | None) -> DeviceMap | None:
    """Return a map as it is, or read one that a setting holds as JSON: '{"": 0, "model.layers.7": "cpu"}'.

    Raises:
        SafeSteerError: For text that is neither a known word nor such an object.
    """
    if not isinstance(device_map, str) or device_map in WORDS:
        return device_map
    try:
        places = json.loads(device_map)
    except ValueError:
        places = None
    if not isinstance(places, dict):
        raise SafeSteerError(
            f"device_map must be one of {', '.join(WORDS)}, or a place for each part, not '{device_map}'."
        )
    return places


def spread(model: nn.Module, device_map: DeviceMap, device: torch.device | None) -> dict[str, Place]:
    """Give every part of a model its place, the blocks as `device_map` says.

    Args:
        model: The model without weights, on torch's device "meta".
        device_map: "auto" fills the accelerators evenly, then the CPU's memory, then the disk; "disk" leaves
            all blocks there; or a place for each part by its name, as accelerate takes it.
        device: The first device, where all but the blocks lies; None: the first accelerator of the map.

    Raises:
        SafeSteerError: For another word, or a map that leaves out a part, or names what is none.
    """
    names = {module: name for name, module in model.named_modules()}
    layers, inner, outer = {names[block] for block in blocks(model)}, names[decoder(model)], hf_model(model)
    ends = {
        names[cast(nn.Module, end)] for end in (outer.get_input_embeddings(), outer.get_output_embeddings())
    }
    parts = [name for name in _parts(model, "", layers) if name not in layers]
    near = [name for name in parts if name in ends or name.startswith(f"{inner}." if inner else "")]
    others = [name for name in parts if name not in near]  # what reading text does not need, such as eyes
    sizes, order = compute_module_sizes(model), [*sorted(layers, key=_number), *others]
    if isinstance(device_map, str):
        device = device or torch.device("cpu")
        memory = {} if device_map == "disk" else _memory(device, sum(sizes.get(name, 0) for name in near))
        places = _filled({name: sizes.get(name, 0) for name in order}, memory)
    else:
        _check_names(device_map, [*layers, *parts])
        places = {name: _place(name, device_map) for name in order}
        fast = (place for place in device_map.values() if str(place) not in SLOW)
        device = device or torch.device(next(fast, "cpu"))
    return places | dict.fromkeys(near, _written(device))


def _written(device: torch.device) -> Place:
    """Write a device as accelerate does: an accelerator by its number."""
    return device.index or 0 if device.type == "cuda" else str(device)


def _parts(module: nn.Module, name: str, whole: set[str]) -> Iterator[str]:
    """Yield the names of blocks, and of the smallest modules and lone weights around them."""
    around = any(inside.startswith(f"{name}." if name else "") for inside in whole)
    if name in whole or not around:
        yield name
        return
    prefix = f"{name}." if name else ""
    yield from (prefix + weight for weight, _ in module.named_parameters(recurse=False))
    for child_name, child in module.named_children():
        yield from _parts(child, prefix + child_name, whole)


def _number(name: str) -> int:
    """Return the number of a block, the last of its name."""
    return int(name.rpartition(".")[2])


def _check_names(device_map: Mapping[str, Place], parts: Sequence[str]) -> None:
    """Raise SafeSteerError for a name in a map that holds no part: a misspelt one, or a piece of a block."""
    for key in device_map:
        if key and not any(name == key or name.startswith(f"{key}.") for name in parts):
            raise SafeSteerError(
                f"The device map names '{key}', which is no part of the model that can be placed: blocks are"
                f" placed whole, as '{parts[0]}'."
            )


def _place(name: str, device_map: Mapping[str, Place]) -> Place:
    """Look a part up in a map: the longest name that holds it counts."""
    holding = [key for key in device_map if not key or name == key or name.startswith(f"{key}.")]
    if not holding:
        raise SafeSteerError(
            f"The device map has no place for '{name}': name it, or '' for all that is left."
        )
    return device_map[max(holding, key=len)]


def _memory(device: torch.device, near: int) -> dict[Place, float]:
    """Return the bytes that may be filled: this process's accelerators, the first one first, and the CPU.

    Args:
        device: The first device.
        near: Bytes of what lies on it beside the blocks.
    """
    clear_device_cache(garbage_collection=True)  # models that a map has spread refer to themselves
    free = {place: ROOM * float(size) for place, size in get_max_memory().items()}
    n_processes, rank = (
        int(os.environ.get(f"LOCAL_{name}", d)) for name, d in (("WORLD_SIZE", 1), ("RANK", 0))
    )
    first, fast = _written(device), [place for place in free if place not in SLOW]
    usable = [] if device.type == "cpu" else [place for place in fast if isinstance(place, str)]
    if device.type != "cpu":
        usable += [place for place in fast if isinstance(place, int) and place % n_processes == rank]
    room = {place: free[place] for place in sorted(usable, key=lambda place: place != first)}
    room["cpu"] = free.get("cpu", 0.0) / n_processes
    return room | {first: max(0.0, room.get(first, 0.0) - near)}


def _filled(sizes: Mapping[str, int], memory: Mapping[Place, float]) -> dict[str, Place]:
    """Give consecutive parts a place: accelerators evenly, then the CPU, then the disk."""
    fast = sum(size for place, size in memory.items() if place not in SLOW)
    share = min(1.0, sum(sizes.values()) / fast) if fast else 1.0
    rooms = [size if place in SLOW else share * size for place, size in memory.items()]
    ends, places, done = list(accumulate(rooms)), list(memory), 0.0
    result: dict[str, Place] = {}
    for name, size in sizes.items():
        middle, done = done + size / 2, done + size
        result[name] = next((p for p, end in zip(places, ends, strict=True) if middle <= end), "disk")
    return result
