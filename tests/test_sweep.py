"""The sweep against one candidate and one prompt at a time, and its selection rules."""

import importlib
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import batch_of, naive_logits

from safesteer import steering
from safesteer.directions import Candidates, prefill_contrast, steer
from safesteer.divergence import kl_divergence, refusal_score
from safesteer.errors import SafeSteerError
from safesteer.models import generate_ids
from safesteer.sweep import COLUMNS, Sweep, SweepConfig, by_answers, calibrate, sweep

REFUSAL_IDS = torch.tensor([7, 40, 90])
SCORES = ["ablation_refusal", "steering_refusal", "kl_harmless"]


@pytest.fixture(scope="session")
def candidates(candidates) -> Candidates:
    """The last two positions are enough here."""
    return Candidates(candidates.vectors[-2:], candidates.positions[-2:], "instruction")


@pytest.fixture(scope="module")
def scored(tiny_llama, candidates, few) -> Sweep:
    return sweep(tiny_llama, candidates, few, REFUSAL_IDS)


def naive_scores(chat, vector, layer: int, prompts, n_kl_tokens: int) -> list[float]:
    def mean(values):
        return float(sum(values)) / len(values)

    def score(text):
        return refusal_score(naive_logits(chat, batch_of(chat, [text]))[0, -1], REFUSAL_IDS)

    def kl(text):
        batch = batch_of(chat, [text])
        if n_kl_tokens > 1:
            batch = batch.extended(generate_ids(chat, batch, max_new_tokens=n_kl_tokens - 1))
        base = naive_logits(chat, batch)[0, -n_kl_tokens:]
        with steering.ablate(chat.model, vector):
            return kl_divergence(base, naive_logits(chat, batch)[0, -n_kl_tokens:]).mean()

    with steering.ablate(chat.model, vector):
        ablated = mean([score(t) for t in prompts.harmful])
    with steering.add(chat.model, vector, layer):
        steered = mean([score(t) for t in prompts.harmless])
    return [ablated, steered, mean([kl(t) for t in prompts.harmless])]


@pytest.mark.parametrize("n_kl_tokens", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_scores_equal_one_candidate_at_a_time(tiny_llama, candidates, few, n_kl_tokens, batch_size):
    few = few.head(3)
    config = SweepConfig(n_kl_tokens=n_kl_tokens, batch_size=batch_size)
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config).table
    assert len(table) == 2 * 3
    for row in table.dropna().itertuples():
        vector = candidates.vectors[candidates.positions.index(row.position), row.layer]
        want = naive_scores(tiny_llama, vector, row.layer, few, n_kl_tokens)
        got = [getattr(row, name) for name in SCORES]
        assert got == pytest.approx(want, abs=1e-4)


def test_scores_tell_candidates_apart(scored):
    run = scored.table.dropna()
    assert run.steering_refusal.nunique() > 1
    # The template's last tokens embed alike, so layer 0 has the zero direction: nothing to compare.
    assert run[run.layer > 0].ablation_refusal.nunique() > 1


def test_pruned_layers_are_not_run(tiny_llama, candidates, few, monkeypatch):
    layers = set()
    add = steering.add
    monkeypatch.setattr(
        steering, "add", lambda model, v, layer, *c: layers.add(layer) or add(model, v, layer, *c)
    )
    config = SweepConfig(max_layer_share=0.5, n_prompts=2)
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config).table
    assert layers == {0, 1}  # of 3 layers: those with l < 1.5
    pruned = table[table.layer >= 2]
    assert len(pruned) == len(candidates.positions)
    assert pruned[SCORES].isna().all().all()
    assert not pruned.kept.any()
    assert pruned.reason.str.contains("not run").all()


