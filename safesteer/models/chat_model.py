"""TODO models.chat_model."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A causal language model with its tokenizer; `model` is plain, PEFT-wrapped or bridged."""

    model: nn.Module
    tokenizer: object
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
        if self.tokenizer.eos_token_id is not None:  # type: ignore[attr-defined]
            ids.add(self.tokenizer.eos_token_id)  # type: ignore[attr-defined]
        return sorted(ids)

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
