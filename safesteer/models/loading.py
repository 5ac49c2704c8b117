"""Load a chat model by name: a Hub id, a local folder, a GGUF file, or one of the small models with a name.

Whatever it is, transformers loads a Hub repository or a Hugging Face folder: `gguf.py` makes one of a GGUF
file, `named.py` knows where the small models come from.
"""

import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypedDict, Unpack

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
)

from safesteer._clock import timed
from safesteer._errors import SafeSteerError, first_line, is_out_of_memory
from safesteer.models.chat_model import ChatModel
from safesteer.models.gguf import gguf_folder, is_gguf
from safesteer.models.named import NAMED, SMOLLM2, named_source
from safesteer.models.placement import DeviceMap, is_offloaded, read_map, spread
from safesteer.models.precision import as_dtype
from safesteer.models.quiet import quiet_transformers
from safesteer.models.templates import render, set_template
from safesteer.models.traits import self_check


class HubOptions(TypedDict, total=False):
    """What transformers takes beside a model's name, and passes on to the Hub."""

    revision: str | None
    trust_remote_code: bool


@timed("loading")
def load_model(
    name: str | Path = SMOLLM2,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    template: str | None = None,
    template_args: Mapping[str, Any] | Sequence[str] | None = None,
    quantize: str | None = None,
    **hub: Unpack[HubOptions],
) -> ChatModel:
    """Load a chat model and its tokenizer.

    Args:
        name: A Hub id, a local folder, a GGUF file (or any part of one: see `models.gguf.gguf_folder`),
            "smollm2-135m" or "qwen2.5-coder-0.5b".
        dtype: Precision of the weights, as a torch dtype or its name; "auto" is that of the files.
        device: Where to put them; "auto" takes CUDA where there is one, else the CPU. With a map it is where
            all but the blocks lies, and where those blocks run that lie in the CPU's memory or on the disk.
        device_map: For a model that does not fit one device: "auto" fills the GPUs evenly, then the CPU's
            memory, then the disk; "disk" leaves all blocks on the disk; or a place for each part by its
            name, as accelerate takes it: {"": 0, "model.layers.7": "cpu", "model.layers.8": "disk"}.
        template: Chat template in place of the model's own: for a base model "raw" (the text as it is),
            "plain" ("User: ..."), "chatml", or a Jinja file.
        template_args: Defaults of the template's arguments, such as {"enable_thinking": True}; thinking is
            off otherwise. An export keeps them.
        quantize: "4bit" quantizes the weights of linear maps (nf4) while they load; passes compute in
            `dtype`. Such weights can carry an adapter and not train themselves. It needs the extra `quant`.
        hub: `revision`, the branch, tag or commit of a Hub model (None: its main branch); and
            `trust_remote_code`, which runs the code that a model's repository ships.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        SafeSteerError: For a model that cannot be found, is not a decoder-only language model, or has
            no chat template; where it cannot be quantized; for a device without float64; for a device map
            that leaves out a part, or that the model cannot run with.

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
    unknown = hub.keys() - HubOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"load_model takes no {', '.join(sorted(unknown))}.")
    name, options = str(name), {"revision": None, "trust_remote_code": False, **hub}
    dtype = dtype if dtype == "auto" else as_dtype(dtype)
    device_map = read_map(device_map)
    names_places = device == "auto" and isinstance(device_map, Mapping)  # of which one is the first device
    device = _with_float64(best_device() if device == "auto" else device)
    if quantize is not None and device_map is not None:
        raise SafeSteerError("Quantized weights lie on one device: leave out quantize or device_map.")
    if quantize is not None:
        _check_quantize(name, quantize, options["revision"])
    source = name
    if name in NAMED:
        source = named_source(name, options["revision"])
    elif is_gguf(name):
        source = str(gguf_folder(name, dtype))
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            config = AutoConfig.from_pretrained(source, **options)
            if device_map is not None:
                first = None if names_places else torch.device(device)
                model = _opened_apart(name, source, config, dtype, first, device_map, options)
            else:
                storage = {} if quantize is None else _four_bit(name, config, dtype, device)
                model = _whole(_auto_class(config), name, source, dtype=dtype, **storage, **options)
                model.to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise _not_loaded(name, error, bool(options["trust_remote_code"])) from error
    if model.config.is_encoder_decoder:
        raise SafeSteerError(f"'{name}' is an encoder-decoder; SafeSteer needs a decoder-only model.")
    set_template(tokenizer, template, template_args)
    render(tokenizer, "x")  # a missing chat template is reported here, before any work
    model.eval().requires_grad_(False)
    for module in model.modules():
        # Where the CPU has AVX512-BF16, bitsandbytes repacks weights in the first pass without gradients,
        # and later ones go through them without any: an adapter below would learn nothing, and no error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    _check_reads(model, name, config)
    return ChatModel(model, tokenizer, name)


def _not_loaded(name: str, error: Exception, trusts: bool) -> SafeSteerError:
    """Say why transformers loads no model of this name."""
    if "custom code" in str(error) and not trusts:
        return SafeSteerError(
            f"The model '{name}' brings code of its own, which runs only where you trust it:"
            " trust_remote_code=True (--trust-remote-code)."
        )
    return SafeSteerError(
        f"Cannot load the model '{name}': give a Hub id, a local folder, a GGUF file,"
        f" or {' or '.join(repr(known) for known in NAMED)}."
        f" ({first_line(error)})"
    )


def _check_reads(model: nn.Module, name: str, config: PretrainedConfig) -> None:
    """Check the model on a few tokens; raise SafeSteerError where the way its weights are stored fails."""
    try:
        self_check(model)
    except (AssertionError, RuntimeError) as error:
        if getattr(config, "quantization_config", None) is not None:
            raise SafeSteerError(
                f"The quantized weights of '{name}' cannot be read ({first_line(error)}): load a copy that is"
                " not quantized."
            ) from error
        if is_offloaded(model):
            raise SafeSteerError(
                f"{type(model).__name__} does not run with blocks in the CPU's memory or on the disk"
                f" ({first_line(error, 100)}): they read weights past the modules that hold them. Give a map"
                " with GPUs alone."
            ) from error
        raise


def _check_quantize(name: str, quantize: str, revision: str | None) -> None:
    """Raise SafeSteerError where `quantize` is no known word, or the model or this machine cannot do it."""
    if quantize != "4bit":
        raise SafeSteerError(f"quantize is '4bit' or None, not {quantize!r}.")
    from_wheel = name in NAMED and named_source(name, revision) != NAMED[name].base_model
    if from_wheel or is_gguf(name):
        raise SafeSteerError(
            f"The weights of '{name}' come dequantized from a GGUF file and would be rounded twice: quantize"
            " a Hub id or a Hugging Face folder."
        )
    if find_spec("bitsandbytes") is None:
        raise SafeSteerError("quantize needs the bitsandbytes package: pip install 'safesteer[quant]'.")


def _four_bit(name: str, config: PretrainedConfig, dtype: torch.dtype | str, device: str) -> dict[str, Any]:
    """Return the options by which transformers rounds weights to 4 bits while it loads them.

    Raises:
        SafeSteerError: If they are quantized already.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise SafeSteerError(f"The weights of '{name}' are quantized already: load it without quantize.")
    rounding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype,
    )
    return {"quantization_config": rounding, "device_map": {"": device}}


