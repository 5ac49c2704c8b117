"""Formats of other tools, read back with their own libraries where there is one."""

from dataclasses import replace
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch

from conftest import assert_near, batch_of, naive_logits, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions.extraction import from_vector
from safesteer.directions.formats import (
    _card,
    from_block_outputs,
    from_repeng,
    from_steering_vectors,
    push_to_hub,
    read_gguf,
    write_gguf,
    write_tensor,
)
from safesteer.models.parts import blocks
from safesteer.steering.direction import Direction, steer


def test_gguf_is_what_llama_cpp_reads(direction, tmp_path):
    """Architecture, keys, tensor name and values, by the gguf package."""
    path = tmp_path / "control.gguf"
    write_gguf(replace(direction, layer=2, coeff=1.5), path, 3, "llama")
    reader = gguf.GGUFReader(str(path))

    def text(key):
        field = reader.get_field(key)
        return bytes(field.parts[field.data[0]]).decode()

    assert text("general.architecture") == "controlvector"
    assert text("controlvector.model_hint") == "llama"
    count = reader.get_field("controlvector.layer_count")
    assert int(count.parts[count.data[0]][0]) == 3
    (tensor,) = reader.tensors
    assert tensor.name == "direction.1"
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert np.allclose(tensor.data, 1.5 * direction.vector.numpy())


def test_gguf_round_trip_steers_alike(tiny_llama, direction, tmp_path):
    direction = replace(direction, layer=2, coeff=1.5)
    write_gguf(direction, tmp_path / "c.gguf", 3)
    candidates = from_block_outputs(tiny_llama, read_gguf(tmp_path / "c.gguf"))
    again = candidates.direction(tiny_llama, "given", 2)
    with steer(tiny_llama, direction):
        want = naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"]))
    with steer(tiny_llama, again):
        assert_near(naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"])), want)


def test_gguf_refuses_what_llama_cpp_cannot_do(direction, tmp_path):
    path = tmp_path / "c.gguf"
    for changed, message in (
        ({"layer": 1}, "layers 2 to 3"),
        ({"layer": 4}, "layers 2 to 3"),
        ({"layer": 2, "operation": "ablate"}, "only add"),
    ):
        with pytest.raises(SafeSteerError, match=message):
            write_gguf(replace(direction, **changed), path, 3)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"not gguf")
    with pytest.raises(SafeSteerError, match="not a GGUF file"):
        read_gguf(path)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SafeSteerError, match="of 'llama', not a control vector"):
        read_gguf(tmp_path / "model.gguf")


def block_output_logits(chat, vectors: dict[int, torch.Tensor]) -> torch.Tensor:
    """What repeng and steering-vectors do: add to the output of each block."""
    handles = [
        blocks(chat.model)[block].register_forward_hook(lambda m, a, out, v=v: out + v)
        for block, v in vectors.items()
    ]
    logits = naive_logits(chat, batch_of(chat, ["Hi"]))
    for handle in handles:
        handle.remove()
    return logits


def as_hotwire_adds(folder, request: dict) -> dict[int, torch.Tensor]:
    """hotwire-vllm: tensors of a folder by file name, one row per layer or one for all; a safe load."""
    store = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    tensor = store[request["id"]]
    row = tensor[request["layer"]] if tensor.dim() == 2 else tensor
    return {request["layer"]: request["scale"] * row}


def as_easysteer_adds(path, layers: list[int]) -> dict[int, torch.Tensor]:
    """EasySteer: a GGUF file names its layers; a bare tensor of one dimension is for those of the request."""
    if path.suffix == ".gguf":
        tensors = gguf.GGUFReader(str(path)).tensors
        return {int(t.name.removeprefix("direction.")): torch.tensor(np.array(t.data)) for t in tensors}
    vector = torch.load(path, weights_only=False)
    assert isinstance(vector, torch.Tensor)
    assert vector.dim() == 1
    return dict.fromkeys(layers, vector.float())


