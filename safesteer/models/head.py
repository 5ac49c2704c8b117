"""The output head: what turns final hidden states into logits, proven on a few tokens.

Families put more into their logits than a matrix: a bias, a soft cap, and a factor that hides under many
names in their configs (logit_scale, logits_scaling, lm_head_multiplier, dim_model_base ...). Factor and cap
are measured, not looked up: our logits and the model's own are compared on a few tokens, once per model. A
model whose logits are something else is refused in a sentence.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.logits import logits_of
from safesteer.models.parts import decoder, final_norm, hf_model, modes_put_back, text_config
from safesteer.models.placement import input_device, require_head_with_embedding

T = TypeVar("T")
N_PROBE_IDS = 8
TOLERANCE = 1e-3  # deviation in units of the spread, in float32
# What models raise where they cannot do something.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError, IndexError)
HALF_TOLERANCE = 0.05


class Head(NamedTuple):
    """logits = softcap(scale (weight @ hidden + bias)), as `logits_of(hidden, *head)` forms them."""

    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"] | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """What goes with the weight, as the keywords of `logps_on`."""
        return {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}


class LogitShape(NamedTuple):
    """What follows the head's product, and how far our logits are then off (None: they are not finite)."""

    scale: float = 1.0
    softcap: float | None = None
    deviation: float | None = None  # in units of the logits' spread


def once_per_model(measure: Callable[[nn.Module], T]) -> Callable[[nn.Module], T]:
    """Call `measure` once for the Hugging Face model inside, and keep its result.

    Hooks are put aside, and passes of mixed precision: their rounding would count as an error.
    """
    results: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    @wraps(measure)
    def measured(model: nn.Module) -> T:
        inner = hf_model(model)
        if inner not in results:
            with _unhooked(inner), torch.autocast(input_device(inner).type, enabled=False):
                results[inner] = measure(model)
        return results[inner]

    return measured


def tolerance(dtype: torch.dtype, half: float, full: float = TOLERANCE) -> float:
    """Return the deviation that is rounding: `full`, or `half` where the precision is below float32."""
    return full if dtype in (torch.float32, torch.float64) else half


def deviation(got: Tensor, want: Tensor) -> float:
    """Return the largest difference of two tensors, in units of the spread of what is wanted."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max()) / float(want.std().clamp(min=1e-12))


def output_head(model: nn.Module) -> Head:
    """Return the output head of a model, plain, PEFT-wrapped or bridged.

    Raises:
        SafeSteerError: If the model's logits are not a head on its final hidden states.
    """
    layer, logits = cast(nn.Linear, hf_model(model).get_output_embeddings()), logit_shape(model)
    return Head(layer.weight, getattr(layer, "bias", None), logits.softcap, logits.scale)


def normed(model: nn.Module, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Put the final norm on a residual stream, in float32 whatever the precision of the weights."""
    norm = final_norm(model)
    weights = {name: p.float() for name, p in norm.named_parameters()}
    return torch.func.functional_call(norm, weights, (x.float(),)).float()


def probe_ids(model: nn.Module, n: int, seed: int = 0) -> Tensor:
    """Draw ordinary token ids, [1, n]: from the middle of the vocabulary, where no special ones are."""
    n_vocab = cast(nn.Embedding, hf_model(model).get_input_embeddings()).weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(n_vocab // 8, n_vocab // 2, (1, n), generator=generator)
    return ids.to(input_device(model))


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Run the model as it is, without gradients or dropout: hooks that are on (steering) are put aside.

    Those that transformers adds at its first pass, to record what a config asks for, stay.
    """
    modules = list(model.modules())
    hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in modules]
    try:
        for m in modules:
            m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
        with modes_put_back(model), torch.no_grad():
            model.eval()
            yield
    finally:
        for m, (before, after) in zip(modules, hooks, strict=True):
            before.update(m._forward_pre_hooks)
            after.update(m._forward_hooks)
            m._forward_pre_hooks, m._forward_hooks = before, after


@once_per_model
def logit_shape(model: nn.Module) -> LogitShape:
    """Measure the constant factor and the soft cap between our logits and the model's own.

    Raises:
        SafeSteerError: If the model's logits are not a head on its final hidden states.
    """
    require_head_with_embedding(model)
    inner, ids = hf_model(model), probe_ids(model, N_PROBE_IDS)
    layer = cast(nn.Linear, inner.get_output_embeddings())
    states = decoder(model)(ids, use_cache=False).last_hidden_state.to(ids.device)
    ours = logits_of(states, layer.weight, getattr(layer, "bias", None), None).double()
    theirs = inner(ids, use_cache=False).logits.to(ids.device).double()[..., : ours.shape[-1]]
    if not bool(theirs.isfinite().all()):  # damaged weights: what reads them says so
        return LogitShape()
    shapes = [_fitted(model, ours, theirs, cap) for cap in _config_caps(model)]
    errors = [cast(float, shape.deviation) for shape in shapes]
    # Where rounding hides which cap it is, the first of them.
    best, error = next(pair for pair in zip(shapes, errors, strict=True) if pair[1] <= 2 * min(errors))
    if not error <= tolerance(states.dtype, HALF_TOLERANCE):
        raise SafeSteerError(
            f"The logits of {type(inner).__name__} are not its output head on its final hidden states (off by"
            f" {error:.1%} of their spread), so no score of SafeSteer would be right."
        )
    return best


def _fitted(model: nn.Module, ours: Tensor, theirs: Tensor, softcap: float | None) -> LogitShape:
    """Find the factor before a soft cap that brings our logits nearest to the model's."""
    spread, scale = float(theirs.std().clamp(min=1e-12)), 1.0
    before_cap = (
        theirs if softcap is None else softcap * (theirs / softcap).clamp(-1 + 1e-12, 1 - 1e-12).atanh()
    )
    if float((ours - before_cap).abs().max()) > TOLERANCE * spread:
        # Weighted by the cap's slope, which is next to nothing where logits are near the cap.
        slope = torch.ones_like(theirs) if softcap is None else (1 - (theirs / softcap) ** 2).clamp(min=0)
        scale = float((slope * ours * before_cap).sum() / (slope * ours * ours).sum().clamp(min=1e-30))
        scale = next((s for s in (1.0, *_config_scales(model)) if abs(scale / s - 1) < 1e-3), scale)
    got = scale * ours if softcap is None else softcap * (scale * ours / softcap).tanh()
    return LogitShape(scale, softcap, deviation(got, theirs))


def _config_caps(model: nn.Module) -> list[float | None]:
    """List the soft caps to try: the one with the usual name, none, and others that the config names."""
    config = text_config(model).to_dict()
    usual = config.get("final_logit_softcapping")
    caps = {float(v) for name, v in config.items() if "cap" in name and isinstance(v, int | float) and v}
    return [*([float(usual)] if usual else []), None, *sorted(caps - {usual})]


def _config_scales(model: nn.Module) -> list[float]:
    """List the config's numbers and their inverses: a measured factor that equals one is that one."""
    config = text_config(model).to_dict()
    numbers = [float(v) for v in config.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    numbers += [a / b for a in numbers for b in numbers if "dim_model_base" in config and b]
    return [s for v in numbers if v for s in (v, 1 / v)]
