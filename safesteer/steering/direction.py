"""A direction that was chosen, as a value: applied, saved, and refused where it does not belong.

The file is safetensors with its metadata as JSON in the header: operation, hook point, layer
convention (the input of block l), position, coefficient, and hashes of model, chat template and
prompts. Loading it against another model is an error that says what differs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._files import read_tensors, write_tensors
from safesteer._version import __version__
from safesteer.models.batch import template_hash
from safesteer.models.chat_model import ChatModel
from safesteer.steering import interventions
from safesteer.steering.interventions import Scope

OPERATIONS = ("add", "ablate", "clamp")


@dataclass(frozen=True, eq=False)
class Direction:
    """A steering direction with everything needed to apply it again, and to refuse to misapply it.

    `vector` has its raw length (that of the difference of means); `operation` "add" adds coeff *
    vector to `hook_point` of block `layer`, "clamp" sets the projection there to coeff, "ablate"
    projects it out of every write. The hashes name the model, chat template and prompts it came from.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    position: str
    extraction: str
    coeff: float = 1.0
    operation: str = "add"
    hook_point: str = "resid_pre"
    model: str = ""
    fingerprint: str = ""
    template_hash: str = ""
    prompts_hash: str = ""
    version: str = __version__

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        return self.vector / self.vector.norm()

    def with_coeff(self, coeff: float) -> "Direction":
        return replace(self, coeff=coeff)

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but the vector."""
        return {f.name: getattr(self, f.name) for f in fields(Direction) if f.name != "vector"}

    def save(self, path: str | Path) -> None:
        """One safetensors file; its header holds the metadata as JSON."""
        write_tensors(Path(path), {"vector": self.vector.contiguous()}, self.metadata)

    @classmethod
    def load(cls, path: str | Path, chat: ChatModel | None = None) -> "Direction":
        """Read a direction; with `chat`, raise SafeSteerError if it belongs to another model."""
        tensors, meta = read_tensors(Path(path))
        try:
            direction = cls(vector=tensors["vector"], **meta)
        except (KeyError, TypeError) as error:
            raise SafeSteerError(f"{path} is not a direction file of this version.") from error
        if chat is not None:
            direction.check(chat, str(path))
        return direction

    def check(self, chat: ChatModel, source: str = "The direction") -> None:
        """Raise SafeSteerError naming what differs between the direction's model and `chat`."""
        ours = {
            "width": (len(self.vector), chat.d_model),
            "model fingerprint": (self.fingerprint, chat.fingerprint),
            "chat template": (self.template_hash, template_hash(chat.tokenizer)),
        }
        for what, (here, there) in ours.items():
            if here != there:
                raise SafeSteerError(
                    f"{source} was made for '{self.model}' and does not fit '{chat.name}': the"
                    f" {what} differs ({here} there, {there} here)."
                )
        if not 0 <= self.layer < chat.n_layers:
            raise SafeSteerError(
                f"{source} steers layer {self.layer}, but '{chat.name}' has {chat.n_layers} layers."
            )

    def __repr__(self) -> str:
        return (
            f"Direction({self.extraction}, position {self.position}, {self.hook_point} of layer"
            f" {self.layer}, coeff {self.coeff:g}, norm {self.vector.norm():.2f}, {self.model!r})"
        )


@contextmanager
def steer(
    chat: ChatModel,
    direction: Direction,
    coeff: float | None = None,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """The teacher of Eq. 1: `chat` with the direction applied, inside the block.

    Adds coeff * vector at the direction's layer; a direction of operation "clamp" sets the projection
    to `coeff` there, one of operation "ablate" is projected out everywhere. `coeff` defaults to the
    direction's own. Works alike on a plain model and on a bridge; for `scope` see `steering`.
    """
    strength = direction.coeff if coeff is None else coeff
    where = {"scope": scope, "n_last": n_last, "prompt_width": prompt_width}
    with _operation(chat, direction, strength, where):
        yield


def _operation(chat: ChatModel, direction: Direction, strength: float, where: dict[str, Any]):
    model, vector = chat.model, direction.vector.to(chat.device)
    if direction.operation == "add":
        return interventions.add(model, vector, direction.layer, strength, **where)
    if direction.operation == "clamp":
        return interventions.clamp(model, vector, direction.layer, strength, **where)
    if direction.operation == "ablate":
        return interventions.ablate(model, vector, **where)
    raise SafeSteerError(f"Unknown operation '{direction.operation}': use one of {', '.join(OPERATIONS)}.")