def test_progress_rises_to_one(tiny_llama, candidates, few):
    seen, config = [], SweepConfig(batch_size=1, n_prompts=2)
    sweep(tiny_llama, candidates, few, REFUSAL_IDS, config, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


def test_table_has_a_row_for_each_candidate(scored, candidates, tmp_path):
    assert list(scored.table.columns) == COLUMNS
    assert len(scored.to_frame()) == candidates.vectors.shape[0] * candidates.vectors.shape[1]
    scored.save(tmp_path / "sweep.csv")
    again = pd.read_csv(tmp_path / "sweep.csv", dtype={"position": str})
    pd.testing.assert_frame_equal(again, scored.table)
    assert "<table" in scored._repr_html_()


def table_of(rows: list[tuple], extraction: str = "instruction") -> Sweep:
    """A sweep of rows (layer, ablation, steering, kept)."""
    frame = pd.DataFrame(
        [
            (extraction, "-1", layer, ablation, steered, 0.0, kept, f"reason {layer}")
            for layer, ablation, steered, kept in rows
        ],
        columns=COLUMNS,
    )
    return Sweep(Candidates(torch.zeros(1, len(rows), 2), ("-1",), extraction), frame)


@pytest.mark.parametrize(("extraction", "layer"), [("instruction", 1), ("prefill", 2)])
def test_best_by_extraction(extraction, layer):
    """The lowest ablation score as published; the highest steering score for prefill."""
    rows = [(0, -9.0, 9.0, False), (1, -5.0, 1.0, True), (2, -4.0, 2.0, True), (3, -4.0, 2.0, True)]
    assert table_of(rows, extraction).best.layer == layer


@pytest.mark.parametrize(("steered", "layer"), [([2.0, 3.0, math.nan], 1), ([math.nan] * 3, 0)])
def test_best_raises_with_the_nearest_miss(steered, layer):
    found = table_of([(i, -1.0, score, False) for i, score in enumerate(steered)])
    with pytest.raises(SafeSteerError, match=f"position -1, layer {layer}: reason {layer}"):
        _ = found.best


@pytest.mark.parametrize(
    ("config", "message"),
    [({"max_kl": -1.0}, "KL .* > -1"), ({"max_kl": 1e9, "min_steering": 1e9}, "steering score")],
)
def test_thresholds_drop_instruction_candidates(tiny_llama, candidates, few, config, message):
    found = sweep(tiny_llama, candidates, few, REFUSAL_IDS, SweepConfig(n_prompts=2, **config))
    run = found.table.dropna(subset=["steering_refusal"])
    finite = run[run[SCORES].map(math.isfinite).all(axis=1)]
    assert not found.table.kept.any()
    assert finite.reason.str.contains(message).all()


def test_prefill_candidates_are_not_dropped_by_thresholds(tiny_llama, few):
    found = prefill_contrast(tiny_llama, few)
    config = SweepConfig(max_kl=-1.0, min_steering=1e9, n_prompts=2)
    table = sweep(tiny_llama, found, few, REFUSAL_IDS, config).table
    assert table[table.layer.isin([1, 2])].kept.tolist() == [True, True]


def test_candidates_that_are_not_finite_are_dropped(tiny_llama, candidates, few):
    broken = candidates.vectors.clone()
    broken[-1, 1] = math.nan
    found = Candidates(broken, candidates.positions, "prefill")
    table = sweep(tiny_llama, found, few, REFUSAL_IDS, SweepConfig(n_prompts=2)).table
    row = table[(table.position == "-1") & (table.layer == 1)].iloc[0]
    assert (row.kept, row.reason) == (False, "a score is not finite")


def test_calibration_compares_answers(tiny_llama, direction, monkeypatch):
    """The smallest sufficient coefficient; among directions the one whose answers refuse."""
    tried = []

    def fake(coeff_that_refuses):
        def answer(chat, prompts, max_new_tokens):
            layer, coeff = tried[-1]
            return ["no" if layer == 2 and coeff >= coeff_that_refuses else "yes"] * len(prompts)

        return answer

    module = importlib.import_module("safesteer.sweep")  # the package's name is the function
    monkeypatch.setattr(module, "steer", lambda c, d, k: tried.append((d.layer, k)) or steer(c, d, k))
    monkeypatch.setattr(module, "generate", fake(1.4))
    few = [replace(direction, layer=1), replace(direction, layer=2)]

    def run():
        return calibrate(tiny_llama, few, ["a", "b"], lambda prompt, answer: answer == "no")

    found, table = run()
    assert (found.layer, found.coeff) == (2, 1.4)
    assert table.refusal_rate.tolist() == [0, 0, 0, 1]
    assert table.coeff.tolist() == [1.2, 1.2, 1.4, 1.4]
    monkeypatch.setattr(module, "generate", fake(99))
    assert (run()[0].layer, run()[0].coeff) == (1, 1.2)  # nothing refuses: the first, the gentlest


def test_a_short_look_finds_the_layer_that_a_first_token_hides(tiny_llama, direction, monkeypatch):
    """Only layer 2 refuses, and it comes last: the look at every candidate must still find it."""
    tried = []
    module = importlib.import_module("safesteer.sweep")
    monkeypatch.setattr(module, "steer", lambda c, d, k: tried.append(d.layer) or steer(c, d, k))

    def answers(chat, prompts, max_new_tokens):
        return ["no" if tried[-1] == 2 else "yes"] * len(prompts)

    monkeypatch.setattr(module, "generate", answers)
    several = [replace(direction, layer=layer) for layer in (0, 1, 2)]
    shares = []
    found, table = by_answers(
        tiny_llama, several, ["a", "b"], lambda _, text: text == "no", n_best=2, progress=shares.append
    )
    assert (found.layer, found.coeff) == (2, 1.2)
    assert table.layer.tolist() == [2, 0]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
