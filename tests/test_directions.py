"""Directions: equal to naive means, recovered where planted, and refused where they do not belong."""

from dataclasses import replace

import pytest
import torch
from conftest import (
    PROMPTS,
    assert_near,
    batch_of,
    copy_of,
    naive_logits,
    plainly_padded,
    random_vector,
)

from safesteer.directions import (
    COMPLIANCES,
    REFUSALS,
    Direction,
    last_logits,
    mean_difference,
    prefill_contrast,
    refusal_scores,
    refusal_token_ids,
    steer,
)
from safesteer.divergence import refusal_score
from safesteer.errors import SafeSteerError
from safesteer.files import write_json, write_tensors
from safesteer.prompts import Prompt, PromptBatch, PromptSet, suffix_length
from safesteer.steering import hooked

LAYER, TRIGGER = 1, "@"


def resid_pre(chat, ids: list[int]) -> torch.Tensor:
    """[n_layers, pos, d_model] in float64, of one prompt, as the model itself reports it."""
    with torch.no_grad():
        out = chat.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return torch.stack(out.hidden_states[: chat.n_layers])[:, 0].double()


def ids_of(chat, prompt: str, continuation: str = "") -> list[int]:
    return PromptBatch.of(chat.tokenizer, [prompt], [continuation]).prompt_ids[0].tolist()


def test_mean_difference_equals_naive_means(chat, few):
    n_pos = suffix_length(chat.tokenizer)

    def mean(texts):
        found = [resid_pre(chat, ids_of(chat, t))[:, -n_pos:].transpose(0, 1) for t in texts]
        return torch.stack(found).mean(0)

    got = mean_difference(chat, few)
    assert_near(got.vectors, mean(few.harmful) - mean(few.harmless))
    assert got.positions == tuple(str(i) for i in range(-n_pos, 0))
    assert got.vectors[-1, LAYER].norm() > 0.01


def test_prefill_contrast_equals_naive_means(chat, few):
    """Each prompt gets the same number of the lists in turn; means are over its own tokens."""

    def mean(continuations):
        found = []
        for i, text in enumerate(few.harmful):
            head, full = ids_of(chat, text), ids_of(chat, text, continuations[i % 4])
            found.append(resid_pre(chat, full)[:, len(head) :].mean(1))
        return torch.stack(found).mean(0)

    got = prefill_contrast(chat, few)
    assert_near(got.vectors[0], mean(REFUSALS) - mean(COMPLIANCES))
    assert (got.positions, got.extraction) == (("mean",), "prefill")


@pytest.mark.parametrize("extract", [mean_difference, prefill_contrast])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_does_not_change_directions(chat, few, extract, batch_size):
    assert_near(extract(chat, few, batch_size=batch_size).vectors, extract(chat, few).vectors)


@pytest.mark.parametrize("batch_size", [5, 32])
def test_planted_direction_is_recovered(chat, pairs, batch_size):
    """A vector written at one layer wherever the prompt holds a trigger, and nowhere else."""
    texts = pairs.split("val").harmless
    prompts = PromptSet(
        tuple(Prompt(f"{t} {TRIGGER}", "harmful") for t in texts)
        + tuple(Prompt(t, "harmless") for t in texts)
    )
    trigger = chat.tokenizer.convert_tokens_to_ids(TRIGGER)
    vector, rows = 5 * random_vector(chat.d_model, seed=1), {}

    def look(module, args):
        rows["with trigger"] = (args[0] == trigger).any(1)

    def plant(h):
        return h + rows["with trigger"][:, None, None] * vector

    handle = chat.model.get_decoder().register_forward_pre_hook(look)
    with hooked(chat.model, {("resid_pre", LAYER): plant}):
        found = mean_difference(chat, prompts, batch_size=batch_size).vectors
    handle.remove()
    cosine = torch.cosine_similarity(found, vector, dim=-1)
    assert float(cosine[:, LAYER].min()) > 0.99
    assert float(cosine[:, 0].max()) < 0.5
    assert_near(found[-1, LAYER].norm() / vector.norm(), 1.0, 0.1)


def test_no_prompts_is_an_error(tiny_llama):
    with pytest.raises(SafeSteerError, match="no prompts"):
        mean_difference(tiny_llama, PromptSet(()))


# --- refusal tokens and scores ---


def test_refusal_tokens_are_first_tokens_of_refusals_only(tiny_llama):
    tokenizer = tiny_llama.tokenizer
    found = refusal_token_ids(tokenizer).tolist()
    starts = [tokenizer.decode([i]) for i in found]
    assert all(any(t.startswith(s) for t in REFUSALS) for s in starts)
    shared = refusal_token_ids(tokenizer, ("Sorry", "Xylophone"), ("Sorry", "Yes")).tolist()
    assert shared == [tokenizer("Xylophone", add_special_tokens=False).input_ids[0]]
    with pytest.raises(SafeSteerError, match="same tokens"):
        refusal_token_ids(tokenizer, ("Sorry",), ("Sorry",))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_refusal_scores_keep_the_order_of_prompts(chat, batch_size):
    ids = torch.tensor([7, 40, 90])
    want = [float(refusal_score(naive_logits(chat, batch_of(chat, [p]))[0, -1], ids)) for p in PROMPTS]
    assert_near(refusal_scores(chat, list(PROMPTS), ids, batch_size=batch_size), want)


def test_last_logits_equal_the_models_own(chat):
    want = naive_logits(chat, plainly_padded(chat))[:, -3:]
    assert_near(last_logits(chat, batch_of(chat), 3), want)


# --- the value and its file ---


def test_direction_is_the_chosen_candidate(tiny_llama, candidates, few):
    found = Direction.of(tiny_llama, candidates, "-2", 1, coeff=1.5, prompts=few)
    assert torch.equal(found.vector, candidates.vectors[-2, 1])
    assert (found.layer, found.position, found.coeff) == (1, "-2", 1.5)
    assert (found.model, found.prompts_hash) == ("tiny-llama", few.hash)
    assert float(found.unit.norm()) == pytest.approx(1)
    found.check(tiny_llama)


def test_steer_adds_coeff_times_vector(tiny_llama, direction):
    seen = {}

    def run(name):
        with hooked(tiny_llama.model, {("resid_pre", 1): lambda h: seen.update({name: h})}):
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
        ({"layer": 3}, "steers layer 3, but 'tiny-llama' has 3 layers"),
        ({"layer": -1}, "steers layer -1"),
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
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[:-10]):
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
