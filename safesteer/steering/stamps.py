"""What a value that was read from one model says of where it belongs: written, and checked before use.

A direction and a reader of harmfulness are vectors of one layer of one model. Both are safetensors files
with their metadata as JSON in the header, and both are refused where they do not belong.
"""

from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch

from safesteer._errors import SafeSteerError
from safesteer._files import from_json, read_tensors
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.templates import template_hash

T = TypeVar("T")


@runtime_checkable
class Stamped(Protocol):
    """A value that belongs to one layer of one model, read through one chat template."""

    @property
    def layer(self) -> int:
        """The block whose input it reads or moves."""
        ...

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        ...

    @property
    def template_hash(self) -> str:
        """The hash of the model's chat template."""
        ...


def stamp_of(chat: ChatModel) -> dict[str, str]:
    """Return the fields that say which model a value belongs to."""
    return {
        "model": chat.name,
        "fingerprint": chat.fingerprint,
        "template_hash": template_hash(chat.tokenizer),
    }


def check_stamp(value: Stamped, width: int, chat: ModelLike, source: str) -> None:
    """Check that a value belongs to `chat`.

    Args:
        value: What was saved with the stamp of its model.
        width: Length of its vector.
        chat: The model that it will be used with.
        source: What the value is called in the error.

    Raises:
        SafeSteerError: Names what differs between the value's model and `chat`.
    """
    chat = as_chat(chat)
    fingerprint = chat.fingerprint
    if value.fingerprint == chat.fingerprint_through(torch.float16):  # read from the same weights in float16
        fingerprint = value.fingerprint
    compared = {
        "width": (width, chat.d_model),
        "model fingerprint": (value.fingerprint, fingerprint),
        "chat template": (value.template_hash, template_hash(chat.tokenizer)),
    }
    for name, (there, here) in compared.items():
        if there != here:
            raise SafeSteerError(
                f"{source} was made for '{value.model}' and does not fit '{chat.name}': the"
                f" {name} differs ({there} there, {here} here)."
            )
    if not 0 <= value.layer < chat.n_layers:
        raise SafeSteerError(
            f"{source} is of layer {value.layer}, but '{chat.name}' has {chat.n_layers} layers."
        )


def load_stamped(kind: type[T], path: str | Path, name: str) -> T:
    """Read a frozen value from a safetensors file: tensors and metadata are its fields.

    Args:
        kind: The value's class.
        path: The file.
        name: What the file is called in the error, such as "a direction file".

    Raises:
        SafeSteerError: Where the file is missing, damaged, or holds something else.
    """
    tensors, metadata = read_tensors(Path(path))
    try:
        fields: dict[str, Any] = {**tensors, **metadata}
        return cast(T, from_json(kind, fields))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SafeSteerError(f"{path} is not {name} of this version.") from error
