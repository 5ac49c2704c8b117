"""Interventions on the residual stream: one implementation for Hugging Face models and bridges.

    add     h_l <- h_l + coeff * d              at resid_pre of block l (Eq. 1)
    clamp   h_l <- h_l + (value - h_l . d^) d^  the projection on d^ set to a value
    gate    add, only in rows whose prompt projects above a threshold (decided row by row)
    ablate  x <- x - (x . d^) d^                for every write: embedding, attention, MLP outputs

All take the model first: a ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).

`scope` says where in the text an intervention acts: "all" positions, the "prompt", the "answer", or the
"last" n prompt positions (all of a shorter prompt). Columns are counted from the start of the text, through
the KV cache, so cached and uncached decoding agree. Where a prompt ends is known to SafeSteer's own passes
and to `generate`; with any other call, pass `prompt_width`, the number of prompt columns.

`adding`, `clamping` and `ablating` are the same as plain edits by their points, for `steer` and its gate.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safesteer._errors import SafeSteerError, expect
from safesteer.models.chat_model import ModelLike, module_of
from safesteer.models.parts import text_config
from safesteer.models.passes import rows_in_order
from safesteer.models.writes import writes_of
from safesteer.steering.hooks import Edits, Point, apply_hooks
from safesteer.steering.scopes import Columns, Moves, Scope, apply_in_scope, columns_of

Vector = Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"]


def _checked(model: nn.Module, vector: Tensor) -> Tensor:
    """Refuse what is no vector of the residual stream; torch broadcasts one of length 1 without a word."""
    expect(Tensor, vector)
    if vector.shape[-1] != (d_model := text_config(model).hidden_size):
        raise SafeSteerError(
            f"A vector of width {vector.shape[-1]} does not fit a residual stream of width {d_model}."
        )
    return vector


def _per_row(vector: Tensor) -> Tensor:
    """Make one vector for the batch, or one per row, ready to broadcast over positions."""
    return vector if vector.dim() == 1 else vector[:, None]


def _unit(vector: Tensor) -> Tensor:
    """Scale to length 1. A zero vector stays zero: it points nowhere, so there is nothing to project on."""
    return _per_row(vector / vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny))


def _along(x: Tensor, unit: Tensor) -> Float[Tensor, "batch pos 1"]:
    """Project every position on a unit vector, or on one per row."""
    return (x @ unit)[..., None] if unit.dim() == 1 else torch.linalg.vecdot(x, unit)[..., None]


@contextmanager
def _apply(
    model: nn.Module, vector: Vector, edits: Moves, scope: Scope, n_last: int, prompt_width: int | None
) -> Iterator[None]:
    """Apply `edits` in scope; where each row has a vector of its own, prompts stay as they are given."""
    alike = vector.dim() == 1
    placed = nullcontext() if alike else rows_in_order(model, len(vector))
    with placed, apply_in_scope(model, edits, scope, n_last, prompt_width, rows_may_leave=alike):
        yield


def adding(vector: Vector, layer: int, coeff: float) -> Moves:
    """Return the edit of `add`, by its point."""
    shift = coeff * _per_row(vector)
    return {("resid_pre", layer): lambda h: h + shift.to(h)}


def clamping(vector: Vector, layer: int, value: float) -> Moves:
    """Return the edit of `clamp`, by its point."""
    unit = _unit(vector)

    def set_to(h: Tensor) -> Tensor:
        u = unit.to(h)
        return torch.addcmul(h, value - _along(h, u), u)

    return {("resid_pre", layer): set_to}


def ablating(model: nn.Module, vector: Vector) -> Moves:
    """Return the edits of `ablate`, by their points."""
    unit = _unit(vector)
    return dict.fromkeys(_writes(model), lambda x: _project_out(x, unit))


@contextmanager
def add(
    chat: ModelLike,
    vector: Vector,
    layer: int,
    coeff: float = 1.0,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Add coeff * vector to resid_pre of `layer` inside the block (Eq. 1).

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        vector: One for all, [d_model], or one per prompt (per row of your own batch), [batch, d_model].
        layer: The block whose input is moved.
        coeff: Multiple of the vector that is added.
        scope: Where in the text it acts: "all", "prompt", "answer" or "last".
        n_last: Number of prompt positions for "last".
        prompt_width: Prompt columns, where SafeSteer does not run the passes itself.

    Raises:
        SafeSteerError: For a vector of another width, an unknown scope, or where the end of the prompt is not
            known.

    Example:
        >>> with ss.add(chat, direction.vector, layer=1, coeff=5.0):
        ...     steered = ss.generate(chat, ["Hello"], max_new_tokens=4)
        >>> steered == ss.generate(chat, ["Hello"], max_new_tokens=4)
        False
    """
    model = module_of(chat)
    edits = adding(_checked(model, vector), layer, coeff)
    with _apply(model, vector, edits, scope, n_last, prompt_width):
        yield


