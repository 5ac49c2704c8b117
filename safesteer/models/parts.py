"""The parts of a model that the method needs, whatever wraps it: plain, PEFT or a TransformerBridge."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from safesteer._errors import SafeSteerError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def hf_model(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a TransformerBridge or a PEFT wrapper, or the model itself."""
    if is_bridge(model):
        model = cast("TransformerBridge", model).original_model
    elif hasattr(model, "get_base_model"):  # PEFT, which need not be installed
        model = model.get_base_model()
    return cast(PreTrainedModel, model)


def is_bridge(model: nn.Module) -> bool:
    """Return whether `model` is a TransformerBridge, without importing TransformerLens."""
    return any(c.__name__ == "TransformerBridge" for c in type(model).__mro__)


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the configuration of the language model, which a multimodal one holds inside its own."""
    return hf_model(model).config.get_text_config()


def decoder(model: nn.Module) -> nn.Module:
    """Return the part from token ids to the final norm, without the output head."""
    outer = hf_model(model)
    inner = cast(nn.Module, outer.get_decoder())
    # Llama 4's text model names itself, ModernBERT's its output head: then it is the part that holds blocks.
    parts = (inner, outer.base_model, getattr(outer, "model", None))
    return next((part for part in parts if part and part is not outer and _block_lists(part)), inner)


def _block_lists(part: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that a part holds, by name."""
    return {name: child for name, child in part.named_children() if isinstance(child, nn.ModuleList)}


def blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks; block l reads `resid_pre` of layer l.

    Raises:
        SafeSteerError: If the decoder has no list of blocks.
    """
    lists, n_layers = _block_lists(decoder(model)), text_config(model).num_hidden_layers
    # LongCat counts two layers per block: its list is the one that is called "layers".
    fitting = [child for child in lists.values() if len(child) == n_layers]
    usual = [lists[name] for name in ("layers", "h") if name in lists]
    if not (fitting or usual):
        raise SafeSteerError(f"{type(hf_model(model)).__name__} has no list of blocks.")
    return next((child for child in usual if child in fitting), (fitting or usual)[0])


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm after the last block: by one of its usual names, else the last norm of the decoder.

    Raises:
        SafeSteerError: If the decoder has no norm beside its blocks and embeddings.
    """
    children = dict(decoder(model).named_children())
    usual = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f", "ln_out")
    others = [name for name in reversed(children) if "norm" in name and "embed" not in name]
    name = next((name for name in (*usual, "embedding_norm", *others) if name in children), None)
    if name is None:
        raise SafeSteerError(f"{type(hf_model(model)).__name__} has no norm after its last block.")
    return children[name]


def is_quantized(model: nn.Module) -> bool:
    """Return whether some weights are stored as integers: they are read by their own layers alone."""
    return not all(weight.is_floating_point() for weight in hf_model(model).parameters())


def is_adapted(model: nn.Module) -> bool:
    """Return whether a low-rank adapter lies in the modules, also of a base that a student shares."""
    return hasattr(hf_model(model), "peft_config")


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens the model reads at once, where its config says so.

    Where rotary frequencies change with the longest text of a pass (long rope, dynamic NTK), one long row
    would change all others and every cache: such a model is read up to its original context.
    """
    config = text_config(model)
    longest, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    for part in (rope, *rope.values()) if isinstance(rope, dict) else ():
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            original = part.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            longest = min(filter(None, (longest, original)), default=None)
    return longest


@contextmanager
def modes_put_back(model: nn.Module) -> Iterator[None]:
    """Let modules be in other modes (training, evaluation) inside the block; then each has its own again."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def tensors_put_back(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters hold other tensors inside the block; then each has its own again."""
    before = [(parameter, parameter.data) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
