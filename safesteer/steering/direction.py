"""A direction that was chosen, as a value: applied, saved, and refused where it does not belong.

The file is safetensors with its metadata as JSON in the header: operation, hook point, layer
convention (the input of block l), position, coefficient, and hashes of model, chat template and
prompts. Loading it against another model is an error that says what differs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from safesteer._errors import SafeSteerError, expect
from safesteer._files import write_tensors
from safesteer._version import __version__
from safesteer.models.chat_model import ModelLike, module_of
from safesteer.models.parts import blocks, text_config
from safesteer.models.placement import input_device
from safesteer.steering.gating import Closed, closed_moves, gated
from safesteer.steering.interventions import ablating, adding, clamping
from safesteer.steering.reader import HarmfulnessReader
from safesteer.steering.scopes import Moves, Scope, apply_in_scope
from safesteer.steering.stamps import check_stamp, load_stamped

OPERATIONS = ("add", "ablate", "clamp")


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """A steering direction with everything needed to apply it again, and to refuse to misapply it.

    Args:
        vector: It has its raw length, that of the difference of means.
        layer: Block whose input is steered, counted from 0.
        position: Where it was read: "-1" is the last token of the template after the instruction, "mean" the
            mean over a continuation, "given" a vector of your own.
        extraction: How: "instruction" (the paper; Arditi et al. 2024), "prefill", "system", "pca", "probe",
            "given", or another toolkit's name.
        coeff: "add" adds coeff * vector; for "clamp" the projection on the unit vector, in activation units.
        operation: "add", "clamp" (set the projection to coeff), or "ablate" (project it out of every write).
        hook_point: Always "resid_pre", the input of the block.
        model: Name of the model; this and the hashes say what it was read from.
        fingerprint: Hash of the model's weights.
        template_hash: Hash of its chat template.
        prompts_hash: Hash of the prompts.
        version: SafeSteer's.

    Example:
        >>> again = direction.with_coeff(2.0)
        >>> (again.hook_point, again.operation, again.coeff)
        ('resid_pre', 'add', 2.0)
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
        """The vector scaled to length 1."""
        return self.vector / self.vector.norm()

    def with_coeff(self, coeff: float) -> "Direction":
        """Return the same direction with another coefficient."""
        return replace(self, coeff=coeff)

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but the vector."""
        return {f.name: getattr(self, f.name) for f in fields(Direction) if f.name != "vector"}

    def to_frame(self) -> pd.DataFrame:
        """Return one row: the metadata and the norm of the vector."""
        return pd.DataFrame([{**self.metadata, "norm": float(self.vector.norm())}])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; its header holds the metadata as JSON.

        Example:
            >>> direction.save(folder / "direction.safetensors")
            >>> ss.Direction.load(folder / "direction.safetensors").metadata == direction.metadata
            True
        """
        write_tensors(Path(path), {"vector": self.vector.contiguous()}, self.metadata)

    @staticmethod
    def load(path: str | Path, chat: ModelLike | None = None) -> "Direction":
        """Read a direction that `save` wrote.

        Args:
            path: The file.
            chat: The model that it will steer; None: not checked.

        Raises:
            SafeSteerError: Where the file is damaged or missing, or belongs to another model than `chat`.

        Example:
            >>> direction.save(folder / "direction.safetensors")
            >>> again = ss.Direction.load(folder / "direction.safetensors")
            >>> bool((again.vector == direction.vector).all())
            True
        """
        direction = load_stamped(Direction, path, "a direction file")
        if chat is not None:
            direction.check(chat, str(path))
        return direction

    def check(self, chat: ModelLike, source: str = "The direction") -> None:
        """Check that the direction belongs to `chat`.

        Args:
            chat: The model that it will steer.
            source: What the direction is called in the error.

        Raises:
            SafeSteerError: Names what differs between the direction's model and `chat`.
        """
        check_stamp(self, len(self.vector), chat, source)

    def __repr__(self) -> str:
        return (
            f"Direction({self.extraction}, position {self.position}, {self.hook_point} of layer"
            f" {self.layer}, coeff {self.coeff:g}, norm {self.vector.norm():.2f}, {self.model!r})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().T
        return table.to_html(escape=True, header=False, float_format="{:.3g}".format)


def moves_of(model: nn.Module, direction: Direction) -> Moves:
    """Return the edits that apply a direction, by their points.

    Raises:
        SafeSteerError: For an unknown operation, or a direction of another width or depth than the model's.
    """
    width, n_layers = text_config(model).hidden_size, len(blocks(model))
    if direction.vector.shape[-1] != width or not 0 <= direction.layer < n_layers:
        raise SafeSteerError(
            f"The direction has width {direction.vector.shape[-1]} and layer {direction.layer}, and the model"
            f" width {width} and layers 0 to {n_layers - 1}: it belongs to another model."
        )
    vector = direction.vector.to(input_device(model))
    if direction.operation == "add":
        return adding(vector, direction.layer, direction.coeff)
    if direction.operation == "clamp":
        return clamping(vector, direction.layer, direction.coeff)
    if direction.operation == "ablate":
        return ablating(model, vector)
    raise SafeSteerError(f"Unknown operation '{direction.operation}': use one of {', '.join(OPERATIONS)}.")


@contextmanager
def steer(
    chat: ModelLike,
    direction: Direction,
    coeff: float | None = None,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
    gate: HarmfulnessReader | None = None,
    closed: Closed = "nothing",
) -> Iterator[None]:
    """Steer `chat` inside the block: it becomes the teacher of Eq. 1 (arXiv 2606.02530).

    Adds coeff * vector to the residual stream at the direction's layer; a direction of operation "clamp"
    sets the projection to `coeff` there, one of operation "ablate" is projected out everywhere.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        direction: What is applied; its vector is moved to the model's device.
        coeff: Strength; None: the direction's own.
        scope: Where in the text it acts: "all", "prompt", "answer" or "last".
        n_last: Number of prompt positions for "last".
        prompt_width: Prompt columns, where SafeSteer does not run the passes itself.
        gate: Steer only the rows whose prompt this reader takes for harmful, as it reads them without
            steering; None: all rows.
        closed: What happens in rows whose prompt it takes for clearly harmless: "nothing", or "ablate", the
            direction is projected out of every write. Rows between its two thresholds are left alone.

    Raises:
        SafeSteerError: For an unknown operation, scope or `closed`, a reader of a model of another size, or
            where the end of the prompt is not known.

    Example:
        >>> with ss.steer(chat, direction, coeff=5.0):
        ...     steered = ss.generate(chat, ["Hello"], max_new_tokens=4)
        >>> steered == ss.generate(chat, ["Hello"], max_new_tokens=4)
        False
    """
    expect(Direction, direction)
    model = module_of(chat)
    moves = moves_of(model, direction if coeff is None else direction.with_coeff(coeff))
    with ExitStack() as stack:
        if gate is not None:
            vector = direction.vector.to(input_device(model))
            by_row = gated(model, gate, moves, closed_moves(model, vector, closed), prompt_width)
            moves = stack.enter_context(by_row)
        stack.enter_context(apply_in_scope(model, moves, scope, n_last, prompt_width, rows_may_leave=True))
        yield
