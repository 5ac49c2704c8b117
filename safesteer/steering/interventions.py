"""Interventions on the residual stream: one implementation for Hugging Face models and bridges.

    add     h_l <- h_l + coeff * d              at resid_pre of block l (Eq. 1)
    clamp   h_l <- h_l + (value - h_l . d^) d^  the projection on d^ set to a value
    gate    add, only in rows whose prompt projects above a threshold (decided row by row)
    ablate  x <- x - (x . d^) d^                for every write: embedding, attention, MLP outputs

`scope` says where in the text an intervention acts: "all" positions, the "prompt", the "answer", or
the "last" n prompt positions (n up to the length of the shortest prompt). Columns are counted from
the start of the text, through the KV cache, so cached and uncached decoding agree. Where a prompt
ends is known to SafeSteer's own passes and to `generate`; with any other call, pass `prompt_width`,
the number of prompt columns.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.chat_model import blocks, hf_model
from safesteer.models.forward import ANSWER_START
from safesteer.steering.hooks import Edit, Point, apply_hooks

Scope = Literal["all", "prompt", "answer", "last"]


class _Columns:
    """Which columns of the text the running pass holds, and where each row's answer starts."""

    def __init__(self, prompt_width: int | None) -> None:
        self.past, self.prompt_width = 0, prompt_width

    def look(self, module, args, kwargs) -> None:
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else cache.get_seq_length()

    def start(self, h: Tensor) -> Int[Tensor, "rows 1"]:
        """Column of each row's first answer token; one row where all rows share it."""
        found = ANSWER_START.get()
        if self.prompt_width is not None:
            found = torch.tensor([self.prompt_width])
        if found is None:
            raise SafeSteerError(
                "This intervention needs to know where the prompt ends: use safesteer.generate, or pass"
                " prompt_width=ids.shape[1]."
            )
        if len(h) % len(found) == 0:  # several samples a prompt: neighbours share one
            found = found.repeat_interleave(len(h) // len(found))
        elif len(h) > 1:
            raise SafeSteerError(f"A batch of {len(h)} rows does not continue {len(found)} prompts.")
        return found[:, None].to(h.device)

    def columns(self, h: Tensor) -> Int[Tensor, "1 pos"]:
        return self.past + torch.arange(h.shape[1], device=h.device)[None]


@contextmanager
def _columns(model: nn.Module, prompt_width: int | None) -> Iterator[_Columns]:
    at = _Columns(prompt_width)
    handle = hf_model(model).get_decoder().register_forward_pre_hook(at.look, with_kwargs=True)
    try:
        yield at
    finally:
        handle.remove()


def _inside(scope: Scope, n_last: int, at: _Columns, h: Tensor) -> Bool[Tensor, "rows pos 1"]:
    column, start = at.columns(h), at.start(h)
    if scope == "prompt":
        found = column < start
    elif scope == "answer":
        found = column >= start
    else:
        found = (column < start) & (column >= start - n_last)
    if len(found) > len(h):  # columns that all rows share are read once
        if scope == "last" and bool(found.any()):
            raise SafeSteerError(
                f"The last {n_last} prompt positions reach into the part that all prompts share; use fewer."
            )
        found = found[:1]
    return found[..., None]


@contextmanager
def _scoped(
    model: nn.Module,
    edits: dict[tuple[Point, int], Callable[[Tensor], Tensor]],
    scope: Scope,
    n_last: int,
    prompt_width: int | None,
) -> Iterator[None]:
    """`hooked`, with the edits confined to the columns of `scope`."""
    if scope not in ("all", "prompt", "answer", "last"):
        raise SafeSteerError(f"scope must be all, prompt, answer or last, not '{scope}'.")
    if scope == "all":
        with apply_hooks(model, edits):  # type: ignore[arg-type]
            yield
        return
    with _columns(model, prompt_width) as at:

        def confined(edit: Callable[[Tensor], Tensor]) -> Edit:
            return lambda h: torch.where(_inside(scope, n_last, at, h), edit(h), h)

        with apply_hooks(model, {point: confined(edit) for point, edit in edits.items()}):
            yield


Vector = Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"]


def _per_row(vector: Tensor) -> Tensor:
    """One vector for the batch, or one a row, ready to broadcast over positions."""
    return vector if vector.dim() == 1 else vector[:, None]


def _unit(vector: Tensor) -> Tensor:
    """A zero vector stays zero: it points nowhere, so there is nothing to project on."""
    return _per_row(vector / vector.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny))


def _along(x: Tensor, unit: Tensor) -> Float[Tensor, "batch pos 1"]:
    """Projection of every position on a unit vector, or on one a row."""
    return (x @ unit)[..., None] if unit.dim() == 1 else torch.linalg.vecdot(x, unit)[..., None]


