"""Pictures of directions hold the numbers of their tables, escaped, in both looks."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from conftest import random_vector
from safesteer.directions.calibration import strength_table
from safesteer.directions.candidates import Candidates
from safesteer.directions.inspection import component_contributions, cosines, residual_pca
from safesteer.directions.sweeping import RANKED_BY_ABLATION, sweep
from safesteer.report.direction_figures import (
    contributions_figure,
    cosine_figure,
    plane_figure,
    strength_figure,
    sweep_figure,
)
from safesteer.report.reader_figures import reader_figure
from safesteer.settings import DirectionConfig
from safesteer.steering.direction import Direction
from safesteer.steering.reader import HarmfulnessReader

REFUSAL_IDS = torch.tensor([7, 40, 90])


@pytest.fixture(params=["light", "dark"])
def theme(request):
    return request.param


@pytest.fixture(scope="module")
def scored(tiny_llama, candidates, few):
    cut = Candidates(
        candidates.vectors[-2:], candidates.positions[-2:], "instruction", candidates.shuffled[-2:]
    )
    config = DirectionConfig(n_val=2, rank_by="steering", n_held_out=1)
    return sweep(tiny_llama, cut, few, REFUSAL_IDS, config, held_out=few.after(2))


def test_sweep_hover_tells_scores_controls_and_reason(scored, theme):
    figure = sweep_figure(scored.table, theme, score="steering_refusal")
    heat = figure.data[0]
    at = heat.y.index(str(scored.best.position)), heat.x.index(int(scored.best.layer))
    assert heat.z[at[0]][at[1]] == pytest.approx(scored.best.steering_refusal)
    text = heat.text[at[0]][at[1]]
    for part in ("random", "shuffled", "held out", "passes every threshold", "KL on harmless"):
        assert part in text
    assert f"{scored.best.steering_refusal:.3f} ({scored.best.steering_refusal_low:.2f}" in text
    json.loads(figure.to_json())


@pytest.mark.parametrize(
    ("extraction", "shown"), [("prefill", "steering"), *((name, "ablation") for name in RANKED_BY_ABLATION)]
)
def test_a_sweep_shows_the_score_that_selection_ranks_by(scored, extraction, shown):
    heat = sweep_figure(scored.table.assign(extraction=extraction)).data[0]
    assert heat.colorbar.title.text == f"refusal score, {shown} (nats)"


def test_strength_curves_have_one_line_per_layer(tiny_llama, direction, few, theme):
    table = strength_table(
        tiny_llama,
        [direction],
        few.first(2),
        REFUSAL_IDS,
        coeffs=(0.0, 1.0),
        text="So it is.",
    )
    figure = strength_figure(table, theme)
    (line,) = figure.data
    assert list(line.y) == pytest.approx(table.kl_harmless.tolist())
    assert "perplexity" in line.text[0]
    assert "refused" not in line.text[0]  # no judge, no rate


def test_contributions_are_sorted_by_their_size(tiny_llama, few, theme):
    table = component_contributions(tiny_llama, Direction(random_vector(32), 1, "-1", "given"), few)
    figure = contributions_figure(table, theme, n=6)
    shown = [name for bar in figure.data for name in bar.y]
    assert len(shown) == 6
    biggest = table.loc[table.difference.abs().idxmax()].component
    assert figure.layout.yaxis.categoryarray[0] == biggest


def test_the_plane_has_a_slider_over_layers(tiny_llama, few, theme):
    table = residual_pca(tiny_llama, few, Direction(random_vector(32), 1, "-1", "given"))
    table["text"] = "<b>bold</b>"
    figure = plane_figure(table, theme, layer=1)
    steps = figure.layout.sliders[0].steps
    assert [s.label for s in steps] == ["0", "1", "2"]
    assert sum(bool(t.visible) for t in figure.data) == 3  # harmful, harmless, direction of one layer
    assert [bool(t.visible) for t in figure.data] == list(steps[1].args[0]["visible"])
    assert "<b>" not in figure.data[0].text[0]
    assert "&lt;b&gt;" in figure.data[0].text[0]


def test_cosines_are_drawn_as_they_are(candidates, theme):
    table = cosines(candidates)
    figure = cosine_figure(table, theme)
    assert pd.DataFrame(figure.data[0].z).to_numpy() == pytest.approx(table.to_numpy())


def test_a_reader_is_drawn_with_its_threshold_and_its_layers(theme):
    curve = ((0, 0.7), (1, 0.9), (2, 0.8))
    reader = HarmfulnessReader(random_vector(4), 0.0, 1, "prompt", threshold=0.5, layer_aucs=curve)
    scores = {"harmful": [2.0, 0.4], "harmless": [-1.0, 0.6, 0.1, 0.5], "<b>": [9.0]}
    figure = reader_figure(reader, scores, theme)
    harmful, harmless, other, line, ring = figure.data
    assert [list(v.x) for v in (harmful, harmless, other)] == list(scores.values())
    assert [v.name for v in (harmful, harmless)] == ["harmful, 50% above", "harmless, 25% above"]
    assert other.name == "&lt;b&gt;, 100% above"
    assert (list(line.x), list(line.y)) == ([0, 1, 2], [0.7, 0.9, 0.8])
    assert (list(ring.x), list(ring.y)) == ([1], [0.9])
    (threshold,) = figure.layout.shapes
    assert (threshold.x0, threshold.x1, threshold.xref) == (0.5, 0.5, "x")
    json.loads(figure.to_json())
    given = replace(reader, layer_aucs=())
    assert len(reader_figure(given, scores, theme).data) == 3
