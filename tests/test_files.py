"""Files that are whole or absent."""

import json
import math
from dataclasses import asdict, dataclass

import pytest
import torch

from safesteer._errors import SafeSteerError
from safesteer._files import (
    atomic,
    json_lines,
    read_json,
    read_tensors,
    read_value,
    write_json,
    write_tensors,
    write_text,
)


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "text": "caf\u00e9 \u2028 <b>"}
    write_json(tmp_path / "new" / "folder" / "v.json", value)
    assert read_json(tmp_path / "new" / "folder" / "v.json") == value


@dataclass(frozen=True)
class Leaf:
    name: str
    range: tuple[float, float]
    note: str = "as before"


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    by_id: dict[int, Leaf]
    best: Leaf | None
    settings: dict


LEAF = Leaf("a", (0.5, 1.0))
TREE = Tree((LEAF, Leaf("b", (2.0, 3.0), "x")), {7: LEAF}, None, {"k": [1, 2]})


@pytest.mark.parametrize("value", [TREE, Tree((), {}, LEAF, {}), LEAF])
def test_a_value_round_trip(tmp_path, value):
    write_json(tmp_path / "v.json", asdict(value))
    assert read_value(type(value), tmp_path / "v.json", "a tree") == value


def test_a_field_with_a_default_may_be_missing(tmp_path):
    write_json(tmp_path / "v.json", {"x": {"name": "a", "range": [0.5, 1.0]}})
    assert read_value(dict[str, Leaf], tmp_path / "v.json", "a dict") == {"x": LEAF}


@pytest.mark.parametrize(
    "raw",
    [
        [],
        7,
        {"name": "a"},
        {"name": "a", "range": [0.5]},
        {"name": "a", "range": 1},
        {"name": "a", "range": [0.5, 1.0], "more": 1},
    ],
)
def test_a_value_of_another_shape_is_one_sentence(tmp_path, raw):
    write_json(tmp_path / "v.json", raw)
    with pytest.raises(SafeSteerError, match=r"v\.json is not a leaf of this version"):
        read_value(Leaf, tmp_path / "v.json", "a leaf")


def test_json_lines_end_at_line_feeds_only(tmp_path):
    rows = [{"a": "x\u2028y\x85z"}, {"b": 1}]
    text = "\r\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "r.jsonl").write_bytes(f"\ufeff{text}\n".encode())
    assert json_lines(tmp_path / "r.jsonl") == rows


@pytest.mark.parametrize("text", ['{"a": 1}\n\n[1]', "{}\n\n7"])
def test_json_lines_holds_objects_only(tmp_path, text):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match="line 3 is not a JSON object"):
        json_lines(tmp_path / "r.jsonl")


def test_tensor_round_trip(tmp_path):
    tensors = {"x": torch.randn(3, 2), "n": torch.arange(3)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"step": 3, "name": "\u00e9"})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"step": 3, "name": "\u00e9"}
    assert set(found) == {"x", "n"}
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "v.json"
    write_text(path, "old")

    def write_half():
        with atomic(path) as work:
            work.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"]


def test_a_write_replaces_the_old_file_at_the_end(tmp_path):
    path = tmp_path / "v.txt"
    write_text(path, "old")
    with atomic(path) as work:
        work.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_cannot_hold_are_refused(tmp_path, number):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "v.json", {"x": number})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_damaged_json_is_one_sentence(tmp_path, content):
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(SafeSteerError, match=r"v\.json is not a JSON file"):
        read_json(path)


def test_foreign_tensor_files_are_one_sentence(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "t.safetensors"
    for metadata in (None, {"other": "x"}, {"safesteer": "{"}):
        save_file({"x": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(SafeSteerError, match=r"t\.safetensors is not a safetensors file"):
            read_tensors(path)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_missing_files_are_one_sentence(tmp_path, read):
    with pytest.raises(SafeSteerError, match=r"Cannot read .*absent"):
        read(tmp_path / "absent")
