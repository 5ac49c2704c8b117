"""A reader of harmfulness: a logistic regression on one layer's residual stream, as a value.

It says how harmful a prompt is, before anything is answered. Models write that at the tokens of the
instruction (arXiv 2507.11878), and their refusals do not always use it. `directions.reader_fitting` fits one.

What is read of a prompt is `resid_pre` of one layer, pooled: the mean over all of the prompt, or the last
token of the instruction. `pooled_resid_pre` reads it in one pass, which ends at the highest layer wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from safesteer._files import write_tensors
from safesteer._version import __version__
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.forward import earned, final_hidden
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.steering.hooks import Edit, apply_hooks
from safesteer.steering.stamps import check_stamp, load_stamped

Pooling = Literal["prompt", "instruction"]


@dataclass(frozen=True, eq=False, repr=False)
class HarmfulnessReader:
    """Tells harmful prompts by one layer's residual stream; above `threshold` a prompt is harmful.

    Below `clear_below` it is clearly harmless; between the two the reader does not say (None: there is no
    such band).

    The score is the log-odds weight . x + bias, in nats; x is `resid_pre` of block `layer`, the mean over the
    columns of the prompt (pooling "prompt") or at the last token of the instruction (pooling "instruction",
    `n_after` template tokens before the answer). `auc`, `false_alarms` and `hits` come from cross-validation:
    the shares of harmless and of harmful prompts above the threshold; `misses` is that of harmful prompts
    below `clear_below`. `layer_aucs` holds (layer, AUC) of every layer that was tried. The hashes name the
    model, chat template and prompts it came from.
    """

    weight: Float[Tensor, " d_model"]
    bias: float
    layer: int
    pooling: Pooling
    threshold: float = 0.0
    clear_below: float | None = None
    n_after: int = 0
    auc: float | None = None
    false_alarms: float | None = None
    hits: float | None = None
    misses: float | None = None
    layer_aucs: tuple[tuple[int, float], ...] = ()
    model: str = ""
    fingerprint: str = ""
    template_hash: str = ""
    prompts_hash: str = ""
    version: str = __version__

    def scores(
        self,
        chat: ModelLike,
        prompts: Sequence[PromptLike],
        *,
        system: str | None = None,
        batch_size: int = 32,
    ) -> Float[np.ndarray, " n"]:
        """Score prompts: the log-odds that each is harmful, in nats.

        Args:
            chat: A ChatModel, a TransformerBridge, or (model, tokenizer); steering that is on applies.
            prompts: Text, or lists of messages.
            system: A system prompt (None: what the template writes by itself).
            batch_size: Prompts per forward pass.

        Example:
            >>> reader = ss.fit_reader(chat, ss.load_prompts().split("val").first(6))
            >>> reader.scores(chat, ["How do I bake bread?"]).shape
            (1,)
        """
        chat, prompts = as_chat(chat), as_prompts(prompts)
        scores = np.zeros(len(prompts))
        for rows, batch in chat.batched(prompts, batch_size, system=system):
            scores[rows] = self.scores_of(chat.model, batch)
        return scores

    def scores_of(self, model: nn.Module, batch: PromptBatch) -> Float[np.ndarray, " batch"]:
        """Score the prompts of a batch; what continues them is not read."""
        pooled = pooled_resid_pre(model, batch, [self.layer], self.pooling, self.n_after)[:, 0]
        return (pooled @ self.weight.double().cpu() + self.bias).numpy()

    def is_harmful(
        self, chat: ModelLike, prompts: Sequence[PromptLike], *, system: str | None = None
    ) -> list[bool]:
        """Say of each prompt whether its score lies above the threshold.

        Args:
            chat: A ChatModel, a TransformerBridge, or (model, tokenizer); steering that is on applies.
            prompts: Text, or lists of messages.
            system: A system prompt (None: what the template writes by itself).

        Example:
            >>> reader = ss.fit_reader(chat, ss.load_prompts().split("val").first(6))
            >>> reader.is_harmful(chat, ["How do I bake bread?"]) in ([True], [False])
            True
        """
        return (self.scores(chat, prompts, system=system) > self.threshold).tolist()

    @property
    def lower(self) -> float:
        """The score up to which a prompt is clearly harmless: `clear_below`, or else the threshold."""
        return self.threshold if self.clear_below is None else self.clear_below

    @property
    def curve(self) -> pd.DataFrame:
        """Cross-validated AUC per layer, with the columns layer and auc."""
        return pd.DataFrame(list(self.layer_aucs), columns=["layer", "auc"])

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but the weight."""
        return {f.name: getattr(self, f.name) for f in fields(HarmfulnessReader) if f.name != "weight"}

    def to_frame(self) -> pd.DataFrame:
        """Return one row: the metadata without the curve."""
        return pd.DataFrame([{k: v for k, v in self.metadata.items() if k != "layer_aucs"}])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; its header holds the metadata as JSON.

        Example:
            >>> reader = ss.fit_reader(chat, ss.load_prompts().split("val").first(6))
            >>> reader.save(folder / "reader.safetensors")
            >>> ss.HarmfulnessReader.load(folder / "reader.safetensors").metadata == reader.metadata
            True
        """
        write_tensors(Path(path), {"weight": self.weight.contiguous()}, self.metadata)

    @staticmethod
    def load(path: str | Path, chat: ModelLike | None = None) -> "HarmfulnessReader":
        """Read a reader that `save` wrote.

        Args:
            path: The file.
            chat: The model whose prompts it will read; None: not checked.

        Raises:
            SafeSteerError: Where the file is damaged or missing, or belongs to another model than `chat`.

        Example:
            >>> reader = ss.fit_reader(chat, ss.load_prompts().split("val").first(6))
            >>> reader.save(folder / "reader.safetensors")
            >>> ss.HarmfulnessReader.load(folder / "reader.safetensors", chat).layer == reader.layer
            True
        """
        reader = load_stamped(HarmfulnessReader, path, "a reader file")
        if chat is not None:
            reader.check(chat, str(path))
        return reader

    def check(self, chat: ModelLike, source: str = "The reader") -> None:
        """Check that the reader belongs to `chat`.

        Args:
            chat: The model whose prompts it will read.
            source: What the reader is called in the error.

        Raises:
            SafeSteerError: Names what differs between the reader's model and `chat`.
        """
        check_stamp(self, len(self.weight), chat, source)

    def __repr__(self) -> str:
        measured = "" if self.auc is None else f", AUC {self.auc:.3f}"
        if self.hits is not None and self.false_alarms is not None:
            measured += f", {self.hits:.0%} of harmful and {self.false_alarms:.0%} of harmless prompts above"
        return (
            f"HarmfulnessReader({self.pooling}, resid_pre of layer {self.layer}, harmful above"
            f" {self.threshold:.2f}, harmless below {self.lower:.2f}{measured}, {self.model!r})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().T
        return table.to_html(escape=True, header=False, float_format="{:.3g}".format)


def _weights(batch: PromptBatch, pooling: Pooling, n_after: int) -> Float[Tensor, "batch pos"]:
    """Weigh the columns of each row; the weights of a row add up to 1."""
    read = batch.attention_mask.bool() & ~batch.completion_mask
    if pooling == "instruction":  # counted by real tokens: padding may stand before the template's last ones
        last = read.sum(1, keepdim=True) - n_after
        read &= read.cumsum(1) == last.clamp(min=1)
    return read / read.sum(1, keepdim=True)


class _ReadEnough(Exception):
    """Ends a pass: the blocks above have nothing to add."""


@torch.no_grad()
def pooled_resid_pre(
    model: nn.Module, batch: PromptBatch, layers: Sequence[int], pooling: Pooling, n_after: int
) -> Float[Tensor, "batch n_layers d_model"]:
    """Read resid_pre of some layers, pooled over each prompt, in one pass.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        batch: The prompts; what continues them is not read.
        layers: Blocks whose input is read.
        pooling: "prompt" or "instruction".
        n_after: Template tokens between the instruction and the answer.

    Returns:
        One vector per prompt and layer, in float64 on the CPU.
    """
    batch = earned(model, batch)
    weight, width, last = _weights(batch, pooling, n_after), batch.prompt_ids.shape[1], max(layers)
    read, pooled = dict.fromkeys(layers, 0), dict.fromkeys(layers, torch.zeros(()))

    def adding(layer: int) -> Edit:
        def add_up(h: Tensor) -> None:
            # Columns that all rows share come first, as one row.
            part = weight.to(h.device)[:, None, read[layer] : read[layer] + h.shape[1]] @ h.float()
            read[layer] += h.shape[1]
            pooled[layer] = pooled[layer] + part[:, 0].cpu().double()
            if layer == last and read[layer] == width:
                raise _ReadEnough

        return add_up

    try:
        with apply_hooks(model, {("resid_pre", layer): adding(layer) for layer in layers}):
            final_hidden(model, batch)
    except _ReadEnough:
        pass
    return torch.stack([pooled[layer] for layer in layers], dim=1)
