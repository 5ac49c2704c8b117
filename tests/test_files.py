"""Files that are whole or absent."""

import math

import pytest
import torch

from safesteer._errors import SafeSteerError
from safesteer._files import atomic, read_json, read_tensors, write_json, write_tensors, write_text


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "text": "caf\u00e9 \u2028 <b>"}
    write_json(tmp_path / "new" / "folder" / "v.json", value)
    assert read_json(tmp_path / "new" / "folder" / "v.json") == value


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
