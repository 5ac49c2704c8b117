"""A chat model as one value: the weights, the tokenizer and what the method asks of them.

`as_chat` accepts what people have at hand: a ChatModel, a TransformerLens bridge, or a pair of a Hugging
Face model and its tokenizer.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError
from safesteer.models.batch import Continuation, PromptBatch, batches, cut_at_eos
from safesteer.models.hashing import bfloat16_bytes
from safesteer.models.parts import blocks, hf_model, is_adapted, is_bridge, is_quantized, text_config
from safesteer.models.passes import n_rows_in_order, take_hooks_off
from safesteer.models.placement import input_device, require_together
from safesteer.models.templates import end_of_turn
from safesteer.models.traits import check_table, require_padding, traits_of
from safesteer.prompts.conversation import PromptLike, as_prompts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A causal language model with its tokenizer.

    Args:
        model: A decoder-only model of transformers, plain or PEFT-wrapped, or a TransformerBridge.
        tokenizer: Its tokenizer, with a chat template.
        name: What tables and files call it.

    Example:
        >>> ss.ChatModel(chat.model, chat.tokenizer, "mine").name
        'mine'
    """

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
        """Where inputs must be, and where final hidden states and the output head are."""
        return input_device(self.model)

    @property
    def eos_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's, the tokenizer's and the template's."""
        generation = hf_model(self.model).generation_config
        configured = None if generation is None else generation.eos_token_id
        ids = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
        if isinstance(self.tokenizer.eos_token_id, int):
            ids.add(self.tokenizer.eos_token_id)
        turn = end_of_turn(self.tokenizer)
        return sorted(ids if turn is None else {*ids, turn})

    def copy(self) -> "ChatModel":
        """Copy the plain Hugging Face model: one that may be trained, changed or exported.

        Steering that is on stays with the original; hooks of your own are copied.

        Raises:
            SafeSteerError: For a model that a device map has spread, or that carries an adapter.
        """
        require_together(self.model)
        if is_bridge(self.model):
            return ChatModel(_without_bridge(self.model), self.tokenizer, self.name)
        inner = hf_model(self.model)
        if is_adapted(inner):
            raise SafeSteerError(f"'{self.name}' carries an adapter: merge it first (models.adapter.merged).")
        model = copy.deepcopy(inner)
        take_hooks_off(model)
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
        prompts: Sequence[PromptLike],
        batch_size: int,
        *,
        system: str | None = None,
        continuations: Sequence[Continuation] | None = None,
    ) -> Iterator[tuple[list[int], PromptBatch]]:
        """Yield batches of similar token length: (indices into `prompts`, batch on the model's device).

        For a model that cannot read padding all texts of a batch are equally long. Where an intervention has
        a vector per prompt, there is one batch, in the order of `prompts`.

        Raises:
            SafeSteerError: Where an intervention has another number of vectors, or one per prompt and the
                model cannot read padding.
        """
        prompts = as_prompts(prompts)

        def batch_of(rows: list[int]) -> PromptBatch:
            after = None if continuations is None else [continuations[i] for i in rows]
            texts = [prompts[i] for i in rows]
            return PromptBatch.of(self.tokenizer, texts, after, system=system, device=self.device)

        n_vectors = n_rows_in_order(self.model)
        if n_vectors is not None:
            rows = list(range(len(prompts)))
            batch = batch_of(rows).plain()
            if n_vectors != len(rows):
                raise SafeSteerError(f"{n_vectors} vectors, one each, cannot steer {len(rows)} prompts.")
            require_padding(self.model, batch.attention_mask)
            yield rows, batch
            return
        for rows in batches(self.tokenizer, prompts, batch_size, system=system):
            batch = batch_of(rows)
            if traits_of(self.model).pads or bool(batch.attention_mask.all()):
                yield rows, batch
                continue
            lengths = batch.attention_mask.sum(1).tolist()
            for length in sorted(set(lengths)):
                equal = [row for row, n in zip(rows, lengths, strict=True) if n == length]
                yield equal, batch_of(equal)

    def check(self) -> pd.DataFrame:
        """Show what was measured of the model on a few tokens: what it does right, and what follows.

        Returns:
            One row per check. Columns: check, deviation (of the reference's spread; None: not tried), right,
            remark (what is done otherwise, or not at all).

        Example:
            >>> table = chat.check()
            >>> list(table.check)  # doctest: +NORMALIZE_WHITESPACE
            ['logits', 'padding', 'shared prefix', 'repeated cache', 'cached decoding', 'writes']
            >>> bool(table.right.all())
            True
        """
        return check_table(self.model)

    @property
    def fingerprint(self) -> str:
        """Hash of architecture and a sample of the weights: tells two models of a size apart."""
        return self.fingerprint_through(None)

    def fingerprint_through(self, dtype: torch.dtype | None) -> str:
        """Return the fingerprint that the model has after its weights were rounded to a precision."""
        config, digest = self.config, hashlib.sha256()
        shape = (config.model_type, config.num_hidden_layers, config.hidden_size, self.d_vocab)
        digest.update(repr(shape).encode())
        row = cast(Tensor, hf_model(self.model).get_input_embeddings().weight)[:64, :32]
        digest.update(bfloat16_bytes(row, dtype))
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


def _without_bridge(bridge: nn.Module) -> PreTrainedModel:
    """Build the plain model again: a bridge wraps the modules of its own under other names."""
    wrapped = hf_model(bridge)
    if is_quantized(wrapped):
        raise SafeSteerError("A bridge over quantized weights cannot be copied: pass the plain model.")
    config = copy.deepcopy(wrapped.config)
    config._attn_implementation = None  # a bridge asks for "eager", which shows attention patterns
    model = type(wrapped)(config).to(device=wrapped.device)
    weights = {n.replace("._original_component", ""): w for n, w in wrapped.state_dict().items()}
    for name, p in model.named_parameters():  # each alone: `to` would round the rotary frequencies as well
        p.data = p.data.to(weights[name].dtype)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.generation_config = copy.deepcopy(wrapped.generation_config)
    return model.eval()