@contextmanager
def add(
    model: nn.Module,
    vector: Vector,
    layer: int,
    coeff: float = 1.0,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Add coeff * vector to resid_pre of `layer`, at every position and step by default (Eq. 1).

    One vector for the batch, or one a row (several candidates packed in one batch).
    """
    shift = coeff * _per_row(vector)
    edits = {("resid_pre", layer): lambda h: h + shift.to(h)}
    with _scoped(model, edits, scope, n_last, prompt_width):  # type: ignore[arg-type]
        yield


@contextmanager
def clamp(
    model: nn.Module,
    vector: Vector,
    layer: int,
    value: float,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Set the projection of resid_pre of `layer` on the direction to `value` (residual units)."""
    unit = _unit(vector)

    def set_to(h: Tensor) -> Tensor:
        u = unit.to(h)
        return torch.addcmul(h, value - _along(h, u), u)

    with _scoped(model, {("resid_pre", layer): set_to}, scope, n_last, prompt_width):
        yield


@contextmanager
def gate(
    model: nn.Module,
    vector: Float[Tensor, " d_model"],
    layer: int,
    threshold: float,
    coeff: float = 1.0,
    *,
    gate_layer: int | None = None,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Add coeff * vector at `layer`, only in rows whose prompt projects above `threshold`.

    The projection is that of resid_pre of `gate_layer` (default: `layer`; never above it), at the
    row's last prompt position, on the unit direction. What comes before is already written by
    then, so the addition acts from that position on, through the answer.
    """
    gate_layer = layer if gate_layer is None else gate_layer
    if gate_layer > layer:
        raise SafeSteerError(f"gate_layer {gate_layer} lies above layer {layer}: decide before steering.")
    unit, is_open = _unit(vector), torch.zeros(0)  # per row: NaN undecided, 0 closed, 1 open

    with _columns(model, prompt_width) as at:

        def decide(h: Tensor) -> None:
            nonlocal is_open
            if at.past == 0 or len(is_open) == 0 or len(h) % len(is_open):
                is_open = h.new_full((len(h),), torch.nan)
            elif len(h) > len(is_open):
                is_open = is_open.repeat_interleave(len(h) // len(is_open))
            last = (at.start(h)[: len(h), 0] - 1 - at.past).expand(len(h))
            rows = torch.nonzero((last >= 0) & (last < h.shape[1]))[:, 0]
            found = h[rows, last[rows]] @ unit.to(h) > threshold
            is_open = is_open.index_put((rows,), found.to(is_open))

        def write(h: Tensor) -> Tensor:
            acts = (at.columns(h) >= at.start(h)[: len(h)] - 1).expand(len(h), -1)
            if bool(is_open[acts.any(1)].isnan().any()):
                raise SafeSteerError("The gate did not see the prompt: read it inside the block.")
            return torch.where((acts & (is_open == 1)[:, None])[..., None], h + coeff * vector.to(h), h)

        def both(h: Tensor) -> Tensor:
            decide(h)
            return write(h)

        edits: dict[tuple[Point, int], Edit] = {("resid_pre", layer): both}
        if gate_layer < layer:
            edits = {("resid_pre", gate_layer): decide, ("resid_pre", layer): write}
        with apply_hooks(model, edits):
            yield


def _writes(model: nn.Module) -> list[tuple[Point, int]]:
    """Everything that writes to the residual stream: embedding, attention and MLP outputs."""
    layers = range(len(blocks(model)))
    return [("embed", 0), *((point, layer) for layer in layers for point in ("attn_out", "mlp_out"))]


def _project_out(x: Tensor, unit: Tensor) -> Tensor:
    u = unit.to(x)
    return torch.addcmul(x, _along(x, u), u, value=-1)


@contextmanager
def ablate(
    model: nn.Module,
    vector: Vector,
    *,
    scope: Scope = "all",
    n_last: int = 1,
    prompt_width: int | None = None,
) -> Iterator[None]:
    """Project the direction out of everything that is written to the residual stream.

    As Arditi et al. 2024, section 2.4: embedding, every attention output, every MLP output.
    """
    unit = _unit(vector)
    edits = dict.fromkeys(_writes(model), lambda x: _project_out(x, unit))
    with _scoped(model, edits, scope, n_last, prompt_width):
        yield


@contextmanager
def ablate_placebo(model: nn.Module, vector: Vector, seed: int = 0) -> Iterator[None]:
    """The control of `ablate`: each write moves as far as ablation moves it, along a random axis.

    TransformerLens's NormMatchedPlacebo on a seeded random basis.
    """
    from transformer_lens.tools.analysis import NormMatchedPlacebo, random_basis  # slow to import

    unit, basis = _unit(vector), random_basis(vector.shape[-1], 1, seed)
    placebo = NormMatchedPlacebo(lambda base, source: _project_out(base, unit), basis)  # type: ignore[arg-type]
    edits = dict.fromkeys(_writes(model), lambda x: placebo(x, x + basis[:, 0].to(x)))
    with apply_hooks(model, edits):  # type: ignore[arg-type]
        yield
