"""Directions in the formats of other tools.

    GGUF              llama.cpp's control vectors: tensors `direction.<l>` added to the OUTPUT of block l,
                      which is the input of block l + 1; llama.cpp knows no l = 0
    a bare tensor     what vLLM's steering plugins load (EasySteer, hotwire-vllm; EasySteer takes GGUF too);
                      the request names the block to whose OUTPUT it is added
    repeng            vectors by block output, as in its `ControlVector.directions`
    steering-vectors  `SteeringVector.layer_activations` with layer_type "decoder_block": block output
    the Hub           the safetensors file with a card

Our layer convention is resid_pre of block l, so a block output l becomes layer l + 1.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError, first_line
from safesteer._files import atomic
from safesteer.directions.candidates import Candidates
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.named import NAMED
from safesteer.steering.direction import Direction

ARCHITECTURE = "controlvector"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_gguf(direction: Direction, path: str | Path, n_layers: int, model_hint: str = "") -> None:
    """Write coeff * vector as a llama.cpp control vector (`llama-cli --control-vector FILE`).

    Args:
        direction: Of operation "add", the only one of llama.cpp, which adds at every position.
        path: The file.
        n_layers: Number of blocks of the model.
        model_hint: Its architecture in llama.cpp's words, such as "llama".

    Raises:
        SafeSteerError: For another operation, or a layer that llama.cpp cannot steer (below 2).

    Example:
        >>> from dataclasses import replace
        >>> from safesteer.directions.formats import read_gguf, write_gguf
        >>> write_gguf(replace(direction, layer=2), folder / "refusal.gguf", n_layers=3)
        >>> sorted(read_gguf(folder / "refusal.gguf"))  # block 1 feeds layer 2
        [1]
    """
    import gguf

    vector, block = _added(direction, "llama.cpp"), direction.layer - 1
    if not 1 <= block < n_layers:
        raise SafeSteerError(
            f"llama.cpp adds to the output of blocks 1 to {n_layers - 1}, so to layers 2 to {n_layers};"
            f" this direction is of layer {direction.layer}."
        )
    with atomic(Path(path)) as work:
        writer = gguf.GGUFWriter(work, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", n_layers)
        writer.add_tensor(f"direction.{block}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def write_tensor(direction: Direction, path: str | Path) -> int:
    """Write coeff * vector as a bare tensor, for vLLM's steering plugins; return the block that it is for.

    hotwire-vllm loads every .pt file of the folder HOTWIRE_VECTORS, and EasySteer one by
    `easysteer.vectors.from_pt_direction(path, layers=[block])`. The scale of a request is 1.

    Args:
        direction: Of operation "add".
        path: The file; its name without .pt is hotwire's id.

    Returns:
        The block to whose output the tensor is added: the layer of a request.

    Raises:
        SafeSteerError: For another operation, or a direction of layer 0, which is no block's output.

    Example:
        >>> from safesteer.directions.formats import write_tensor
        >>> block = write_tensor(direction, folder / "refusal.pt")
        >>> {"id": "refusal", "layer": block, "scale": 1.0}  # a request's "hotwire", as JSON
        {'id': 'refusal', 'layer': 0, 'scale': 1.0}
    """
    vector = _added(direction, "hotwire-vllm (and EasySteer's algorithm 'direct')")
    if direction.layer == 0:
        raise SafeSteerError(
            "vLLM's steering plugins add to the output of a block, so to layers from 1 on; this direction is"
            " of layer 0."
        )
    with atomic(Path(path)) as work:
        torch.save(vector, work)
    return direction.layer - 1


def _added(direction: Direction, tool: str) -> Float[Tensor, " d_model"]:
    """Return the vector that a tool which adds is to add."""
    if direction.operation != "add":
        raise SafeSteerError(
            f"{tool} can only add a vector, and this direction is of '{direction.operation}'."
        )
    return (direction.coeff * direction.vector).float().cpu().clone()


def read_gguf(path: str | Path) -> dict[int, Tensor]:
    """Read the vectors of a llama.cpp control-vector file.

    Returns:
        Vectors by block output, as `from_block_outputs` takes them.

    Raises:
        SafeSteerError: For a file that is not a control vector in GGUF.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        field = reader.get_field("general.architecture")
        architecture = bytes(field.parts[field.data[0]]).decode() if field else ""
    except (OSError, ValueError, IndexError) as error:
        raise SafeSteerError(f"{path} is not a GGUF file: {error}") from error
    if architecture != ARCHITECTURE:
        raise SafeSteerError(f"{path} is a GGUF file of '{architecture}', not a control vector.")
    return {
        int(tensor.name.removeprefix("direction.")): torch.from_numpy(np.array(tensor.data)).float()
        for tensor in reader.tensors
        if tensor.name.startswith("direction.")
    }


