"""Extractions: equal to naive means, recovered where planted, with their shuffled control."""

import pytest
import torch

from conftest import assert_near, copy_of, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions.activations import Arm
from safesteer.directions.extraction import (
    _random_signs,
    _stacked,
    from_vector,
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.directions.refusal_tokens import COMPLIANCES, REFUSALS
from safesteer.models.batch import PromptBatch
from safesteer.models.templates import suffix_length
from safesteer.prompts.prompt_set import Prompt, PromptSet
from safesteer.steering.hooks import apply_hooks

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
        residuals = [resid_pre(chat, ids_of(chat, t))[:, -n_pos:].transpose(0, 1) for t in texts]
        return torch.stack(residuals).mean(0)

    got = mean_difference(chat, few)
    assert_near(got.vectors, mean(few.harmful) - mean(few.harmless))
    assert got.positions == tuple(str(i) for i in range(-n_pos, 0))
    assert got.vectors[-1, LAYER].norm() > 0.01


def test_activations_that_are_not_finite_name_the_layer_and_a_prompt(tiny_llama, few):
    chat = copy_of(tiny_llama)
    chat.model.model.layers[0].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(SafeSteerError, match="resid_pre of layer 1") as caught:
        mean_difference(chat, few)
    assert any(text in str(caught.value) for text in few.harmful)


def test_prefill_contrast_equals_naive_means(chat, few):
    """Each prompt gets the same number of the lists in turn; means are over its own tokens."""

    def mean(continuations):
        residuals = []
        for i, text in enumerate(few.harmful):
            head, full = ids_of(chat, text), ids_of(chat, text, continuations[i % 4])
            residuals.append(resid_pre(chat, full)[:, len(head) :].mean(1))
        return torch.stack(residuals).mean(0)

    got = prefill_contrast(chat, few)
    assert_near(got.vectors[0], mean(REFUSALS) - mean(COMPLIANCES))
    assert (got.positions, got.extraction) == (("mean",), "prefill")


@pytest.mark.parametrize("extract", [mean_difference, prefill_contrast, system_contrast, pca_difference])
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
    with apply_hooks(chat.model, {("resid_pre", LAYER): plant}):
        vectors = mean_difference(chat, prompts, batch_size=batch_size).vectors
    handle.remove()
    cosine = torch.cosine_similarity(vectors, vector, dim=-1)
    assert float(cosine[:, LAYER].min()) > 0.99
    assert float(cosine[:, 0].max()) < 0.5
    assert_near(vectors[-1, LAYER].norm() / vector.norm(), 1.0, 0.1)


def test_system_contrast_equals_naive_means(chat, few):
    n_pos = suffix_length(chat.tokenizer)

    def mean(system):
        residuals = []
        for text in few.harmful:
            ids = PromptBatch.of(chat.tokenizer, [text], system=system).prompt_ids[0].tolist()
            residuals.append(resid_pre(chat, ids)[:, -n_pos:].transpose(0, 1))
        return torch.stack(residuals).mean(0)

    got = system_contrast(chat, few, refusing="Say no.", complying="Say yes.")
    assert_near(got.vectors, mean("Say no.") - mean("Say yes."))
    assert got.vectors[-1, LAYER].norm() > 0.01  # the system turn is there, and its words count
    assert got.extraction == "system"


def test_shuffled_labels_are_a_random_half_against_the_other(chat, few):
    """The same activations, each prompt's label dealt again: checked against stacked activations."""
    got = mean_difference(chat, few, seed=3)
    arms = [_stacked(chat, Arm(t), 32) for t in (few.harmful, few.harmless)]
    signs = [_random_signs(len(a), 3 + i) for i, a in enumerate(arms)]
    pooled, sign = torch.cat(arms), torch.cat(signs)
    want = pooled[sign > 0].mean(0) - pooled[sign < 0].mean(0)
    assert_near(got.shuffled, want.float())
    assert (got.shuffled - got.vectors).abs().max() > 0.01
    again = mean_difference(chat, few, seed=3).shuffled
    assert torch.equal(got.shuffled, again)
    assert not torch.equal(mean_difference(chat, few, seed=4).shuffled, again)


@pytest.mark.parametrize("extract", [pca_difference, logistic_probe])
def test_axes_are_as_long_as_the_means_are_apart(tiny_llama, few, extract):
    """vector = axis * (axis . (mean A - mean B)), so it never points from harmful to harmless."""
    got, difference = extract(tiny_llama, few), mean_difference(tiny_llama, few)
    assert got.positions == difference.positions
    v, d = got.vectors[-1, 1], difference.vectors[-1, 1]
    assert float(v @ d) > 0
    assert_near(v @ v, v @ d)  # the projection of d on v is v
    assert got.shuffled.shape == got.vectors.shape


def test_pca_is_the_first_component_of_the_pair_differences(tiny_llama, few):
    a, b = (_stacked(tiny_llama, Arm(t), 32)[:, -1, 1] for t in (few.harmful, few.harmless))
    moment = (a - b).T @ (a - b)
    _, vectors = torch.linalg.eigh(moment)
    v = pca_difference(tiny_llama, few).vectors[-1, 1]
    assert abs(float(torch.cosine_similarity(v.double(), vectors[:, -1], dim=0))) > 0.9999


def test_the_probe_separates_what_it_was_fitted_on(tiny_llama, few):
    a, b = (_stacked(tiny_llama, Arm(t), 32)[:, -1, 1] for t in (few.harmful, few.harmless))
    v = logistic_probe(tiny_llama, few, C=10.0).vectors[-1, 1].double()
    assert float((a @ v).min()) > float((b @ v).max())


def test_a_vector_of_ones_own(tiny_llama):
    one = from_vector(tiny_llama, torch.ones(32))
    assert one.vectors.shape == (1, 3, 32)
    each = from_vector(tiny_llama, torch.arange(3.0)[:, None].expand(3, 32))
    assert each.vectors[0, 2, 0] == 2.0
    assert (one.positions, one.extraction, one.shuffled) == (("given",), "given", None)
    for wrong in (torch.ones(31), torch.ones(2, 32)):
        with pytest.raises(SafeSteerError, match="does not fit 'tiny-llama'"):
            from_vector(tiny_llama, wrong)


def test_candidates_show_the_length_of_each_vector(tiny_llama, few):
    candidates = prefill_contrast(tiny_llama, few)
    table = candidates.to_frame()
    assert (table.index.tolist(), table.columns.tolist()) == (["mean"], [0, 1, 2])
    assert table.loc["mean", 2] == pytest.approx(float(candidates.vectors[0, 2].norm()))
    assert f"{table.loc['mean', 2]:.2f}" in candidates._repr_html_()
    assert repr(candidates) == "Candidates(prefill: 1 positions x 3 layers, d_model 32)"


@pytest.mark.parametrize("at", [("-1", 0), ("mean", 3), ("mean", -1)])
def test_a_candidate_that_was_not_read_is_named(tiny_llama, few, at):
    with pytest.raises(SafeSteerError, match=f"no candidate at position '{at[0]}' of layer {at[1]}"):
        prefill_contrast(tiny_llama, few).direction(tiny_llama, *at)


def test_no_prompts_is_an_error(tiny_llama):
    with pytest.raises(SafeSteerError, match="no prompts"):
        mean_difference(tiny_llama, PromptSet(()))


@pytest.mark.model
def test_smollm2_directions_equal_a_reference_with_plain_hooks(smollm2, pairs):
    """One prompt at a time, torch hooks, float64 means: every position and layer."""
    prompts, n_pos = pairs.split("train").first(8), suffix_length(smollm2.tokenizer)

    def mean(texts):
        total = 0
        for text in texts:
            rows = []
            handles = [
                layer.register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0][0, -n_pos:]))
                for layer in smollm2.model.model.layers
            ]
            with torch.no_grad():
                smollm2.model(torch.tensor([ids_of(smollm2, text)]), use_cache=False)
            for handle in handles:
                handle.remove()
            total = total + torch.stack(rows, 1).double()
        return total / len(texts)

    want = mean(prompts.harmful) - mean(prompts.harmless)
    got = mean_difference(smollm2, prompts, batch_size=5).vectors.double()
    assert got.shape == want.shape == (n_pos, 30, 576)
    here = want.norm(dim=-1) > 1e-2  # layer 0 embeds the template alike: there is no direction
    assert here.sum() >= n_pos * 29
    assert float(torch.cosine_similarity(got, want, dim=-1)[here].min()) > 0.9999
