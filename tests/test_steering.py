"""Interventions: the same on a plain model and on a bridge, exact at the hook, gone afterwards."""

import pytest
import torch
from conftest import assert_near, batch_of, copy_of, naive_logits, plainly_padded, random_vector
from torch import nn

from safesteer.divergence import logits_of
from safesteer.models import ChatModel, blocks, final_hidden, output_head
from safesteer.steering import ablate, add, hooked, record

LAYER, COEFF = 1, 3.0


@torch.no_grad()
def logits(chat: ChatModel) -> torch.Tensor:
    return logits_of(final_hidden(chat.model, batch_of(chat)), *output_head(chat.model))


def residuals(chat: ChatModel) -> torch.Tensor:
    """resid_pre of every layer at real columns, [n_layers, n, d_model]; batch without sharing."""
    batch = plainly_padded(chat)
    real = batch.attention_mask.bool()
    layers = list(range(chat.n_layers))
    with record(chat.model, layers, lambda h: h[real]) as seen:
        final_hidden(chat.model, batch)
    return torch.stack([seen[layer] for layer in layers])


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(params=["plain", "bridge"])
def either(request, chat_and_bridge) -> ChatModel:
    return chat_and_bridge[request.param == "bridge"]


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_plain_model_and_bridge_agree(chat_and_bridge, operation):
    results = []
    for chat in chat_and_bridge:
        vector = random_vector(chat.d_model)
        how = add(chat.model, vector, LAYER, COEFF) if operation == "add" else ablate(chat.model, vector)
        with how:
            results.append(logits(chat))
        assert (results[-1] - logits(chat)).abs().max() > 0.1
    assert_near(results[0], results[1])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_steered_minus_base_is_the_vector_at_the_hook(either, layer):
    """Once, at this layer, at every position; nothing moves before it, something does after it."""
    vector = random_vector(either.d_model)
    base = residuals(either)
    with add(either.model, vector, layer, COEFF):
        moved = residuals(either) - base
    assert_near(moved[layer], (COEFF * vector).expand_as(moved[layer]), 1e-5)
    assert float(moved[:layer].abs().sum()) == 0
    if layer + 1 < either.n_layers:
        later = moved[layer + 1] - COEFF * vector
        assert later.abs().max() > 1e-3


def test_zero_coefficient_is_the_base(chat):
    with add(chat.model, random_vector(chat.d_model), LAYER, 0.0):
        steered = logits(chat)
    assert torch.equal(steered, logits(chat))


def test_opposite_vectors_cancel(chat):
    vector = random_vector(chat.d_model)
    with add(chat.model, vector, LAYER, COEFF), add(chat.model, vector, LAYER, -COEFF):
        both = logits(chat)
    assert_near(both, logits(chat))


def test_ablated_projection_is_zero_everywhere(chat):
    vector = random_vector(chat.d_model)
    unit = vector / vector.norm()
    assert (residuals(chat) @ unit).abs().amax(1).min() > 0.01
    with ablate(chat.model, vector):
        ablated = residuals(chat)
    scale = ablated.norm(dim=-1).max()
    assert float((ablated @ unit).abs().max() / scale) < 1e-6


def test_ablated_projection_is_zero_on_the_bridge(bridges):
    for chat in bridges.values():
        vector = random_vector(chat.d_model)
        with ablate(chat.model, vector):
            assert float((residuals(chat) @ vector).abs().max()) < 1e-4


def test_ablation_equals_orthogonal_weights(tiny_qwen2):
    """Projecting activations is projecting every matrix that writes (Arditi et al., 2.4)."""
    other, vector = copy_of(tiny_qwen2), random_vector(32)
    u = vector / vector.norm()
    with torch.no_grad():
        embedding = other.model.get_input_embeddings().weight
        embedding -= (embedding @ u)[:, None] * u
        for block in blocks(other.model):
            for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
                weight -= u[:, None] * (u @ weight)
    with ablate(tiny_qwen2.model, vector):
        got = logits(tiny_qwen2)
    assert_near(got, logits(other))


def test_ablation_ignores_length_and_sign(tiny_llama):
    vector = random_vector(32)
    with ablate(tiny_llama.model, vector):
        want = logits(tiny_llama)
    with ablate(tiny_llama.model, -7 * vector):
        assert_near(logits(tiny_llama), want)


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_one_vector_a_row(either, operation):
    """Row r of the batch is as if its own vector were the only one."""
    batch = plainly_padded(either)
    vectors = torch.stack([random_vector(either.d_model, seed) for seed in range(4)])

    @torch.no_grad()
    def run(vector):
        model = either.model
        with add(model, vector, LAYER, COEFF) if operation == "add" else ablate(model, vector):
            return final_hidden(model, batch)[:, -1]

    together = run(vectors)
    for row, vector in enumerate(vectors):
        assert_near(together[row], run(vector)[row])
    assert (run(vectors[0])[1] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_hooks_are_gone_after_an_exception(either, operation):
    vector, before, base = random_vector(either.d_model), n_hooks(either.model), logits(either)
    how = add(either.model, vector, LAYER) if operation == "add" else ablate(either.model, vector)

    def stop_inside():
        with how:
            assert n_hooks(either.model) > before
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_inside()
    assert n_hooks(either.model) == before
    assert torch.equal(logits(either), base)


def test_hooks_are_gone_after_a_failing_edit(either):
    def broken(h):
        raise RuntimeError("inside")

    before = n_hooks(either.model)
    with pytest.raises(RuntimeError, match="inside"), hooked(either.model, {("resid_pre", 0): broken}):
        logits(either)
    assert n_hooks(either.model) == before


def test_hooks_are_gone_when_a_later_one_cannot_be_attached(tiny_llama):
    edits = {("resid_pre", 0): lambda h: h + 1, ("resid_pre", 99): lambda h: h}
    before = n_hooks(tiny_llama.model)  # transformers leaves hooks of its own on a model once used
    with pytest.raises(IndexError), hooked(tiny_llama.model, edits):
        pass
    assert n_hooks(tiny_llama.model) == before


@pytest.mark.parametrize("point", ["embed", "resid_pre", "attn_out", "mlp_out"])
def test_points_are_the_same_place_on_both(chat_and_bridge, point):
    results = []
    for chat in chat_and_bridge:
        seen = []
        with hooked(chat.model, {(point, LAYER): lambda h, seen=seen: seen.append(h.detach())}):
            naive = plainly_padded(chat)
            with torch.no_grad():
                final_hidden(chat.model, naive)
        assert len(seen) == 1
        results.append(seen[0][naive.attention_mask.bool()])
    assert_near(results[0], results[1])


def test_residual_is_the_sum_of_its_writes(tiny_gemma2):
    """resid_pre[1] = embedding + attn_out[0] + mlp_out[0], also with sandwich norms."""
    points = [("resid_pre", 0), ("attn_out", 0), ("mlp_out", 0), ("resid_pre", 1)]
    seen = {}
    edits = {at: (lambda h, at=at: seen.update({at: h.detach()})) for at in points}
    with hooked(tiny_gemma2.model, edits):
        naive_logits(tiny_gemma2, plainly_padded(tiny_gemma2))
    start, attention, mlp, end = (seen[at] for at in points)
    assert_near(start + attention + mlp, end, 1e-5)


def test_record_does_not_change_the_pass(chat):
    base = logits(chat)
    with record(chat.model, [0, 1], lambda h: h) as seen:
        recorded = logits(chat)
    assert torch.equal(recorded, base)
    assert sorted(seen) == [0, 1]
    assert not seen[0].requires_grad
