"""GGUF files: dequantized once, kept as a plain Hugging Face folder, and loaded from there as any other.

    model.gguf, or its parts in order  ->  one file  ->  $SAFESTEER_CACHE/gguf/NAME-SHA256

1. The folder's name holds the hash of the file: a file that changes is another folder.
2. transformers dequantizes. What it would get wrong without a word is checked here: every number of the
   file has to be in the model, and the scaling of RoPE that llama.cpp stores as a tensor moves into the
   config.
3. An output head that is the embedding in another rounding (cosine above 0.99) is tied to it again. The
   head's rounding is the one to keep: llama.cpp never makes it the coarser of the two unless told to.
4. The folder is whole or absent, and one process converts while others wait for it.
"""

import copy
import hashlib
import os
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, cast

import gguf
import psutil
import torch
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from safesteer._errors import SafeSteerError, first_line
from safesteer._files import remove_parts, whole_folder
from safesteer.models.quiet import quiet_transformers

JOINED = "model.gguf"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
BYTES = re.compile(r"(?P<stem>.+\.gguf)\.part(?P<number>\d+)(of(?P<count>\d+))?", re.IGNORECASE)
TIED = 0.99  # cosine of head and embedding: 0.999 where Q5_0 and Q8_0 round one matrix, near 0 for two
# What readers of other people raise on a damaged file.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, struct.error)


def cache_dir() -> Path:
    """Return where dequantized weights are kept: $SAFESTEER_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("SAFESTEER_CACHE", f"{base}/safesteer")).expanduser()


def is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file or of a part of one."""
    path = Path(name)
    return not path.is_dir() and (path.suffix.lower() == ".gguf" or BYTES.fullmatch(path.name) is not None)


def gguf_folder(path: str | Path, dtype: torch.dtype | str = torch.float32) -> Path:
    """Dequantize a GGUF file once and return the Hugging Face folder that is kept of it.

    Args:
        path: The file, or any of its parts: `name-00001-of-00003.gguf` (llama.cpp's split), or
            `name.gguf.part1` and `name.gguf.part1of3` (bytes that are put one after the other).
        dtype: Precision of the kept weights: half precision needs half of the memory; anything else, and
            "auto", is float32.

    Raises:
        SafeSteerError: If the file or a part is missing or damaged, transformers cannot read a model of its
            kind, or the memory does not hold it.
    """
    path = Path(path)
    parts, split = part_files(path), SPLIT.fullmatch(path.name)
    matched = split or BYTES.fullmatch(path.name)
    label = (matched["stem"] if matched else path.name).removesuffix(".gguf")
    place = partial(join_split if split else join_bytes, parts)
    return keep(label, hash_of(parts), place, dtype, str(path))


def part_files(path: Path) -> list[Path]:
    """Return the files that make up a GGUF file, in order: itself, or the parts that lie beside it.

    Raises:
        SafeSteerError: If the file or one of its parts is missing.

    Example:
        >>> from safesteer.models.gguf import part_files
        >>> for n in (1, 2):
        ...     _ = (folder / f"model.gguf.part{n}").write_bytes(b"")
        >>> [path.name for path in part_files(folder / "model.gguf.part1")]
        ['model.gguf.part1', 'model.gguf.part2']
    """
    if not path.is_file():
        raise SafeSteerError(f"There is no file {path}.")
    for rule in (SPLIT, BYTES):
        matched = rule.fullmatch(path.name)
        if matched is None:
            continue
        beside: dict[int, Path] = {}
        for other in path.parent.iterdir():
            same = rule.fullmatch(other.name)
            if same and (same["stem"], same["count"]) == (matched["stem"], matched["count"]):
                beside[int(same["number"])] = other
        first = 0 if 0 in beside else 1
        last = first + int(matched["count"]) - 1 if matched["count"] else max(beside)
        missing = [n for n in range(first, last + 1) if n not in beside]
        if missing:
            raise SafeSteerError(
                f"Part {missing[0]} of {matched['stem']} is missing: all {last + 1 - first} parts have to lie"
                f" in {path.parent}."
            )
        return [beside[n] for n in range(first, last + 1)]
    return [path]


