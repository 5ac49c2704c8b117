"""Files that are whole or absent: written beside the target, synced, then renamed over it.

JSON for values and tables, safetensors for vectors; never pickle. Every reader turns a damaged or
foreign file into one sentence. `read_value` is the way back from JSON to nested frozen dataclasses.
"""

import hashlib
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safesteer._clock import timed
from safesteer._errors import SafeSteerError

PART = ".part"  # ends the name of a file that is still being written


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
    os.close(handle)
    work = Path(name)
    try:
        with timed("writing"):
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
    """Yield a temporary folder to write to; it replaces `folder` when the block ends without an error."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work, old = Path(tempfile.mkdtemp(PART, f".{folder.name}.", folder.parent)), None
    try:
        with timed("writing"):
            yield work
            work.chmod(0o755)
            if folder.exists():  # put aside first: at no moment is there less than one whole folder
                old = Path(tempfile.mkdtemp(PART, f".{folder.name}.", folder.parent))
                folder.rename(old / "old")
            work.rename(folder)
            sync_folder(folder.parent)
    except SafetensorError as error:
        raise SafeSteerError(f"Cannot write {folder}: {error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if old is not None:
            if not folder.exists():
                (old / "old").rename(folder)
            shutil.rmtree(old, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Delete what a killed process was writing in `folder`. Call it only under the folder's lock."""
    for part in folder.glob(f".*{PART}"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    if os.name == "nt":  # Windows opens no folders, and has no such promise
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    with atomic(path) as work:
        work.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    """Append to a text file, made where it is not there, and bring it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a value as JSON. Numbers that JSON cannot hold (NaN, infinity) raise ValueError.

    Args:
        path: The file.
        value: What `json.dumps` takes.
        indent: Spaces per level; None: all on one line, for many numbers.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, in ASCII."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read a JSON file; raises SafeSteerError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SafeSteerError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise SafeSteerError(f"{path} is not a JSON file that SafeSteer wrote.") from error


def read_value(kind: Any, path: str | Path, name: str) -> Any:
    """Read a value from the JSON that `write_json(path, dataclasses.asdict(value))` wrote.

    Args:
        kind: The value's type, as `from_json` takes it.
        path: The file.
        name: What the file is called in the error, such as "a token file".

    Raises:
        SafeSteerError: Where the file is missing, damaged, or of another shape.
    """
    raw = read_json(Path(path))
    try:
        return from_json(kind, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SafeSteerError(f"{path} is not {name} of this version.") from error


def from_json(kind: Any, raw: Any) -> Any:
    """Turn plain JSON values into a value of type `kind`, following its annotations.

    `kind` is a dataclass or a type that JSON holds, nested in tuples, dicts and `| None`.
    """
    if is_dataclass(kind):
        hints, unknown = _hints(kind), raw.keys() - {f.name for f in fields(kind)}
        if unknown:
            raise TypeError(f"unknown fields: {sorted(unknown)}")
        return kind(**{name: from_json(hints[name], value) for name, value in raw.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        kinds = [args[0]] * len(raw) if args[1:] == (...,) else args
        return tuple(from_json(k, v) for k, v in zip(kinds, raw, strict=True))
    if origin is dict:  # JSON knows no keys but strings
        return {args[0](k): from_json(args[1], v) for k, v in raw.items()}
    if origin in (UnionType, typing.Union):
        remaining = [a for a in args if a is not type(None)]
        return None if raw is None else from_json(remaining[0], raw)
    return raw


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def text_lines(path: str | Path) -> list[tuple[int, str]]:
    """Read the lines of a UTF-8 file that are not empty, each with its number from 1.

    A BOM is dropped. Only a line feed ends a line, because texts may hold other separators. Raises
    OSError or ValueError: what the file is for, the caller knows.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file, each a JSON object. Raises OSError or ValueError."""
    rows = []
    for number, line in text_lines(path):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        rows.append(row)
    return rows


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file whose header carries `metadata` as JSON."""
    with atomic(path) as work:
        save_file(tensors, work, metadata={"safesteer": json.dumps(metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata that `write_tensors` wrote.

    Raises:
        SafeSteerError: Where the file is missing, damaged or written by something else.
    """
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
    """Return the SHA-256 of a file's content, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process work in a folder: the lock goes with the process, however it ends."""
    lock = FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise SafeSteerError(f"Another process is at work in {path}.") from error
    except OSError as error:
        raise SafeSteerError(f"Cannot write to the run folder {path}: {error.strerror}.") from error
    try:
        remove_parts(path)
        yield
    finally:
        lock.release()