@pytest.mark.parametrize("layer", [1, 2])
def test_vllm_plugins_add_what_steering_adds(tiny_llama, direction, tmp_path, layer):
    direction = replace(direction, layer=layer, coeff=1.5)
    block = write_tensor(direction, tmp_path / "refusal.pt")
    with steer(tiny_llama, direction):
        want = naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"]))
    assert (want - naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"]))).abs().max() > 0.1
    read = [as_hotwire_adds(tmp_path, {"id": "refusal", "layer": block, "scale": 1.0})]
    read.append(as_easysteer_adds(tmp_path / "refusal.pt", [block]))
    if layer > 1:  # the first that llama.cpp's format has
        write_gguf(direction, tmp_path / "refusal.gguf", 3)
        read.append(as_easysteer_adds(tmp_path / "refusal.gguf", []))
    for vectors in read:
        assert_near(block_output_logits(tiny_llama, vectors), want)


def test_vllm_plugins_get_no_more_than_they_can_do(direction, tmp_path):
    for changed, message in (({"layer": 0}, "layers from 1 on"), ({"operation": "ablate"}, "only add")):
        with pytest.raises(SafeSteerError, match=message):
            write_tensor(replace(direction, **changed), tmp_path / "refusal.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "read",
    [
        lambda chat, v: from_repeng(chat, SimpleNamespace(directions={k: x.numpy() for k, x in v.items()})),
        lambda chat, v: from_repeng(chat, v),
        lambda chat, v: from_steering_vectors(
            chat, SimpleNamespace(layer_activations=v, layer_type="decoder_block")
        ),
        lambda chat, v: from_steering_vectors(chat, v),
    ],
)
def test_foreign_vectors_act_where_they_were_made_for(tiny_llama, read):
    vector = 3 * random_vector(32)
    want = block_output_logits(tiny_llama, {0: vector})
    candidates = read(tiny_llama, {0: vector})
    with steer(tiny_llama, candidates.direction(tiny_llama, "given", 1)):
        assert_near(naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"])), want)
    assert candidates.vectors[0, [0, 2]].abs().max() == 0


def test_foreign_vectors_that_do_not_fit_are_refused(tiny_llama):
    last = from_block_outputs(tiny_llama, {-2: torch.ones(32)})
    assert last.vectors[0, 2, 0] == 1.0  # of three blocks the last but one feeds block 2
    with pytest.raises(SafeSteerError, match=r"no candidate at position 'given' of layer 1.* the layers 2\."):
        last.direction(tiny_llama, "given", 1)
    for vectors, message in (({0: torch.ones(31)}, "width 31"), ({3: torch.ones(32)}, "name block 3")):
        with pytest.raises(SafeSteerError, match=message):
            from_block_outputs(tiny_llama, vectors)
    with pytest.raises(SafeSteerError, match="'mlp'"):
        from_steering_vectors(tiny_llama, SimpleNamespace(layer_activations={}, layer_type="mlp"))


def test_weights_of_a_probe_are_taken_without_their_gradient(tiny_llama):
    weight = torch.nn.Linear(32, 2).weight
    for candidates in (from_vector(tiny_llama, weight[0]), from_block_outputs(tiny_llama, {0: weight[0]})):
        assert not candidates.vectors.requires_grad
        candidates.to_frame()


def test_push_uploads_the_file_and_a_card(tiny_llama, direction, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, repo_type, private, exist_ok):
            seen.update(private=private)
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, repo_type):
            seen.update(
                files=sorted(p.name for p in folder_path.iterdir()),
                again=Direction.load(folder_path / "direction.safetensors", tiny_llama),
                card=(folder_path / "README.md").read_text(),
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(direction, "me/refusal") == "https://huggingface.co/me/refusal"
    assert seen["files"] == ["README.md", "direction.safetensors"]
    assert torch.equal(seen["again"].vector, direction.vector)
    assert seen["private"]
    assert "resid_pre" in seen["card"]


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("org/model", "base_model: org/model\n"),
        ("smollm2-135m", "base_model: HuggingFaceTB/"),
        ("/home/me/m", ""),
    ],
)
def test_a_card_names_the_models_of_the_hub_alone(direction, model, line):
    card = _card(replace(direction, model=model))
    assert ("base_model" in card) is bool(line)
    assert line in card
    assert "/home" not in card


def test_what_the_hubs_client_raises_is_one_sentence(direction):
    with pytest.raises(SafeSteerError, match=r"Cannot upload to 'a/b/c': Repo id must"):
        push_to_hub(direction, "a/b/c")


def test_push_without_a_network_is_one_sentence(direction, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SafeSteerError, match="Cannot upload to 'me/refusal'"):
        push_to_hub(direction, "me/refusal")
