"""What writes to the residual stream: found by measurement, so that ablation leaves nothing of a direction.

On a few tokens the change that each block makes, y - x, is compared with the outputs of its parts:
1. the usual parts first, attention and MLP (or the norms after them), each times one constant;
2. else the smallest set of the block's parts whose outputs add up to the change.
A constant factor (Granite's residual multiplier) does not matter: to project a direction out of a part is to
project it out of any multiple. A block whose change is no such sum is refused in a sentence.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.head import once_per_model, probe_ids, tolerance
from safesteer.models.parts import blocks, decoder, hf_model

N_PROBE_IDS = 12
MOST_PARTS = 3  # of a block that may write
DEPTH = 2  # how deep inside a block parts are looked for
WRAPPED = "_original_component."  # what a TransformerBridge calls the module that it wraps
HALF_TOLERANCE = 0.05  # of the spread of the change
USUAL = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # sandwich norms: Gemma 2 and 3
    ("self_attn", "mlp"),
)


@dataclass(frozen=True, eq=False)
class Writes:
    """What writes, by block and name, and whether the embedding alone makes the first residual.

    Names and not modules: an adapter puts another module in the place of one that it wraps.
    """

    places: tuple[tuple[int, str], ...]
    starts_at_embedding: bool
    deviation: float  # largest misfit of a block's change, in units of its spread


@once_per_model
def writes_of(model: nn.Module) -> Writes:
    """Return what writes to the residual stream, plain or bridged: compare block by block, once per model.

    Raises:
        SafeSteerError: If a block's change is not a sum of outputs of its parts.
    """
    seen: dict[tuple[int, str], Tensor] = {}
    parts = [dict(_parts(block)) for block in blocks(model)]
    embedding = hf_model(model).get_input_embeddings()
    handles = [embedding.register_forward_hook(_reader(seen, -1, "embed"), with_kwargs=True)]
    for layer, (block, inside) in enumerate(zip(blocks(model), parts, strict=True)):
        handles.append(block.register_forward_pre_hook(_reader(seen, layer, "before"), with_kwargs=True))
        handles.append(block.register_forward_hook(_reader(seen, layer, "after"), with_kwargs=True))
        handles += [
            part.register_forward_hook(_reader(seen, layer, name), with_kwargs=True)
            for name, part in inside.items()
        ]
    try:
        decoder(model)(probe_ids(model, N_PROBE_IDS, seed=2), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    places: list[tuple[int, str]] = []
    names: tuple[str, ...] = ()
    worst = 0.0
    for layer, inside in enumerate(parts):
        names, misfit = _writers(seen, layer, list(inside), names)
        worst = max(worst, misfit)
        if not names:
            family = type(hf_model(model)).__name__
            raise SafeSteerError(
                f"What block {layer} of {family} writes to the residual stream is not a sum of its parts'"
                " outputs, so no direction can be projected out of it: use add or clamp."
            )
        places += [(layer, name) for name in names]
    limit = tolerance(seen[0, "before"].dtype, HALF_TOLERANCE)
    first, embedded = seen[0, "before"], seen.get((-1, "embed"))
    alone = (
        embedded is not None
        and embedded.shape == first.shape
        and _misfit(first, [embedded], _rounding(first)) <= limit
    )
    return Writes(tuple(places), alone, worst)


def write_at(model: nn.Module, number: int) -> tuple[nn.Module, nn.Module]:
    """Return the module that makes a write as the model is now, and its block."""
    layer, name = writes_of(model).places[number]
    block = blocks(model)[layer]
    return dict(_parts(block))[name], block


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a block by name, shallow ones first; in a bridge by the name that they wrap."""
    named = [(name.replace(WRAPPED, ""), part) for name, part in block.named_modules() if name]
    named = [(name, part) for name, part in named if name != WRAPPED[:-1] and name.count(".") < DEPTH]
    named = [(name, part) for name, part in named if "hook_" not in name]  # a bridge's points only look
    yield from sorted(named, key=lambda item: item[0].count("."))


def _reader(seen: dict[tuple[int, str], Tensor], layer: int, name: str) -> Callable[..., None]:
    """Make a hook that stores what a module reads ("before") or returns.

    A copy, as Falcon adds in place; on the CPU, as the parts of a block that a map has spread lie apart.
    """

    def read(module: nn.Module, args: tuple, kwargs: dict, output: object = None) -> None:
        value = output if name != "before" else args[0] if args else kwargs.get("hidden_states")
        value = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(value, Tensor):
            seen[layer, name] = value.to("cpu", copy=True)

    return read


def _writers(
    seen: dict[tuple[int, str], Tensor], layer: int, names: list[str], like: Sequence[str]
) -> tuple[tuple[str, ...], float]:
    """Return the parts whose outputs add up to the change of a block, and their misfit; none: empty, 0.

    `like` are those of the block before.
    """
    change = seen[layer, "after"].double() - seen[layer, "before"].double()
    outputs = {n: seen[layer, n] for n in names if (layer, n) in seen}
    # Some return positions flat (OPT, experts). What passes the stream itself on writes nothing to it.
    size, width = change.numel(), change.shape[-1]
    outputs = {
        n: out.reshape(change.shape)
        for n, out in outputs.items()
        if out.numel() == size and out.shape[-1] == width
    }
    stream = (seen[layer, "before"], seen[layer, "after"])
    outputs = {n: out for n, out in outputs.items() if not any(torch.equal(out, x) for x in stream)}
    tries = [tuple(like), *USUAL]
    tries += [some for n in range(1, MOST_PARTS + 1) for some in combinations(outputs, n)]
    limit = tolerance(seen[layer, "after"].dtype, HALF_TOLERANCE)
    rounding = _rounding(seen[layer, "before"]) + _rounding(seen[layer, "after"])
    for some in tries:
        if some and all(n in outputs for n in some):
            misfit = _misfit(change, [outputs[n] for n in some], rounding)
            if misfit <= limit:
                return tuple(some), misfit
    return (), 0.0


def _rounding(stream: Float[Tensor, "1 n *stream"]) -> Float[Tensor, "1 n *stream"]:
    """Bound the rounding of a sum that is stored in the stream's precision, element by element."""
    return stream.double().abs() * torch.finfo(stream.dtype).eps


def _misfit(
    change: Float[Tensor, "1 n d_model"],
    outputs: Sequence[Float[Tensor, "1 n d_model"]],
    rounding: Float[Tensor, "1 n d_model"],
) -> float:
    """Return how far `change` is from a sum of the outputs, each times a constant that is not zero.

    In units of its spread; infinite where a constant is zero: a part that the sum does not need. What
    `rounding` explains does not count: in bfloat16 the few huge elements of a stream (Qwen2) are known to
    one part in 128, which is far more than a block adds to them.
    """
    columns = torch.stack([out.double().flatten() for out in outputs], 1)
    target = change.double().flatten()
    trust = 1 / (1 + rounding.flatten() / target.std().clamp(min=1e-12))
    factors = torch.linalg.lstsq(columns * trust[:, None], (target * trust)[:, None]).solution[:, 0]
    if bool((factors.abs() <= 1e-3).any()):
        return math.inf
    off = (columns @ factors - target).abs() - rounding.flatten()
    return float(off.max().clamp(min=0) / target.std().clamp(min=1e-12))
