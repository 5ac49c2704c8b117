"""Hooks: plain functions tensor -> tensor at named points of the residual stream, always removed.

On a TransformerBridge `resid_pre` is TransformerLens's own hook point; all else are hooks on modules.
`record_resid_pre` only reads; `run_from_layer` runs a pass from a middle layer on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ModelLike, module_of
from safesteer.models.head import FAILURES, deviation, once_per_model, probe_ids, tolerance
from safesteer.models.parts import blocks, hf_model, is_bridge
from safesteer.models.passes import read_states, rows_stay, unless_bare
from safesteer.models.placement import input_device
from safesteer.models.writes import write_at

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RESUMED_HALF_TOLERANCE = 0.05  # of the spread of final states, below float32

Point = Literal["embed", "resid_pre", "write"]
Edit = Callable[[Tensor], Tensor | None]  # an edit that returns None only reads
# By (point, layer): "resid_pre" is the input of block `layer`; of "write" the number counts `writes_of`.
Edits = Mapping[tuple[Point, int], Edit]


@contextmanager
def apply_hooks(chat: ModelLike, edits: Edits, *, rows_may_leave: bool = False) -> Iterator[None]:
    """Run `edits` at their points in every forward pass inside the block.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        edits: A function per (point, layer), which gets [batch, pos, d_model] and returns what takes its
            place; None leaves it as it is. The layer of "embed" is not looked at.
        rows_may_leave: The edits do not know a row by its place in the batch, so answers that have ended may
            leave it.

    Raises:
        SafeSteerError: For a layer that the model does not have.
    """
    model = module_of(chat)
    n_layers = len(blocks(model))
    for point, layer in edits:
        if point == "resid_pre" and not 0 <= layer < n_layers:
            raise SafeSteerError(f"There is no layer {layer}: the model has layers 0 to {n_layers - 1}.")
    with ExitStack() as stack:
        if not rows_may_leave:
            stack.enter_context(rows_stay(model))
        hook_points = []
        for (point, layer), edit in edits.items():
            if is_bridge(model) and point == "resid_pre":
                name, act = f"blocks.{layer}.hook_in", unless_bare(edit)
                hook_points.append((name, lambda tensor, hook, act=act: act(tensor)))
            else:
                for handle in _attach(model, point, layer, edit):
                    stack.callback(handle.remove)
        if hook_points:
            stack.enter_context(cast("TransformerBridge", model).hooks(fwd_hooks=hook_points))
        yield


def _attach(model: nn.Module, point: Point, layer: int, edit: Edit) -> list[RemovableHandle]:
    """Register the hooks of one edit."""
    if point == "resid_pre":

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            h = args[0] if args else kwargs["hidden_states"]
            if h.dim() != 3:
                family = type(hf_model(model)).__name__
                raise SafeSteerError(
                    f"The residual stream of {family} is not one vector per position, so no direction can be"
                    " read from it or added to it."
                )
            new = edit(h)
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return [blocks(model)[layer].register_forward_pre_hook(unless_bare(before), with_kwargs=True)]

    handles: list[RemovableHandle] = []
    shape: list[int] = []  # of the residual stream: some parts return positions flat

    def remember(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shape[:] = (args[0] if args else kwargs["hidden_states"]).shape

    def after(module: nn.Module, args: tuple, output: Tensor | tuple | list) -> Tensor | tuple | list | None:
        h = output if isinstance(output, Tensor) else output[0]
        new = edit(h.reshape(shape) if shape else h)
        if new is None or isinstance(output, Tensor):
            return new if new is None else new.view_as(h)
        return type(output)((new.view_as(h), *output[1:]))

    part = hf_model(model).get_input_embeddings()
    if point == "write":
        part, block = write_at(model, layer)
        handles.append(block.register_forward_pre_hook(unless_bare(remember), with_kwargs=True))
    handles.append(part.register_forward_hook(unless_bare(after)))
    return handles


class _Skip(nn.Module):
    """A block that changes nothing; it returns as many values as the block in whose place it stands."""

    def __init__(self, n_extra: int | None) -> None:
        super().__init__()
        self.n_extra = n_extra

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple:
        if self.n_extra is None:
            return hidden_states
        return hidden_states, *(None,) * self.n_extra


class Resumption(NamedTuple):
    """Whether a pass may start at a middle layer, and what blocks return beside the residual stream."""

    works: bool
    n_extra: int | None = None  # values of the tuple that a block returns, beside the first; None: no tuple


@once_per_model
def resumption(model: nn.Module) -> Resumption:
    """Measure whether a pass from the last block on, fed with its resid_pre, gives the final states.

    Blocks may hand each other more than the residual stream: keys and values that are shared between
    layers, the embedding. Then a pass has to start at the first block.
    """
    batch = PromptBatch.from_ids(probe_ids(model, 8).tolist(), [[]], device=input_device(model))
    outputs: list[object] = []
    last = len(blocks(model)) - 1
    handle = blocks(model)[0].register_forward_hook(lambda _, args, output: outputs.append(output))
    try:
        with record_resid_pre(model, [last], lambda h: h) as resid_pre:
            want = read_states(model, batch)
    finally:
        handle.remove()
    n_extra = len(outputs[-1]) - 1 if isinstance(outputs[-1], tuple) else None
    try:
        with _started_at(model, last, resid_pre[last], n_extra):
            got = read_states(model, batch)
    except FAILURES:
        return Resumption(False)
    works = deviation(got, want) <= tolerance(want.dtype, RESUMED_HALF_TOLERANCE)
    return Resumption(works, n_extra)


@contextmanager
def run_from_layer(
    chat: ModelLike, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
) -> Iterator[None]:
    """Skip the blocks below `layer` in forward passes inside the block, and feed it `resid_pre`.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        layer: The first block that runs.
        resid_pre: Its input, [batch, pos, d_model].

    Raises:
        SafeSteerError: Where blocks hand each other more than the residual stream (`resumption`).
    """
    model = module_of(chat)
    may = resumption(model)
    if not may.works:
        raise SafeSteerError(f"A pass of {type(hf_model(model)).__name__} cannot start at a middle layer.")
    with _started_at(model, layer, resid_pre, may.n_extra):
        yield


@contextmanager
def _started_at(model: nn.Module, layer: int, resid_pre: Tensor, n_extra: int | None) -> Iterator[None]:
    modules, skipped = blocks(model), list(blocks(model)[:layer])
    with apply_hooks(model, {("resid_pre", layer): lambda h: resid_pre}):
        try:
            for i in range(layer):
                modules[i] = _Skip(n_extra)
            yield
        finally:
            for i, block in enumerate(skipped):
                modules[i] = block


@contextmanager
def record_resid_pre(
    chat: ModelLike, layers: Sequence[int], keep: Callable[[Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Collect keep(resid_pre) of some layers during one forward pass, detached.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        layers: Blocks whose input is read.
        keep: Takes [batch, pos, d_model] and returns what is stored of it.

    Returns:
        A dictionary by layer, filled once the pass has run, on the model's first device. No gradients are
        kept inside the block.
    """
    recorded: dict[int, Tensor] = {}
    device = input_device(module_of(chat))

    def reader(layer: int) -> Edit:
        def read(h: Tensor) -> None:
            recorded[layer] = keep(h.detach().to(device))

        return read

    edits: Edits = {("resid_pre", layer): reader(layer) for layer in layers}
    with apply_hooks(chat, edits), torch.no_grad():
        yield recorded