def from_block_outputs(chat: ModelLike, vectors: Mapping[int, Any], source: str = "given") -> Candidates:
    """Take vectors that were made to be added to block outputs, one per block, as candidates.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        vectors: By block, from 0; negative ones count from the end. Tensors or arrays of width d_model.
        source: Where they come from; becomes the name of the extraction.

    Returns:
        Candidates at the position "given"; layers without a vector are zero.

    Raises:
        SafeSteerError: For vectors of another width, or of a block that the model does not have.
    """
    chat, layers = as_chat(chat), []
    by_layer = torch.zeros((1, chat.n_layers, chat.d_model))
    for block, value in vectors.items():
        layer = (block + chat.n_layers if block < 0 else block) + 1
        vector = torch.as_tensor(value).detach().float().flatten()
        if len(vector) != chat.d_model:
            raise SafeSteerError(
                f"The {source} vector of block {block} has width {len(vector)}; '{chat.name}' has"
                f" {chat.d_model}."
            )
        if not 0 < layer <= chat.n_layers:
            raise SafeSteerError(
                f"The {source} vectors name block {block}; '{chat.name}' has {chat.n_layers}."
            )
        if layer < chat.n_layers:  # the last block's output feeds no block: it can't be steered here
            by_layer[0, layer], layers = vector, [*layers, layer]
    return Candidates(by_layer, ("given",), source, layers=tuple(sorted(layers)))


def from_repeng(chat: ModelLike, control_vector: Any) -> Candidates:
    """Take a repeng `ControlVector`, or its dictionary of directions, as candidates.

    Raises:
        SafeSteerError: For vectors that do not fit the model.
    """
    return from_block_outputs(chat, getattr(control_vector, "directions", control_vector), "repeng")


def from_steering_vectors(chat: ModelLike, steering_vector: Any) -> Candidates:
    """Take a `SteeringVector` of steering-vectors, or its dictionary of activations, as candidates.

    Raises:
        SafeSteerError: For vectors of other places than whole blocks, or that do not fit the model.
    """
    layer_type = getattr(steering_vector, "layer_type", "decoder_block")
    if layer_type != "decoder_block":
        raise SafeSteerError(f"Only vectors of whole blocks can be read, and this one is of '{layer_type}'.")
    by_block = getattr(steering_vector, "layer_activations", steering_vector)
    return from_block_outputs(chat, by_block, "steering-vectors")


def push_to_hub(direction: Direction, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload the direction file with a card to a model repository on the Hub.

    Args:
        direction: What is uploaded.
        repo_id: Such as "me/refusal-direction"; made where it does not exist.
        private: Whether a new repository is private: a refusal direction is dual-use.
        token: Of the Hub (None: the one you are logged in with).

    Returns:
        The repository's address.

    Raises:
        SafeSteerError: Where the upload fails.
    """
    from huggingface_hub import HfApi

    folder = Path(tempfile.mkdtemp())
    try:
        direction.save(folder / "direction.safetensors")
        (folder / "README.md").write_text(_card(direction), encoding="utf-8")
        api = HfApi(token=token)
        address = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="model")
        return str(address)
    except SafeSteerError:
        raise
    except Exception as error:  # the Hub raises whatever it likes
        raise SafeSteerError(f"Cannot upload to '{repo_id}': {first_line(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _card(direction: Direction) -> str:
    """Write the model card. A model that is not the Hub's is called by its name alone, without its path."""
    name, metadata = direction.model, "library_name: safesteer\ntags: [safesteer, steering-vector]\n"
    origin = NAMED[name].base_model if name in NAMED else name
    if HUB_ID.fullmatch(origin) and not Path(origin).exists():
        metadata += f"base_model: {origin}\n"
    else:
        origin = Path(name).name
    return f"""---
{metadata}---

# A steering direction of {origin}

Read by {direction.extraction} at position {direction.position}; operation `{direction.operation}` at
`{direction.hook_point}` of block {direction.layer}, coefficient {direction.coeff:g}. The file names the
model, chat template and prompts it came from, and is refused with others:

    direction = safesteer.Direction.load("direction.safetensors", chat)
    with safesteer.steer(chat, direction):
        ...

A refusal direction is dual-use: subtracted or ablated, it weakens refusals.
"""
