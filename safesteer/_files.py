"""Files that are whole or absent: written beside the target, synced, then renamed over it.

JSON for values and tables, safetensors for vectors; never pickle. Every reader turns a damaged or
foreign file into one sentence.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safesteer._errors import SafeSteerError

PART = ".part"  # ends the name of a file that is still being written


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
    os.close(handle)
    work = Path(name)
    try:
        yield work
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.chmod(0o644)
        work.replace(path)
        sync_folder(path.parent)
    except SafetensorError as error:
        raise SafeSteerError(f"Cannot write {path}: {error}.") from error
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to; it replaces `folder` when the block ends without an error."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(PART, f".{folder.name}.", folder.parent))
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
        sync_folder(folder.parent)
    except SafetensorError as error:
        raise SafeSteerError(f"Cannot write {folder}: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process was writing in `folder`. Call it only under the folder's lock."""
    for part in folder.glob(f".*{PART}"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as work:
        work.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Numbers that JSON cannot hold (NaN, infinity) are an error, not a nonstandard file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SafeSteerError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise SafeSteerError(f"{path} is not a JSON file that SafeSteer wrote.") from error


def json_lines(path: str | Path) -> list[Any]:
    """Rows of a JSON Lines file, with or without a BOM; only a line feed ends a row, because texts may
    hold other separators. Raises OSError or ValueError: what the file is for, the caller knows."""
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """A safetensors file whose header carries `metadata` as JSON."""
    with atomic(path) as work:
        save_file(tensors, work, metadata={"safesteer": json.dumps(metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["safesteer"])
            names = file.keys()  # the open file itself is not iterable
            return {name: file.get_tensor(name) for name in names}, metadata
    except OSError as error:
        raise SafeSteerError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise SafeSteerError(f"{path} is not a safetensors file that SafeSteer wrote.") from error


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process a run folder: the lock goes with the process, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = (path / ".lock").open("w")
    except OSError as error:
        raise SafeSteerError(f"Cannot write to the run folder {path}: {error.strerror}.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SafeSteerError(f"Another process is at work in {path}.") from error
        remove_parts(path)
        yield