def _whole(kind: Any, name: str, source: str, **options: Any) -> Any:
    """Load a model; raise SafeSteerError where its files lack weights, which would be drawn at random."""
    model, report = kind.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise SafeSteerError(
            f"The files of '{name}' lack {len(missing)} weights of {type(model).__name__} ({missing[0]} ...),"
            " for which random numbers would stand: they are incomplete, or of a model of another kind."
        )
    return model


def _opened_apart(
    name: str,
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    first: torch.device | None,
    device_map: DeviceMap,
    options: dict[str, Any],
) -> Any:
    """Load the weights to the places of a map; `first` is the device of all but the blocks."""
    kind = _auto_class(config)
    with torch.device("meta"):
        narrow = config.dtype if dtype == "auto" else dtype
        empty = kind.from_config(config, dtype=narrow, trust_remote_code=options["trust_remote_code"])
    places = spread(empty, device_map, first)
    folder = mkdtemp(prefix="safesteer-")  # for weights that no file holds as they are: merged experts
    try:
        options = {"device_map": places, "offload_folder": folder, **options}
        model = _whole(kind, name, source, dtype=dtype, **options)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def _auto_class(config: PretrainedConfig) -> Any:
    """Choose the class that loads it: to transformers not every multimodal wrapper is a causal model."""
    kind = type(config)
    is_wrapper = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def best_device() -> str:
    """Name the device that "auto" puts a model on."""
    if torch.cuda.is_available():  # under torchrun each process has a device of its own
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"


def _with_float64(device: str) -> str:
    """Return the device, or raise SafeSteerError where it is missing or has no float64, as sums need."""
    if device.startswith("mps"):
        raise SafeSteerError("MPS has no float64, which SafeSteer computes in: use device='cpu'.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SafeSteerError(
            f"This machine has no device '{device}' ({first_line(error, 120)}): use cpu."
        ) from error
    return device
