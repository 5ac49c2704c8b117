"""A chat model as one value: the weights, the tokenizer and what the method asks of them.

`as_chat` accepts what people have at hand: a ChatModel, a TransformerLens bridge, or a pair of a Hugging
Face model and its tokenizer. The functions below it name the parts of a model that the method needs.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError
from safesteer.models.batch import Continuation, PromptBatch, batches, cut_at_eos

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A causal language model with its tokenizer; `model` is plain, PEFT-wrapped or bridged."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration of the text model."""
        return text_config(self.model)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(blocks(self.model))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def d_vocab(self) -> int:
        """Rows of the output head: can exceed the tokenizer's vocabulary (padding rows)."""
        return cast(nn.Linear, hf_model(self.model).get_output_embeddings()).weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs must be."""
        return next(self.model.parameters()).device

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's and the tokenizer's."""
        generation = hf_model(self.model).generation_config
        configured = None if generation is None else generation.eos_token_id
        ids = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
        if isinstance(self.tokenizer.eos_token_id, int):
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)

    def copy(self) -> "ChatModel":
        """Copy the plain Hugging Face model: one that may be trained, changed or exported."""
        model = _without_bridge(self.model) if is_bridge(self.model) else copy.deepcopy(hf_model(self.model))
        return ChatModel(model, self.tokenizer, self.name)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without the special tokens that a tokenizer may add."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""
        return cast(str, self.tokenizer.decode(list(ids)))

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Return an answer's text: up to its first end-of-answer id, without special tokens, stripped."""
        answer = cut_at_eos(ids, self.eos_ids, keep_eos=False)
        return cast(str, self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def batched(
        self,
        prompts: Sequence[str],
        batch_size: int,
        *,
        system: str | None = None,
        continuations: Sequence[Continuation] | None = None,
    ) -> Iterator[tuple[list[int], PromptBatch]]:
        """Yield batches of similar token length: (indices into `prompts`, batch on the model's device)."""
        for rows in batches(self.tokenizer, prompts, batch_size, system=system):
            after = None if continuations is None else [continuations[i] for i in rows]
            texts = [prompts[i] for i in rows]
            yield rows, PromptBatch.of(self.tokenizer, texts, after, system=system, device=self.device)

    @property
    def fingerprint(self) -> str:
        """Hash of architecture and a sample of the weights: tells two models of a size apart."""
        config, digest = self.config, hashlib.sha256()
        shape = (config.model_type, config.num_hidden_layers, config.hidden_size, self.d_vocab)
        digest.update(repr(shape).encode())
        row = cast(Tensor, hf_model(self.model).get_input_embeddings().weight)[:64, :32]
        # Rounded to bfloat16 so that one model in two precisions has one fingerprint.
        digest.update(row.detach().to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"ChatModel({self.name!r}, {kind}, {self.n_layers} layers, d_model {self.d_model})"


ModelLike: TypeAlias = ChatModel | nn.Module | tuple[nn.Module, PreTrainedTokenizerBase]

# What a bridged model was called, and its tokenizer before TransformerLens changed its copy.
_BRIDGED: WeakKeyDictionary[nn.Module, tuple[PreTrainedTokenizerBase, str]] = WeakKeyDictionary()


def as_chat(model: ModelLike) -> ChatModel:
    """Turn what a caller has at hand into a ChatModel.

    Args:
        model: A ChatModel, a TransformerBridge (which knows its tokenizer), or (model, tokenizer).

    Returns:
        The ChatModel itself, or a new one around the same weights. The bridge of a ChatModel gets that
        model's name and tokenizer, so both have the same fingerprint and template hash.

    Raises:
        SafeSteerError: For anything else, such as a model without its tokenizer.

    Example:
        >>> from safesteer.models.chat_model import as_chat
        >>> pair = as_chat((chat.model, chat.tokenizer))
        >>> pair.fingerprint == chat.fingerprint
        True
        >>> as_chat(chat) is chat
        True
    """
    if isinstance(model, ChatModel):
        return model
    if isinstance(model, tuple) and len(model) == 2:
        module, tokenizer = model
        return ChatModel(module, tokenizer, hf_model(module).name_or_path or type(module).__name__)
    if isinstance(model, nn.Module) and is_bridge(model):
        bridge = cast("TransformerBridge", model)
        tokenizer, name = _BRIDGED.get(model, (bridge.tokenizer, bridge.cfg.model_name))
        return ChatModel(model, tokenizer, name)
    raise SafeSteerError(
        f"A {type(model).__name__} has no tokenizer here: pass a ChatModel (safesteer.load_model), a"
        " TransformerBridge, or the pair (model, tokenizer)."
    )


def remember_bridge(bridge: nn.Module, chat: ChatModel) -> None:
    """Let `as_chat(bridge)` have the name and the tokenizer of `chat`, as long as the bridge lives."""
    _BRIDGED[bridge] = chat.tokenizer, chat.name


def module_of(model: ModelLike) -> nn.Module:
    """Return the module itself, for functions that need no tokenizer."""
    if isinstance(model, ChatModel):
        return model.model
    return model[0] if isinstance(model, tuple) else model


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


def _without_bridge(bridge: nn.Module) -> PreTrainedModel:
    """Build the plain model again: a bridge wraps the modules of its own under other names."""
    wrapped = hf_model(bridge)
    config = copy.deepcopy(wrapped.config)
    config._attn_implementation = None  # a bridge asks for "eager", which shows attention patterns
    model = type(wrapped)(config).to(device=wrapped.device, dtype=wrapped.dtype)
    weights = {n.replace("._original_component", ""): w for n, w in wrapped.state_dict().items()}
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.generation_config = copy.deepcopy(wrapped.generation_config)
    return model.eval()


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


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens the model reads at once, where its config says so."""
    return getattr(text_config(model), "max_position_embeddings", None)
