"""Hooks: plain functions tensor -> tensor at named points of the residual stream, always removed.

On a TransformerBridge the points are TransformerLens hook points; on a plain model, module hooks.
`record` only reads; `run_from_layer` runs a pass from a middle layer on.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safesteer.models.chat_model import blocks, hf_model, is_bridge

Point = Literal["embed", "resid_pre", "attn_out", "mlp_out"]
Edit = Callable[[Tensor], Tensor | None]


def _bridge_name(point: Point, layer: int) -> str:
    names = {
        "embed": "hook_embed",
        "resid_pre": f"blocks.{layer}.hook_in",
        "attn_out": f"blocks.{layer}.hook_attn_out",
        "mlp_out": f"blocks.{layer}.hook_mlp_out",
    }
    return names[point]


def _module(model: nn.Module, point: Point, layer: int) -> nn.Module:
    if point == "embed":
        return hf_model(model).get_input_embeddings()
    block = blocks(model)[layer]
    if point == "attn_out":
        # Sandwich-norm blocks (Gemma 2 and 3) normalise a sublayer's output before it is written.
        sandwich = hasattr(block, "post_feedforward_layernorm")
        return block.post_attention_layernorm if sandwich else block.self_attn  # type: ignore[return-value]
    return getattr(block, "post_feedforward_layernorm", None) or block.mlp  # type: ignore[return-value]


@contextmanager
def apply_hooks(model: nn.Module, edits: dict[tuple[Point, int], Edit]) -> Iterator[None]:
    """Run `edits` at their points inside the block. An edit returning None only reads.

    Keys are (point, layer); "resid_pre" is the input of block `layer`.
    """
    with ExitStack() as stack:
        if is_bridge(model):
            hooks = [
                (_bridge_name(*at), lambda tensor, hook, edit=edit: edit(tensor))
                for at, edit in edits.items()
            ]
            stack.enter_context(model.hooks(fwd_hooks=hooks))  # type: ignore[operator]
        else:
            for (point, layer), edit in edits.items():
                stack.callback(_attach(model, point, layer, edit).remove)
        yield


def _attach(model: nn.Module, point: Point, layer: int, edit: Edit):
    if point == "resid_pre":

        def before(module, args, kwargs):
            if args:
                new = edit(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = edit(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        return blocks(model)[layer].register_forward_pre_hook(before, with_kwargs=True)

    def after(module, args, output):
        if isinstance(output, tuple):
            new = edit(output[0])
            return None if new is None else (new, *output[1:])
        return edit(output)

    return _module(model, point, layer).register_forward_hook(after)


class _Skip(nn.Module):
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


@contextmanager
def run_from_layer(
    model: nn.Module, layer: int, resid_pre: Float[Tensor, "batch pos d_model"]
) -> Iterator[None]:
    """Forward passes run from block `layer` on, whose input is `resid_pre` instead of the blocks below."""
    below, kept = blocks(model), list(blocks(model)[:layer])
    with apply_hooks(model, {("resid_pre", layer): lambda h: resid_pre}):
        try:
            for i in range(layer):
                below[i] = _Skip()
            yield
        finally:
            for i, block in enumerate(kept):
                below[i] = block


@contextmanager
def record_resid_pre(
    model: nn.Module, layers: list[int], keep: Callable[[Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Collect keep(resid_pre) of some layers during one forward pass, detached."""
    seen: dict[int, Tensor] = {}

    def reader(layer: int) -> Edit:
        def read(h: Tensor) -> None:
            seen[layer] = keep(h.detach())

        return read

    with apply_hooks(model, {("resid_pre", layer): reader(layer) for layer in layers}), torch.no_grad():
        yield seen
