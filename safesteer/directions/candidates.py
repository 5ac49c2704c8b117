"""Candidate directions as a value: one vector per position and layer, of which one is chosen."""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.prompts.prompt_set import PromptSet
from safesteer.steering.direction import Direction
from safesteer.steering.stamps import stamp_of


@dataclass(frozen=True, eq=False)
class Candidates:
    """One vector per position and layer, on the CPU. `positions` are labels such as "-1" or "mean".

    `shuffled` holds what the same extraction reads from the same activations when the labels are
    shuffled: a control. None where there were no labels.
    """

    vectors: Float[Tensor, "n_pos n_layers d_model"]
    positions: tuple[str, ...]
    extraction: str
    shuffled: Float[Tensor, "n_pos n_layers d_model"] | None = None
    layers: tuple[int, ...] | None = None  # that have a vector; None: all

    @classmethod
    def only(cls, direction: Direction, n_layers: int) -> "Candidates":
        """Return a direction as the one candidate of a model; at the other layers the vectors are zero."""
        vectors = torch.zeros(1, n_layers, len(direction.vector))
        vectors[0, direction.layer] = direction.vector
        return cls(vectors, (direction.position,), direction.extraction, layers=(direction.layer,))

    def has(self, layer: int) -> bool:
        """Return whether there are vectors for a layer."""
        return self.layers is None or layer in self.layers

    def index(self, position: str, layer: int) -> tuple[int, int]:
        """Return the indices of a candidate in `vectors`.

        Raises:
            SafeSteerError: For a position or a layer that was not read.
        """
        n_layers = self.vectors.shape[1]
        if position not in self.positions or not 0 <= layer < n_layers or not self.has(layer):
            layers = f"0 to {n_layers - 1}" if self.layers is None else ", ".join(map(str, self.layers))
            raise SafeSteerError(
                f"There is no candidate at position {position!r} of layer {layer}: the positions are"
                f" {', '.join(map(repr, self.positions))} and the layers {layers}."
            )
        return self.positions.index(position), int(layer)

    def direction(
        self,
        chat: ModelLike,
        position: str,
        layer: int,
        *,
        coeff: float = 1.0,
        prompts: PromptSet | None = None,
    ) -> Direction:
        """Return one candidate as a direction, stamped with the model that it belongs to.

        Args:
            chat: The model that the candidates were read from.
            position: One of `positions`.
            layer: Block at whose input the direction is added, from 0.
            coeff: Coefficient of the direction.
            prompts: The prompts that the candidates were read from; their hash is kept.

        Raises:
            SafeSteerError: For a position or a layer that was not read.
        """
        chat, at = as_chat(chat), self.index(position, layer)
        return Direction(
            vector=self.vectors[at].cpu(),
            layer=at[1],
            position=position,
            extraction=self.extraction,
            coeff=float(coeff),
            **stamp_of(chat),
            prompts_hash=prompts.hash if prompts else "",
        )

    def to_frame(self) -> pd.DataFrame:
        """Return the length of each vector, in residual units: a row per position, a column per layer."""
        table = pd.DataFrame(self.vectors.norm(dim=-1).cpu().numpy(), index=list(self.positions))
        return table.rename_axis(index="position", columns="layer")

    def __repr__(self) -> str:
        n_pos, n_layers, d_model = self.vectors.shape
        return f"Candidates({self.extraction}: {n_pos} positions x {n_layers} layers, d_model {d_model})"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(escape=True, float_format="{:.2f}".format)
        return f"<p>{self!r}, length of each vector:</p>{table}"
