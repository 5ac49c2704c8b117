"""The sweep against one candidate and one prompt at a time, and its selection rules."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from conftest import batch_of, n_hooks, naive_logits, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions import scoring
from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import mean_difference, prefill_contrast
from safesteer.directions.refusal_tokens import refusal_token_ids
from safesteer.directions.sweeping import COLUMNS, Sweep, sweep
from safesteer.models.generation import generate_ids
from safesteer.models.head import output_head
from safesteer.models.logits import kl_divergence, refusal_score
from safesteer.models.parts import blocks
from safesteer.settings import DirectionConfig
from safesteer.steering import interventions

REFUSAL_IDS = torch.tensor([7, 40, 90])
ALL_CONTROLS = DirectionConfig(n_controls=None)  # for every candidate, not for the best few alone
SCORES = ["ablation_refusal", "steering_refusal", "kl_harmless"]


@pytest.fixture(scope="session")
def candidates(candidates) -> Candidates:
    """The last two positions are enough here."""
    cut = candidates.vectors[-2:], candidates.positions[-2:], "instruction", candidates.shuffled[-2:]
    return Candidates(*cut)


@pytest.fixture(scope="module")
def scored(tiny_llama, candidates, few) -> Sweep:
    return sweep(tiny_llama, candidates, few, REFUSAL_IDS, ALL_CONTROLS)


def naive_scores(chat, vector, layer, prompts, n_kl_tokens, refusal_ids=REFUSAL_IDS) -> list[float]:
    def mean(values):
        return float(sum(values)) / len(values)

    def score(text):
        return refusal_score(naive_logits(chat, batch_of(chat, [text]))[0, -1], refusal_ids)

    def kl(text):
        batch = batch_of(chat, [text])
        if n_kl_tokens > 1:
            batch = batch.extended(generate_ids(chat, batch, max_new_tokens=n_kl_tokens - 1))
        base = naive_logits(chat, batch)[0, -n_kl_tokens:]
        with interventions.ablate(chat.model, vector):
            return kl_divergence(base, naive_logits(chat, batch)[0, -n_kl_tokens:]).mean()

    with interventions.ablate(chat.model, vector):
        ablated = mean([score(t) for t in prompts.harmful])
    with interventions.add(chat.model, vector, layer):
        steered = mean([score(t) for t in prompts.harmless])
    return [ablated, steered, mean([kl(t) for t in prompts.harmless])]


@pytest.mark.parametrize(
    ("n_kl_tokens", "batch_size", "tokens_per_pass"), [(1, 2, 2048), (3, 8, 64), (3, 1, 2048), (3, 2, 1)]
)
def test_scores_equal_one_candidate_at_a_time(chat, few, n_kl_tokens, batch_size, tokens_per_pass):
    """Packed, shared and started half-way, on every architecture (sliding windows included)."""
    few, read = few.first(3), mean_difference(chat, few)
    read = Candidates(read.vectors[-2:] + 0.1, read.positions[-2:], "instruction", read.shuffled[-2:])
    sizes = {"n_kl_tokens": n_kl_tokens, "batch_size": batch_size, "tokens_per_pass": tokens_per_pass}
    table = sweep(chat, read, few, REFUSAL_IDS, replace(ALL_CONTROLS, **sizes)).table
    assert len(table) == 2 * chat.n_layers
    for row in table[table.layer < 0.8 * chat.n_layers].itertuples():
        at = read.index(row.position, row.layer)
        want = naive_scores(chat, read.vectors[at], row.layer, few, n_kl_tokens)
        assert [getattr(row, name) for name in SCORES] == pytest.approx(want, abs=1e-4)
        want = naive_scores(chat, read.shuffled[at], row.layer, few, n_kl_tokens)
        assert [getattr(row, f"{name}_shuffled") for name in SCORES] == pytest.approx(want, abs=1e-4)


def test_a_bridge_scores_as_the_plain_model(chat_and_bridge, few):
    tables = []
    for chat in chat_and_bridge:
        read = mean_difference(chat, few.first(2))
        tables.append(sweep(chat, read, few.first(2), REFUSAL_IDS, DirectionConfig(controls=())).table)
    left, right = (t[t.layer.between(1, 2)][SCORES].to_numpy() for t in tables)
    assert left == pytest.approx(right, abs=1e-3, nan_ok=True)


def test_candidates_are_scored_at_the_coefficient_that_is_given(tiny_llama, candidates, few):
    """Adding sees it, with its controls and held-out scores; ablation does not."""
    config = DirectionConfig(n_val=3, n_controls=2, n_held_out=2, rank_by="steering")
    twice = replace(candidates, vectors=2 * candidates.vectors, shuffled=2 * candidates.shuffled)
    options = {"held_out": few.after(3)}
    want = sweep(tiny_llama, twice, few, REFUSAL_IDS, config, **options).table
    got = sweep(tiny_llama, candidates, few, REFUSAL_IDS, replace(config, coeff=2.0), **options).table
    pd.testing.assert_frame_equal(got, want, rtol=1e-4, atol=1e-4)
    plain = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config, **options).table
    assert (plain.steering_refusal - got.steering_refusal).abs().max() > 1e-3
    assert got.ablation_refusal.to_numpy() == pytest.approx(
        plain.ablation_refusal.to_numpy(), abs=1e-5, nan_ok=True
    )


def test_scoring_leaves_the_model_as_it_was(tiny_llama, candidates, few):
    before, base = n_hooks(tiny_llama.model), naive_logits(tiny_llama, batch_of(tiny_llama))
    blocks_before = list(blocks(tiny_llama.model))
    sweep(tiny_llama, candidates, few.first(2), REFUSAL_IDS)
    assert n_hooks(tiny_llama.model) == before
    assert all(a is b for a, b in zip(blocks(tiny_llama.model), blocks_before, strict=True))
    assert torch.equal(naive_logits(tiny_llama, batch_of(tiny_llama)), base)


def test_intervals_hold_the_score_and_controls_are_seeded(scored, tiny_llama, candidates, few):
    run = scored.table.dropna(subset=SCORES)
    for name in SCORES:
        assert (run[f"{name}_low"] <= run[name] + 1e-9).all()
        assert (run[f"{name}_high"] >= run[name] - 1e-9).all()
        assert (run[f"{name}_high"] > run[f"{name}_low"]).any()
        assert (run[f"{name}_random"] != run[name]).any()
    again = sweep(tiny_llama, candidates, few, REFUSAL_IDS, ALL_CONTROLS).table
    pd.testing.assert_frame_equal(again, scored.table)
    other = sweep(tiny_llama, candidates, few, REFUSAL_IDS, replace(ALL_CONTROLS, seed=1)).table
    assert (other.steering_refusal_random != scored.table.steering_refusal_random).any()


def test_controls_can_be_kept_to_the_best_few(tiny_llama, candidates, few, scored):
    """The same numbers as with controls for all, for the first of the ranking alone."""
    config = DirectionConfig(rank_by="steering", n_controls=1)
    result = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config)
    controlled = result.table.dropna(subset=["steering_refusal_random", "steering_refusal_shuffled"])
    assert controlled.index.tolist() == [result.best.name]
    for name in SCORES:
        assert controlled.iloc[0][f"{name}_shuffled"] == pytest.approx(
            scored.table.loc[controlled.index[0], f"{name}_shuffled"], abs=1e-4
        )
    nothing = DirectionConfig(max_kl=0.0, n_controls=1)
    missed = sweep(tiny_llama, candidates, few, REFUSAL_IDS, nothing)
    assert missed.table.steering_refusal_random.notna().sum() == 1
    assert pd.notna(missed.nearest_miss.steering_refusal_random)


def test_held_out_scores_are_those_of_other_prompts(tiny_llama, candidates, few):
    config = DirectionConfig(n_val=2, n_held_out=1, rank_by="steering", controls=())
    result = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config, held_out=few.after(2))
    scored = result.table.dropna(subset=["steering_refusal_held_out"])
    assert scored.index.tolist() == [result.best.name]
    want = naive_scores(tiny_llama, result.vector(result.best), int(result.best.layer), few.after(2), 3)
    got = [scored.iloc[0][f"{name}_held_out"] for name in SCORES]
    assert got == pytest.approx(want, abs=1e-4)


def planted(chat, few, strength: float) -> Candidates:
    """At layer 1 the direction that writes the refusal tokens, and noise of its length elsewhere."""
    towards = output_head(chat.model)[0][REFUSAL_IDS].mean(0)
    vectors = torch.stack([random_vector(chat.d_model, seed=i) for i in range(chat.n_layers)])
    vectors[1] = towards / towards.norm() * vectors[1].norm()
    shuffled = torch.stack([random_vector(chat.d_model, seed=50 + i) for i in range(chat.n_layers)])
    return Candidates(strength * vectors[None], ("-1",), "instruction", strength * shuffled[None])


def test_a_planted_direction_passes_and_its_controls_do_not(tiny_llama, few):
    """Nothing else reaches the bar: not its random or shuffled control, not other layers."""
    config = replace(ALL_CONTROLS, max_kl=100.0, min_steering=-3.5)
    read = planted(tiny_llama, few, 3.0)
    result = sweep(tiny_llama, read, few, REFUSAL_IDS, config)
    assert result.table.layer[result.table.kept].tolist() == [1]
    best = result.best
    assert best.steering_refusal_low > max(best.steering_refusal_random, best.steering_refusal_shuffled)
    run = result.table.dropna(subset=["steering_refusal"])
    for control in ("random", "shuffled"):
        assert (run[f"steering_refusal_{control}"] < config.min_steering).all()
    shuffled = Candidates(read.shuffled, ("-1",), "instruction")
    assert not sweep(tiny_llama, shuffled, few, REFUSAL_IDS, config).table.kept.any()


def test_scores_tell_candidates_apart(scored):
    run = scored.table.dropna()
    assert run.steering_refusal.nunique() > 1
    # The template's last tokens embed alike, so layer 0 has the zero direction: nothing to compare.
    assert run[run.layer > 0].ablation_refusal.nunique() > 1


def test_pruned_layers_are_not_run(tiny_llama, candidates, few, monkeypatch):
    layers = set()
    start = scoring.run_from_layer
    monkeypatch.setattr(
        scoring, "run_from_layer", lambda m, layer, h: layers.add(layer) or start(m, layer, h)
    )
    config = DirectionConfig(max_layer_share=0.5, n_val=2)
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config).table
    assert layers == {0, 1}  # of 3 layers: those with l < 1.5
    pruned = table[table.layer >= 2]
    assert len(pruned) == len(candidates.positions)
    assert pruned[SCORES].isna().all().all()
    assert not pruned.kept.any()
    assert pruned.reason.str.contains("not run").all()


def test_nothing_below_the_last_layer_allowed_is_a_sentence(tiny_llama, candidates, few):
    with pytest.raises(SafeSteerError, match=r"below 0 of the depth: raise direction\.max_layer_share"):
        sweep(tiny_llama, candidates, few, REFUSAL_IDS, DirectionConfig(max_layer_share=0.0))


def test_progress_rises_to_one(tiny_llama, candidates, few):
    seen, config = [], DirectionConfig(batch_size=1, n_val=2)
    sweep(tiny_llama, candidates, few, REFUSAL_IDS, config, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


def test_table_has_a_row_for_each_candidate(scored, candidates, tmp_path):
    assert list(scored.table.columns)[: len(COLUMNS)] == COLUMNS
    assert len(scored.to_frame()) == candidates.vectors.shape[0] * candidates.vectors.shape[1]
    scored.save(tmp_path / "sweep.csv")
    again = pd.read_csv(tmp_path / "sweep.csv", dtype={"position": str})
    pd.testing.assert_frame_equal(again, scored.table)
    assert "<table" in scored._repr_html_()


def table_of(rows: list[tuple], extraction: str = "instruction") -> Sweep:
    """A sweep of rows (layer, ablation, steering, kept)."""
    frame = pd.DataFrame(
        [
            (extraction, "-1", layer, ablation, steered, 0.0, kept, f"reason {layer}", 8)
            for layer, ablation, steered, kept in rows
        ],
        columns=COLUMNS,
    )
    rank_by = "ablation" if extraction == "instruction" else "steering"
    return Sweep(Candidates(torch.zeros(1, len(rows), 2), ("-1",), extraction), frame, rank_by)


@pytest.mark.parametrize(("extraction", "layer"), [("instruction", 1), ("prefill", 2)])
def test_best_by_extraction(extraction, layer):
    """The lowest ablation score as published; the highest steering score for prefill."""
    rows = [(0, -9.0, 9.0, False), (1, -5.0, 1.0, True), (2, -4.0, 2.0, True), (3, -4.0, 2.0, True)]
    assert table_of(rows, extraction).best.layer == layer


@pytest.mark.parametrize(("steered", "layer"), [([2.0, 3.0, math.nan], 1), ([math.nan] * 3, 0)])
def test_best_raises_with_the_nearest_miss(steered, layer):
    result = table_of([(i, -1.0, score, False) for i, score in enumerate(steered)])
    with pytest.raises(SafeSteerError, match=f"position -1, layer {layer}: reason {layer}"):
        _ = result.best


@pytest.mark.parametrize(
    ("config", "message"),
    [({"max_kl": 0.0}, "KL .* > 0"), ({"max_kl": 1e9, "min_steering": 1e9}, "steering score")],
)
def test_thresholds_drop_instruction_candidates(tiny_llama, candidates, few, config, message):
    result = sweep(tiny_llama, candidates, few, REFUSAL_IDS, DirectionConfig(n_val=2, **config))
    run = result.table.dropna(subset=["steering_refusal"])
    assert not result.table.kept.any()
    assert run[run.layer > 0].reason.str.contains(message).all()


def test_prefill_candidates_are_not_dropped_by_thresholds(tiny_llama, few):
    read = prefill_contrast(tiny_llama, few)
    config = DirectionConfig(max_kl=0.0, min_steering=1e9, n_val=2)
    table = sweep(tiny_llama, read, few, REFUSAL_IDS, config).table
    assert table[table.layer.isin([1, 2])].kept.tolist() == [True, True]


def test_a_zero_direction_is_dropped(tiny_llama, candidates, few):
    """The template's last tokens embed alike: layer 0 has nothing to steer with."""
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, DirectionConfig(n_val=2, controls=())).table
    first = table[(table.layer == 0) & (table.position == "-1")].iloc[0]
    assert (first.kept, first.reason) == (False, "no direction here: the two means agree")


def test_candidates_that_are_not_finite_are_dropped(tiny_llama, candidates, few):
    broken = candidates.vectors.clone()
    broken[-1, 1] = math.nan
    read = Candidates(broken, candidates.positions, "prefill")
    table = sweep(tiny_llama, read, few, REFUSAL_IDS, DirectionConfig(n_val=2)).table
    row = table[(table.position == "-1") & (table.layer == 1)].iloc[0]
    assert (row.kept, row.reason) == (False, "a score is not finite")


@pytest.mark.model
def test_smollm2_scores_equal_one_candidate_at_a_time(smollm2, pairs):
    few = pairs.split("val").first(3)
    read = mean_difference(smollm2, pairs.split("train").first(8))
    cut = Candidates(read.vectors[-1:], read.positions[-1:], "instruction")
    refusal_ids = refusal_token_ids(smollm2.tokenizer)
    table = sweep(smollm2, cut, few, refusal_ids, DirectionConfig(batch_size=2)).table
    for layer in (3, 11, 20):
        want = naive_scores(smollm2, cut.vectors[0, layer], layer, few, 3, refusal_ids)
        assert table.loc[layer, SCORES].tolist() == pytest.approx(want, abs=1e-3)
