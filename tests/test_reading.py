"""Inspection of a direction: against sums written out by hand."""

import numpy as np
import pytest
import torch

from conftest import assert_near, batch_of, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions import activations
from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import mean_difference
from safesteer.directions.inspection import (
    component_contributions,
    cosines,
    logit_lens,
    probe_accuracy,
    residual_pca,
)
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.parts import hf_model
from safesteer.steering.direction import Direction
from safesteer.steering.hooks import apply_hooks


def test_tokens_are_those_the_unembedding_raises(chat_and_bridge):
    plain, _ = chat_and_bridge
    weight = output_head(plain.model).weight
    norm = hf_model(plain.model).get_decoder().norm
    vectors = torch.stack([random_vector(32, seed=i) for i in range(2)])
    logits = norm(vectors) @ weight.T
    for chat in chat_and_bridge:
        table = logit_lens(chat, vectors, k=3)
        assert len(table) == 2 * 2 * 3
        for row in range(2):
            top = table[(table.row == row) & (table.end == "top")]
            assert top.token_id.tolist() == logits[row].topk(3).indices.tolist()
            assert top.logit.tolist() == pytest.approx(logits[row].topk(3).values.tolist(), abs=1e-4)
            assert top.text.tolist() == [chat.decode([i]) for i in top.token_id]
            bottom = table[(table.row == row) & (table.end == "bottom")]
            assert bottom.token_id.tolist() == (-logits[row]).topk(3).indices.tolist()


def test_cosines_name_what_they_compare():
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 3.0], [0.0, 0.0]]])
    table = cosines(Candidates(vectors, ("-2", "-1"), "instruction"))
    assert table.loc["-2 @ 0", "-2 @ 1"] == 0
    assert table.loc["-1 @ 0", "-2 @ 1"] == pytest.approx(0.5**0.5)
    assert table.loc["-1 @ 1"].abs().max() == 0  # a zero vector is like nothing
    assert list(table.index) == list(table.columns) == ["-2 @ 0", "-2 @ 1", "-1 @ 0", "-1 @ 1"]


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def summed(request):
    """Models whose sublayers write straight into the residual stream."""
    return request.getfixturevalue(request.param)


def test_contributions_add_up_to_the_residuals_projection(summed, few):
    """Embedding, heads and MLPs below block l sum to resid_pre[l] . d, for both kinds of prompts."""
    layer, vector = 2, random_vector(32)
    direction = Direction(vector, layer, "-1", "given")
    table = component_contributions(summed, direction, few, batch_size=4)
    below = table[(table.kind == "embed") | (table["layer"] < layer)]
    for label in ("harmful", "harmless"):
        values = []
        for text in few.texts(label):
            seen = {}
            with apply_hooks(summed.model, {("resid_pre", layer): lambda h, s=seen: s.update(h=h)}):
                final_hidden(summed.model, batch_of(summed, [text]))
            values.append(float(seen["h"][0, -1].detach() @ direction.unit))
        assert below[label].sum() == pytest.approx(np.mean(values), abs=1e-4)
    assert_near(
        torch.tensor(table.difference.to_numpy()), torch.tensor((table.harmful - table.harmless).to_numpy())
    )
    heads = table[table.kind == "head"]
    assert len(heads) == summed.n_layers * 4
    assert {"L1.H3", "L0.mlp", "embed"} <= set(table.component)


def test_contributions_of_a_bridge_and_of_sandwich_norms(bridges, tiny_llama, tiny_gemma2, few):
    direction = Direction(random_vector(32), 1, "-1", "given")
    plain, bridged = (component_contributions(c, direction, few) for c in (tiny_llama, bridges["tiny-llama"]))
    assert bridged.difference.tolist() == pytest.approx(plain.difference.tolist(), abs=1e-4)
    with pytest.raises(SafeSteerError, match="do not add up"):
        component_contributions(tiny_gemma2, direction, few)


def test_residual_pca_keeps_distances_of_the_plane(tiny_llama, few):
    direction = Direction(mean_difference(tiny_llama, few).vectors[-1, 1], 1, "-1", "instruction")
    table = residual_pca(tiny_llama, few, direction, layers=[1, 2])
    assert set(table.layer) == {1, 2}
    here = table[table.layer == 1]
    points = here[here.label != "direction"]
    assert len(points) == 12
    assert points[["pc1", "pc2"]].mean().abs().max() < 1e-6
    assert abs(np.corrcoef(points.pc1, points.pc2)[0, 1]) < 1e-6
    assert points.pc1.var() >= points.pc2.var()
    assert 0 < here.explained.iloc[0] <= 1
    # The direction is the difference of these means: so it is in the plane, too.
    means = points.groupby("label")[["pc1", "pc2"]].mean()
    gap = means.loc["harmful"] - means.loc["harmless"]
    drawn = here[here.label == "direction"].iloc[0]
    assert [drawn.pc1, drawn.pc2] == pytest.approx(gap.tolist(), abs=1e-5)


def test_probes_find_a_planted_difference_and_shuffles_do_not(tiny_llama, pairs):
    prompts = pairs.split("val")
    harmful = set(prompts.harmful)
    vector, real = 20 * random_vector(32), activations.read_activations

    def marked(chat, arm, batch_size=32):
        for rows, h in real(chat, arm, batch_size):
            flag = torch.tensor([float(arm.texts[i] in harmful) for i in rows])
            yield rows, h + flag[:, None, None, None] * vector

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "read_activations", marked)
        planted = probe_accuracy(tiny_llama, prompts, layers=[1], ks=(1, 8))
    assert planted.accuracy.min() == 1.0
    assert planted.shuffled.max() < 0.8
    assert planted.k.tolist() == [1, 8]
