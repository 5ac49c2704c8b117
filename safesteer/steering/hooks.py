"""Hooks: plain functions tensor -> tensor at named points of the residual stream, always removed.

On a TransformerBridge the points are TransformerLens hook points; on a plain model, module hooks.
`record_resid_pre` only reads; `run_from_layer` runs a pass from a middle layer on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safesteer.models.chat_model import ModelLike, blocks, hf_model, is_bridge, module_of
from safesteer.steering.writes import writes_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Point = Literal["embed", "resid_pre", "attn_out", "mlp_out", "write"]
Edit = Callable[[Tensor], Tensor | None]  # an edit that returns None only reads
# By (point, layer): "resid_pre" is the input of block `layer`; of "write" the number counts `writes_of`.
Edits = Mapping[tuple[Point, int], Edit]


@contextmanager
def apply_hooks(chat: ModelLike, edits: Edits) -> Iterator[None]:
    """Run `edits` at their points in every forward pass inside the block.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        edits: A function per (point, layer), which gets [batch, pos, d_model] and returns what takes its
            place; None leaves it as it is. The layer of "embed" is not looked at.
    """
    model = module_of(chat)
    with ExitStack() as stack:
        if is_bridge(model):
            hooks = [
                (_bridge_name(*at), lambda tensor, hook, edit=edit: edit(tensor))
                for at, edit in edits.items()
            ]
            stack.enter_context(cast("TransformerBridge", model).hooks(fwd_hooks=hooks))
        else:
            for (point, layer), edit in edits.items():
                stack.callback(_attach(model, point, layer, edit).remove)
        yield


def _bridge_name(point: Point, layer: int) -> str:
    names = {
        "embed": "hook_embed",
        "resid_pre": f"blocks.{layer}.hook_in",
        "attn_out": f"blocks.{layer}.hook_attn_out",
        "mlp_out": f"blocks.{layer}.hook_mlp_out",
    }
    return names[point]


def _module(model: nn.Module, point: Point, layer: int) -> nn.Module:
    """Return the module whose output is written to the residual stream at `point`."""
    if point == "embed":
        return hf_model(model).get_input_embeddings()
    if point == "write":
        return writes_of(model).modules[layer]
    block = blocks(model)[layer]
    # Sandwich-norm blocks (Gemma 2 and 3) normalise a sublayer's output before it is written.
    sandwich = hasattr(block, "post_feedforward_layernorm")
    if point == "attn_out":
        return block.get_submodule("post_attention_layernorm" if sandwich else "self_attn")
    return block.get_submodule("post_feedforward_layernorm" if sandwich else "mlp")


def _attach(model: nn.Module, point: Point, layer: int, edit: Edit) -> RemovableHandle:
    if point == "resid_pre":

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
            if args:
                new = edit(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = edit(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        return blocks(model)[layer].register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        if isinstance(output, tuple):
            new = edit(output[0])
            return None if new is None else (new, *output[1:])
        return edit(output)

    return _module(model, point, layer).register_forward_hook(after)


class _Skip(nn.Module):
    """A block that changes nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def run_from_layer(
    chat: ModelLike, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
) -> Iterator[None]:
    """Skip the blocks below `layer` in forward passes inside the block, and feed it `resid_pre`.

    Args:
        chat: A ChatModel, a TransformerBridge, a plain model, or (model, tokenizer).
        layer: The first block that runs.
        resid_pre: Its input, [batch, pos, d_model].
    """
    model = module_of(chat)
    modules, skipped = blocks(model), list(blocks(model)[:layer])
    with apply_hooks(model, {("resid_pre", layer): lambda h: resid_pre}):
        try:
            for i in range(layer):
                modules[i] = _Skip()
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
        A dictionary by layer, filled once the pass has run. No gradients are kept inside the block.
    """
    recorded: dict[int, Tensor] = {}

    def reader(layer: int) -> Edit:
        def read(h: Tensor) -> None:
            recorded[layer] = keep(h.detach())

        return read

    edits: Edits = {("resid_pre", layer): reader(layer) for layer in layers}
    with apply_hooks(chat, edits), torch.no_grad():
        yield recorded
