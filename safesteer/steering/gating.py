"""Steering that is gated, row by row.

A row is open where a reader takes its prompt for harmful, closed where it takes it for clearly harmless; what
lies between is left alone. A prompt is read once, as it is without any steering, in a pass of its own inside
the pass that needs the answer; that holds wherever the prompt comes again. Which prompts a pass reads,
SafeSteer's own passes tell (`passes.READ_NOW`); with any other call it is seen in the pass that starts at the
first column. Columns that all prompts of a batch share are read in every row, because rows are steered
differently.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.parts import blocks, decoder, text_config
from safesteer.models.passes import READ_NOW, bare, rows_differ, unless_bare
from safesteer.models.traits import traits_of
from safesteer.steering.hooks import Point
from safesteer.steering.interventions import ablating
from safesteer.steering.reader import HarmfulnessReader
from safesteer.steering.scopes import Columns, Moves

Closed = Literal["nothing", "ablate"]


def closed_moves(model: nn.Module, vector: Tensor, closed: str) -> Moves:
    """Return what is done in rows whose gate is closed: their prompts are clearly harmless.

    Raises:
        SafeSteerError: For another word than "nothing" and "ablate".
    """
    if closed not in get_args(Closed):
        raise SafeSteerError(f"closed must be nothing or ablate, not '{closed}'.")
    return ablating(model, vector) if closed == "ablate" else {}


@contextmanager
def gated(
    model: nn.Module, reader: HarmfulnessReader, opened: Moves, closed: Moves, prompt_width: int | None
) -> Iterator[Moves]:
    """Yield edits that do one thing in rows that the reader opens and another in those that it closes.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        reader: Opens the rows whose prompt scores above its threshold, and closes those up to `lower`.
        opened: What is done in open rows.
        closed: What is done in closed rows.
        prompt_width: Prompt columns, where SafeSteer does not run the passes itself.

    Raises:
        SafeSteerError: For a reader of a model of another size.
    """
    width, n_layers = text_config(model).hidden_size, len(blocks(model))
    if len(reader.weight) != width or reader.layer >= n_layers:
        raise SafeSteerError(
            f"The reader reads {len(reader.weight)} numbers at layer {reader.layer}, and the model has"
            f" {width} at each of {n_layers} layers: fit a reader on this model."
        )
    gate = _Gate(model, reader, prompt_width)
    handle = decoder(model).register_forward_pre_hook(unless_bare(gate.see), with_kwargs=True)
    try:
        with rows_differ(model):
            yield gate.by_row(opened, closed)
    finally:
        handle.remove()


class _Gate:
    """Which rows of the running batch are open, and which are closed."""

    def __init__(self, model: nn.Module, reader: HarmfulnessReader, prompt_width: int | None) -> None:
        self.model, self.reader, self.at = model, reader, Columns(prompt_width)
        self.scores: dict[tuple[int, ...], float] = {}  # by the ids of the prompt
        self.batch: PromptBatch | None = None  # whose rows are decided
        self.row_scores: Float[Tensor, " rows"] | None = None

    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Decide for a pass that is not SafeSteer's own and begins, as a forward pre-hook of the decoder."""
        if READ_NOW.get() is not None:
            return
        self.at.read_cache(module, args, kwargs)
        if self.at.past == 0:
            self.decide(self._prompts_of(args, kwargs))

    def _prompts_of(self, args: tuple, kwargs: dict[str, Any]) -> PromptBatch:
        """Return the prompts that a pass begins with."""
        width, ids = self.at.prompt_width, args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None and ids is not None else mask
        if width is None or ids is None or ids.shape[1] < width or mask is None or mask.dim() != 2:
            raise SafeSteerError(
                "A gate needs to see the whole prompt and to know where it ends: use safesteer.generate, or"
                " pass prompt_width=ids.shape[1] and give the model all ids of the prompt at once."
            )
        is_answer = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= width
        return PromptBatch(ids, mask, is_answer)

    def decide(self, batch: PromptBatch) -> None:
        """Score the rows of a batch; prompts that are new are read with all steering put aside."""
        is_prompt = (batch.attention_mask.bool() & ~batch.completion_mask).cpu()
        ids = batch.prompt_ids.cpu()
        rows = [tuple(row[inside].tolist()) for row, inside in zip(ids, is_prompt, strict=True)]
        new = sorted(set(rows) - self.scores.keys(), key=len)
        pads = traits_of(self.model).pads
        for _, group in groupby(new, key=lambda row: 0 if pads else len(row)):
            heads = list(group)
            alone = PromptBatch.from_ids(heads, [[] for _ in heads], device=batch.prompt_ids.device)
            with bare():
                scores = self.reader.scores_of(self.model, alone)
            self.scores.update(zip(heads, scores.tolist(), strict=True))
        scores = [self.scores[row] for row in rows]
        self.batch, self.row_scores = batch, torch.tensor(scores, dtype=torch.float64)

    def by_row(self, opened: Moves, closed: Moves) -> Moves:
        """Return edits that do one thing in open rows and another in closed ones."""

        def edit_at(point: tuple[Point, int]) -> Callable[[Tensor], Tensor]:
            def edit(h: Tensor) -> Tensor:
                is_open, is_closed = self._rows(h)
                in_open = opened[point](h) if point in opened else h
                in_closed = closed[point](h) if point in closed else h
                return torch.where(is_open, in_open, torch.where(is_closed, in_closed, h))

            return edit

        return {point: edit_at(point) for point in {**opened, **closed}}

    def _rows(self, h: Tensor) -> tuple[Bool[Tensor, "rows 1 1"], Bool[Tensor, "rows 1 1"]]:
        """Return which rows of `h` are open and which closed; several samples per prompt are neighbours."""
        batch = READ_NOW.get()
        if batch is not None and batch is not self.batch:
            self.decide(batch)
        if self.row_scores is None or len(h) % len(self.row_scores):
            raise SafeSteerError("The gate did not see the prompt: read it inside the block.")
        scores = self.row_scores.repeat_interleave(len(h) // len(self.row_scores))[:, None, None]
        is_open, is_closed = scores > self.reader.threshold, scores <= self.reader.lower
        return is_open.to(h.device), is_closed.to(h.device)
