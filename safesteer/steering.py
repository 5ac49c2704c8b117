"""Interventions on the residual stream: one implementation for Hugging Face models and bridges.

    add     h_l <- h_l + coeff * d     at resid_pre of block l, every position, every step (Eq. 1)
    ablate  x <- x - (x . d^) d^       for every write: embedding, attention and MLP outputs

`hooked` attaches plain functions tensor -> tensor at named points and always removes them. On a
TransformerBridge the points are TransformerLens hook points; on a plain model, module hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safesteer.models import blocks, hf_model, is_bridge

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
def hooked(model: nn.Module, edits: dict[tuple[Point, int], Edit]) -> Iterator[None]:
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


@contextmanager
def add(
    model: nn.Module,
    vector: Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"],
    layer: int,
    coeff: float = 1.0,
) -> Iterator[None]:
    """Add coeff * vector to resid_pre of `layer` at every position and step (Eq. 1).

    One vector for the batch, or one a row (several candidates packed in one batch).
    """
    shift = coeff * (vector if vector.dim() == 1 else vector[:, None])
    with hooked(model, {("resid_pre", layer): lambda h: h + shift.to(h)}):
        yield


@contextmanager
def ablate(
    model: nn.Module, vector: Float[Tensor, " d_model"] | Float[Tensor, "batch d_model"]
) -> Iterator[None]:
    """Project the direction out of everything that is written to the residual stream.

    As Arditi et al. 2024, section 2.4: embedding, every attention output, every MLP output.
    """
    unit = vector / vector.norm(dim=-1, keepdim=True)
    unit = unit if unit.dim() == 1 else unit[:, None]

    def project(x: Tensor) -> Tensor:
        u = unit.to(x)
        return x - (x * u).sum(-1, keepdim=True) * u

    n_layers = len(blocks(model))
    points: list[tuple[Point, int]] = [("embed", 0)]
    points += [(p, layer) for layer in range(n_layers) for p in ("attn_out", "mlp_out")]  # type: ignore[misc]
    with hooked(model, dict.fromkeys(points, project)):
        yield


@contextmanager
def record(
    model: nn.Module, layers: list[int], keep: Callable[[Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Collect keep(resid_pre) of some layers during one forward pass, detached."""
    seen: dict[int, Tensor] = {}

    def reader(layer: int) -> Edit:
        def read(h: Tensor) -> None:
            seen[layer] = keep(h.detach())

        return read

    with hooked(model, {("resid_pre", layer): reader(layer) for layer in layers}), torch.no_grad():
        yield seen