@contextmanager
def clamp(
    chat: ModelLike,
    vector: Vector,
    layer: int,
    value: float,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Set the projection of resid_pre of `layer` on the direction to `value` inside the block.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        vector: One for all, [d_model], or one per prompt (per row of your own batch), [batch, d_model]; any
            length.
        layer: The block whose input is moved.
        value: The projection on the unit direction, in units of the residual stream.
        scope: Where in the text it acts: "all", "prompt", "answer" or "last".
        n_last: Number of prompt positions for "last".
        prompt_width: Prompt columns, where SafeSteer does not run the passes itself.

    Raises:
        SafeSteerError: For a vector of another width, an unknown scope, or where the end of the prompt is not
            known.

    Example:
        >>> with ss.clamp(chat, direction.vector, layer=1, value=20.0):
        ...     steered = ss.generate(chat, ["Hello"], max_new_tokens=4)
        >>> steered == ss.generate(chat, ["Hello"], max_new_tokens=4)
        False
    """
    model = module_of(chat)
    edits = clamping(_checked(model, vector), layer, value)
    with _apply(model, vector, edits, scope, n_last, prompt_width):
        yield


class _Gate:
    """The state of `gate`: which rows of the running batch are open."""

    def __init__(
        self, vector: Float[Tensor, " d_model"], threshold: float, coeff: float, at: Columns
    ) -> None:
        self.vector, self.unit, self.threshold, self.coeff, self.at = (
            vector,
            _unit(vector),
            threshold,
            coeff,
            at,
        )
        self.is_open = torch.zeros(0)  # per row: NaN undecided, 0 closed, 1 open

    def decide(self, h: Tensor) -> None:
        """Open or close the rows whose last prompt position this pass holds."""
        past, n_rows = self.at.past, len(self.is_open)
        if past == 0 or n_rows == 0 or len(h) % n_rows:
            self.is_open = h.new_full((len(h),), torch.nan)
        elif len(h) > n_rows:
            self.is_open = self.is_open.repeat_interleave(len(h) // n_rows)
        last = (self.at.start(h)[: len(h), 0] - 1 - past).expand(len(h))
        rows = torch.nonzero((last >= 0) & (last < h.shape[1]))[:, 0]
        above = h[rows, last[rows]] @ self.unit.to(h) > self.threshold
        self.is_open = self.is_open.index_put((rows,), above.to(self.is_open))

    def write(self, h: Tensor) -> Tensor:
        """Add the vector in open rows, from their last prompt position on."""
        acts = (self.at.columns(h) >= self.at.start(h)[: len(h)] - 1).expand(len(h), -1)
        is_open = self.is_open.to(h.device)  # decided at another layer, perhaps on another device
        if bool(is_open[acts.any(1)].isnan().any()):
            raise SafeSteerError("The gate did not see the prompt: read it inside the block.")
        inside = (acts & (is_open == 1)[:, None])[..., None]
        return torch.where(inside, h + self.coeff * self.vector.to(h), h)

    def decide_and_write(self, h: Tensor) -> Tensor:
        self.decide(h)
        return self.write(h)


@contextmanager
def gate(
    chat: ModelLike,
    vector: Float[Tensor, " d_model"],
    layer: int,
    threshold: float,
    coeff: float = 1.0,
    *,
    gate_layer: int | None = None,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Add coeff * vector at `layer`, only in rows whose prompt projects above `threshold`.

    The projection is read at a row's last prompt position. What comes before is already written by
    then, so the addition acts from that position on, through the answer.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        vector: The direction, [d_model].
        layer: The block whose input is moved.
        threshold: Projection of resid_pre on the unit direction, in units of the residual stream.
        coeff: Multiple of the vector that is added.
        gate_layer: The block whose input is projected, at most `layer` (None: `layer`).
        prompt_width: Prompt columns, where SafeSteer does not run the passes itself.

    Raises:
        SafeSteerError: For a vector of another width, a `gate_layer` above `layer`, or where the prompt was
            read outside the block.

    Example:
        >>> from safesteer.steering.interventions import gate
        >>> with gate(chat, direction.vector, layer=1, threshold=1e9, coeff=5.0):  # no row is open
        ...     gated = ss.generate(chat, ["Hello"], max_new_tokens=4)
        >>> gated == ss.generate(chat, ["Hello"], max_new_tokens=4)
        True
    """
    gate_layer = layer if gate_layer is None else gate_layer
    if gate_layer > layer:
        raise SafeSteerError(f"gate_layer {gate_layer} lies above layer {layer}: decide before steering.")
    model = module_of(chat)
    with columns_of(model, prompt_width) as at:
        state = _Gate(_checked(model, vector), threshold, coeff, at)
        edits: Edits = {("resid_pre", layer): state.decide_and_write}
        if gate_layer < layer:
            edits = {("resid_pre", gate_layer): state.decide, ("resid_pre", layer): state.write}
        with apply_hooks(model, edits):
            yield


def _writes(model: nn.Module) -> list[tuple[Point, int]]:
    """Return every point that writes to the residual stream: embedding, attention and MLP outputs."""
    writes = writes_of(model)
    start: Point = "embed" if writes.starts_at_embedding else "resid_pre"
    return [(start, 0), *(("write", i) for i in range(len(writes.places)))]


def _project_out(x: Tensor, unit: Tensor) -> Tensor:
    u = unit.to(x)
    return torch.addcmul(x, _along(x, u), u, value=-1)


@contextmanager
def ablate(
    chat: ModelLike,
    vector: Vector,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Project the direction out of everything that is written to the residual stream, inside the block.

    As Arditi et al. 2024, section 2.4: embedding, every attention output, every MLP output.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        vector: One for all, [d_model], or one per prompt (per row of your own batch), [batch, d_model]; any
            length.
        scope: Where in the text it acts: "all", "prompt", "answer" or "last".
        n_last: Number of prompt positions for "last".
        prompt_width: Prompt columns, where SafeSteer does not run the passes itself.

    Raises:
        SafeSteerError: For a vector of another width, an unknown scope, or where the end of the prompt is not
            known.

    Example:
        >>> from safesteer.steering.hooks import record_resid_pre
        >>> with ss.ablate(chat, direction.vector), record_resid_pre(chat, [1], lambda h: h) as seen:
        ...     _ = ss.generate(chat, ["Hello"], max_new_tokens=1)
        >>> bool((seen[1] @ direction.unit).abs().max() < 1e-4)
        True
    """
    model = module_of(chat)
    edits = ablating(model, _checked(model, vector))
    with _apply(model, vector, edits, scope, n_last, prompt_width):
        yield


@contextmanager
def ablate_placebo(chat: ModelLike, vector: Vector, seed: int = 0) -> Iterator[None]:
    """Move each write as far as `ablate` moves it, along a random axis: the control of ablation.

    TransformerLens's NormMatchedPlacebo on a seeded random basis.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        vector: One for all, [d_model], or one per prompt (per row of your own batch), [batch, d_model].
        seed: Of the random axis.
    """
    from transformer_lens.tools.analysis import NormMatchedPlacebo, random_basis  # slow to import

    model, unit, basis = module_of(chat), _unit(vector), random_basis(vector.shape[-1], 1, seed)
    # TransformerLens calls the reference, whatever its class.
    placebo = NormMatchedPlacebo(cast(Any, lambda base, source: _project_out(base, unit)), basis)
    edits = dict.fromkeys(_writes(model), lambda x: placebo(x, x + basis[:, 0].to(x)))
    with _apply(model, vector, edits, "all", 1, None):
        yield