def hash_of(paths: list[Path]) -> str:
    """Return the SHA-256 of files that are read one after the other, in hex."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def join_bytes(parts: list[Path], target: Path) -> None:
    """Write parts of one file one after the other; a file that is whole is only linked."""
    if len(parts) == 1:
        try:
            target.symlink_to(parts[0].resolve())
            return
        except OSError:  # Windows lets few users link
            pass
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)


def join_split(parts: list[Path], target: Path) -> None:
    """Write the files of llama.cpp's split as one: metadata of the first, tensors of all, one at a time."""
    readers = [_reader(part) for part in parts]
    architecture = readers[0].fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in readers[0].fields.values():
        value = field.contents()
        skipped = field.name.startswith(("GGUF.", "split.")) or field.name == "general.architecture"
        if not skipped and value != []:
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, value, field.types[0], sub_type)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def keep(
    label: str,
    sha256: str,
    place: Callable[[Path], None],
    dtype: torch.dtype | str = torch.float32,
    source: str | None = None,
) -> Path:
    """Return the folder kept of a GGUF file, which is dequantized on the first call.

    Args:
        label: Begins the folder's name.
        sha256: The hash of the file, in hex: 32 digits of it end the folder's name.
        place: Puts the file at a path, where the folder is not there yet.
        dtype: As for `gguf_folder`.
        source: What errors call the file; None: the label.
    """
    half = dtype if dtype in (torch.float16, torch.bfloat16) else None
    target = cache_dir() / "gguf" / f"{label}-{sha256[:32]}"
    if half and not (target / "config.json").exists():
        target = target.with_name(f"{target.name}-{str(half).removeprefix('torch.')}")
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):  # others wait: two conversions would need twice the memory
        if not (target / "config.json").exists():
            remove_parts(target.parent)
            with whole_folder(target) as work:
                try:
                    place(work / JOINED)
                    model, tokenizer = _dequantize(work, half or torch.float32, source or label)
                except UNREADABLE as error:
                    raise SafeSteerError(
                        f"Cannot read a model from {source or label}: is it a whole GGUF file of a language"
                        f" model? ({first_line(error)})"
                    ) from error
                with quiet_transformers():
                    model.save_pretrained(work)
                    tokenizer.save_pretrained(work)
                (work / JOINED).unlink()
    return target


def _reader(path: Path) -> Any:
    return gguf.GGUFReader(str(path))


def _dequantize(work: Path, dtype: torch.dtype, source: str) -> tuple[Any, Any]:
    """Read model and tokenizer from the GGUF file in a folder."""
    reader = _reader(work / JOINED)
    _check_memory(reader, dtype, source)
    # The reader's own progress bar has no switch: it goes to stderr.
    with quiet_transformers(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=JOINED)
        config = AutoConfig.from_pretrained(work, gguf_file=JOINED)
        scaled = _rope_scaling(reader, config, source)
        read = AutoModelForCausalLM.from_pretrained(work, config=config, gguf_file=JOINED, dtype=dtype)
    _check_whole(reader, read, source)
    _tie(read)
    # What was read has a quantizer, with which save_pretrained raises: the weights move (they are not copied)
    # into a clean model of the same configuration.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    if scaled:
        read.config.rope_parameters = scaled
    with torch.device("meta"):
        model = type(read)(read.config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, tokenizer


def _check_memory(reader: Any, dtype: torch.dtype, source: str) -> None:
    """Refuse a model that the free memory does not hold: the system would end the process without a word."""
    needed = sum(int(tensor.n_elements) for tensor in reader.tensors) * dtype.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        half = " dtype='bfloat16' needs half of it." if dtype.itemsize > 2 else ""
        raise SafeSteerError(
            f"The weights of {source} need {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are"
            f" free.{half}"
        )


def _check_whole(reader: Any, model: nn.Module, source: str) -> None:
    """Compare the numbers of the file with those of the model: what a reader does not know it drops."""
    is_tied = cast(Any, model).config.tie_word_embeddings
    unused = {"output.weight"} if is_tied else set()
    tensors = [t for t in reader.tensors if t.name not in unused and not t.name.startswith("rope_")]
    in_file, in_model = sum(int(t.n_elements) for t in tensors), sum(p.numel() for p in model.parameters())
    if in_file != in_model:
        raise SafeSteerError(
            f"{source} holds {in_file:,} weights, and transformers' {type(model).__name__} {in_model:,}, so"
            " that it would be another model: load it from its Hub repository instead."
        )


def _tie(model: Any) -> None:
    """Tie an output head that is the embedding in another rounding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or head.weight.shape != embedding.weight.shape:
        return
    products = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(head.weight.split(4096), embedding.weight.split(4096), strict=True):
        a, b = a.detach().double(), b.detach().double()
        products += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    if float(products[0] / (products[1] * products[2]).sqrt()) > TIED:
        embedding.weight = head.weight
        model.config.tie_word_embeddings = True


def _rope_scaling(reader: Any, config: PretrainedConfig, source: str) -> dict[str, Any] | None:
    """Return the RoPE parameters of a file whose scaling transformers does not read; None: it has none.

    llama.cpp stores the scaling of Llama 3.1 and later as divisors of the frequencies, not as settings.
    """
    fields, tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
    architecture = fields["general.architecture"].contents()
    kind = fields.get(f"{architecture}.rope.scaling.type")
    names = [name for name in tensors if name.startswith("rope_")]
    if names == ["rope_freqs.weight"]:
        tensor = tensors[names[0]]
        divisors = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).flatten()
        if bool((divisors == 1).all()):
            return None
        scaled = copy.deepcopy(config)
        scaled.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        frequencies = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]
        exponents = torch.arange(len(divisors)) / len(divisors)
        plain = config.rope_parameters["rope_theta"] ** -exponents
        if frequencies.shape == plain.shape and torch.allclose(frequencies * divisors, plain, rtol=1e-3):
            return scaled.rope_parameters
    elif not names and (kind is None or kind.contents() == "none" or architecture == "gpt-oss"):
        return None
    raise SafeSteerError(
        f"{source} scales its rotary positions in a way that transformers does not read from GGUF: load the"
        " model from its Hub repository instead."
    )
