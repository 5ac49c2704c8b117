"""The value and its file: applied as it says, and refused where it does not belong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import assert_near, batch_of, copy_of, naive_logits, unchecked
from safesteer._errors import SafeSteerError
from safesteer._files import write_json, write_tensors
from safesteer.directions.candidates import Candidates
from safesteer.models.generation import generate
from safesteer.steering.direction import Direction, steer
from safesteer.steering.hooks import apply_hooks
from safesteer.steering.interventions import ablate, clamp


def test_direction_is_the_chosen_candidate(tiny_llama, candidates, few):
    direction = candidates.direction(tiny_llama, "-2", 1, coeff=1.5, prompts=few)
    assert torch.equal(direction.vector, candidates.vectors[-2, 1])
    assert (direction.layer, direction.position, direction.coeff) == (1, "-2", 1.5)
    assert (direction.model, direction.prompts_hash) == ("tiny-llama", few.hash)
    assert float(direction.unit.norm()) == pytest.approx(1)
    direction.check(tiny_llama)


def test_layers_and_coefficients_of_tables_can_be_saved(tiny_llama, candidates, tmp_path):
    """numpy's numbers, as a sweep's table holds them."""
    with unchecked():
        direction = candidates.direction(tiny_llama, "-2", np.int64(1), coeff=np.float32(2))
    assert (type(direction.layer), type(direction.coeff)) == (int, float)
    direction.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").metadata == direction.metadata


def test_a_layer_without_a_vector_is_refused(tiny_llama, direction):
    only = Candidates.only(direction, 3)
    assert torch.equal(only.direction(tiny_llama, "-1", 1).vector, direction.vector)
    with pytest.raises(SafeSteerError, match="of layer 2: the positions are '-1' and the layers 1"):
        only.direction(tiny_llama, "-1", 2)


def test_steer_adds_coeff_times_vector(tiny_llama, direction):
    seen = {}

    def run(name):
        with apply_hooks(tiny_llama.model, {("resid_pre", 1): lambda h: seen.update({name: h})}):
            naive_logits(tiny_llama, batch_of(tiny_llama, ["Hi"]))

    run("base")
    for name, coeff in (("default", None), ("half", 0.5), ("none", 0.0)):
        with steer(tiny_llama, direction, coeff):
            run(name)
    for name, strength in (("default", direction.coeff), ("half", 0.5), ("none", 0.0)):
        moved = seen[name] - seen["base"]
        assert_near(moved, (strength * direction.vector).expand_as(moved), 1e-5)


def test_direction_round_trip(tiny_llama, direction, tmp_path):
    direction.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors", tiny_llama)
    assert torch.equal(again.vector, direction.vector)
    assert replace(again, vector=direction.vector).__dict__ == direction.__dict__
    assert again.with_coeff(3.0).coeff == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 16}, "model fingerprint differs"),
        ({"template_hash": "0" * 16}, "chat template differs"),
        ({"vector": torch.ones(16)}, "width differs"),
        ({"layer": 3}, "is of layer 3, but 'tiny-llama' has 3 layers"),
        ({"layer": -1}, "is of layer -1"),
    ],
)
def test_direction_of_another_model_is_refused(tiny_llama, direction, tmp_path, change, message):
    path = tmp_path / "d.safetensors"
    replace(direction, **change).save(path)
    Direction.load(path)
    with pytest.raises(SafeSteerError, match=message) as caught:
        Direction.load(path, tiny_llama)
    assert "d.safetensors" in str(caught.value)


def test_direction_does_not_fit_a_retrained_or_another_model(tiny_llama, tiny_qwen2, direction):
    other = copy_of(tiny_llama)
    other.model.get_input_embeddings().weight.data.mul_(2)
    for chat in (other, tiny_qwen2):
        with pytest.raises(SafeSteerError, match="does not fit"):
            direction.check(chat)


def test_damaged_direction_files_are_refused(direction, tmp_path):
    path = tmp_path / "d.safetensors"
    direction.save(path)
    complete = path.read_bytes()
    for content in (b"", b"hello", complete[:100], complete[:-10]):
        path.write_bytes(content)
        with pytest.raises(SafeSteerError, match="not a safetensors file"):
            Direction.load(path)
    write_tensors(path, {"vector": torch.ones(32)}, {"layer": 1, "colour": "red"})
    with pytest.raises(SafeSteerError, match="not a direction file"):
        Direction.load(path)
    write_json(path, {"layer": 1})
    with pytest.raises(SafeSteerError, match="not a safetensors file"):
        Direction.load(path)
    with pytest.raises(SafeSteerError, match="Cannot read"):
        Direction.load(tmp_path / "absent.safetensors")


def test_steer_applies_the_operation_of_the_direction(tiny_llama, direction):
    batch = batch_of(tiny_llama, ["Hi"])
    base = naive_logits(tiny_llama, batch)
    interventions = {
        "ablate": ablate(tiny_llama.model, direction.vector),
        "clamp": clamp(tiny_llama.model, direction.vector, direction.layer, direction.coeff),
    }
    for operation, plainly in interventions.items():
        with plainly:
            want = naive_logits(tiny_llama, batch)
        with steer(tiny_llama, replace(direction, operation=operation)):
            assert torch.equal(naive_logits(tiny_llama, batch), want)
        assert (want - base).abs().max() > 1e-3
    with (
        pytest.raises(SafeSteerError, match="Unknown operation 'rotate'"),
        steer(tiny_llama, replace(direction, operation="rotate")),
    ):
        pass


def test_steer_passes_its_scope_on(tiny_llama, direction):
    texts = ["Explain how tides work.", "Hi"]
    with steer(tiny_llama, direction, 8.0, scope="answer"):
        answer = generate(tiny_llama, texts, max_new_tokens=6)
    with steer(tiny_llama, direction, 8.0):
        everywhere = generate(tiny_llama, texts, max_new_tokens=6)
    assert answer != generate(tiny_llama, texts, max_new_tokens=6)
    assert answer != everywhere
