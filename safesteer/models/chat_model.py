"""A chat model as one value: the weights, the tokenizer and what the method asks of them.

`as_chat` accepts what people have at hand: a ChatModel, a TransformerLens bridge, or a pair of a Hugging
Face model and its tokenizer. The functions below it find the parts of a model that the method needs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch, batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A causal language model with its tokenizer; `model` is plain, PEFT-wrapped or bridged."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def config(self):
        return hf_model(self.model).config.get_text_config()

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def d_vocab(self) -> int:
        """Rows of the output head: can exceed the tokenizer's vocabulary (padding rows)."""
        return output_head(self.model)[0].shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's and the tokenizer's."""
        found = hf_model(self.model).generation_config.eos_token_id
        ids = set(found if isinstance(found, list) else [] if found is None else [found])
        if isinstance(self.tokenizer.eos_token_id, int):
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the special tokens that a tokenizer may add."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return cast(str, self.tokenizer.decode(list(ids)))

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of an answer: up to its first end-of-answer id, without special tokens, stripped."""
        ends, ids = set(self.eos_ids), list(ids)
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return cast(str, self.tokenizer.decode(ids[:stop], skip_special_tokens=True)).strip()

    def batched(
        self,
        prompts: Sequence[str],
        batch_size: int,
        *,
        system: str | None = None,
        continuations: Sequence[str] | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[tuple[list[int], PromptBatch]]:
        """Batches of similar token length: (indices into `prompts`, the batch on the model's device)."""
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
        row = hf_model(self.model).get_input_embeddings().weight[:64, :32]  # pyright: ignore[reportIndexIssue]
        # Rounded to bfloat16 so that one model in two precisions has one fingerprint.
        digest.update(row.detach().to(torch.bfloat16).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"ChatModel({self.name!r}, {kind}, {self.n_layers} layers, d_model {self.d_model})"


ModelLike: TypeAlias = ChatModel | nn.Module | tuple[nn.Module, PreTrainedTokenizerBase]


def as_chat(model: ModelLike) -> ChatModel:
    """Turn what a caller has at hand into a ChatModel.

    Args:
        model: A ChatModel, a TransformerBridge (which knows its tokenizer), or (model, tokenizer).

    Raises:
        SafeSteerError: For anything else, such as a model without its tokenizer.
    """
    if isinstance(model, ChatModel):
        return model
    if isinstance(model, tuple) and len(model) == 2:
        name = getattr(getattr(model[0], "config", None), "_name_or_path", "") or type(model[0]).__name__
        return ChatModel(model[0], model[1], name)
    if isinstance(model, nn.Module) and is_bridge(model):
        bridge = cast("TransformerBridge", model)
        return ChatModel(bridge, cast(PreTrainedTokenizerBase, bridge.tokenizer), bridge.cfg.model_name)
    raise SafeSteerError(
        f"A {type(model).__name__} has no tokenizer here: pass a ChatModel (safesteer.load_model), a"
        " TransformerBridge, or the pair (model, tokenizer)."
    )


def module_of(model: ModelLike) -> nn.Module:
    """The module itself, for functions that need no tokenizer."""
    if isinstance(model, ChatModel):
        return model.model
    return model[0] if isinstance(model, tuple) else model


def hf_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a TransformerBridge or a PEFT wrapper, or the model itself."""
    if is_bridge(model):
        return model.original_model  # type: ignore[return-value]
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # type: ignore[operator]
    return model  # type: ignore[return-value]


def is_bridge(model: nn.Module) -> bool:
    return any(c.__name__ == "TransformerBridge" for c in type(model).__mro__)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks; block l reads `resid_pre` of layer l."""
    return hf_model(model).get_decoder().layers  # type: ignore[return-value]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm after the last block. Families call it differently."""
    decoder = hf_model(model).get_decoder()
    return getattr(decoder, "norm", None) or decoder.final_layernorm  # type: ignore[return-value]


def output_head(model: nn.Module) -> tuple[Tensor, Tensor | None, float | None]:
    """(weight [d_vocab, d_model], bias or None, final logit soft-capping or None) of the head."""
    inner = hf_model(model)
    head = inner.get_output_embeddings()
    softcap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    return head.weight, getattr(head, "bias", None), softcap  # type: ignore[return-value]


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model reads at once, where its config says so."""
    return getattr(hf_model(model).config.get_text_config(), "max_position_embeddings", None)
