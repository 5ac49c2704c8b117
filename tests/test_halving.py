"""Successive halving against the whole sweep: the same numbers on the prompts that a candidate saw."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from safesteer.directions import halving
from safesteer.directions.halving import rounds
from safesteer.directions.sweeping import PASSES, sweep
from safesteer.prompts.prompt_set import PromptSet
from safesteer.report.direction_figures import sweep_figure
from safesteer.settings import DirectionConfig

REFUSAL_IDS = torch.tensor([7, 40, 90])
SCORES = ["ablation_refusal", "steering_refusal", "kl_harmless"]
LATE, NOTHING = "others rank before it", "no direction here: the two means agree"
WHOLE = DirectionConfig(n_val=6, n_val_first=None, controls=(), max_kl=1e9, min_steering=-1e9)
HALVED = replace(WHOLE, n_val_first=2)


@pytest.fixture
def one_of_four(monkeypatch):
    monkeypatch.setattr(halving, "AT_LEAST", 1)


@pytest.mark.parametrize("rank_by", ["ablation", "steering"])
def test_each_candidate_has_the_scores_of_the_prompts_it_saw(
    tiny_llama, candidates, few, one_of_four, rank_by
):
    config = replace(HALVED, rank_by=rank_by)
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, config).table
    n_pairs = table.n_pairs[table.n_pairs > 0]
    assert n_pairs.value_counts().is_monotonic_decreasing
    assert set(n_pairs) == {2, 4, 6}
    for count in (2, 4, 6):
        seen = few.first(count)
        whole = sweep(tiny_llama, candidates, seen, REFUSAL_IDS, replace(config, n_val_first=None)).table
        at = table.n_pairs == count
        columns = [c for name in SCORES for c in (name, f"{name}_low", f"{name}_high")]
        pd.testing.assert_frame_equal(table.loc[at, columns], whole.loc[at, columns], atol=1e-4)
    left_early = table[(table.n_pairs > 0) & (table.n_pairs < 6)]
    assert not left_early.kept.any()
    assert set(left_early.reason) <= {NOTHING, *(f"{LATE} (on the first {n} of 6 pairs)" for n in (2, 4))}
    assert set(table[table.n_pairs == 6].reason) <= {NOTHING, PASSES}


def test_those_that_go_on_are_the_best_so_far(tiny_llama, candidates, few, one_of_four):
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, HALVED).table
    first = sweep(tiny_llama, candidates, few.first(2), REFUSAL_IDS, replace(WHOLE, n_val=2)).table
    run = first[first.n_pairs > 0]
    went_on = set(table.index[table.n_pairs > 2])
    assert went_on == set(run.ablation_refusal.nsmallest(len(went_on)).index)


def test_candidates_within_the_thresholds_go_first(tiny_llama, candidates, few, one_of_four):
    first = sweep(tiny_llama, candidates, few.first(2), REFUSAL_IDS, replace(WHOLE, n_val=2)).table
    limit = float(first.kl_harmless.median())
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, replace(HALVED, max_kl=limit)).table
    assert (first.kl_harmless[table.n_pairs > 2] <= limit).all()
    assert (table.n_pairs > 2).any()


def test_no_setting_scores_all_on_all(tiny_llama, candidates, few):
    tables = [
        sweep(tiny_llama, candidates, few, REFUSAL_IDS, replace(HALVED, n_val_first=first)).table
        for first in (None, 6, 99)
    ]
    for table in tables:
        assert set(table.n_pairs[table.n_pairs > 0]) == {6}
        pd.testing.assert_frame_equal(table, tables[0])


def test_kinds_of_unequal_number_are_used_up(tiny_llama, candidates, few, one_of_four):
    fewer = few.first(3).harmful
    uneven = PromptSet(tuple(p for p in few.prompts if p.label == "harmless" or p.text in fewer), "uneven")
    table = sweep(tiny_llama, candidates, uneven, REFUSAL_IDS, HALVED).table
    whole = sweep(tiny_llama, candidates, uneven, REFUSAL_IDS, WHOLE).table
    at = table.n_pairs == 6
    assert at.any()
    pd.testing.assert_frame_equal(table.loc[at, SCORES], whole.loc[at, SCORES], atol=1e-4)


def test_progress_rises_to_one(tiny_llama, candidates, few):
    shares = []
    sweep(tiny_llama, candidates, few, REFUSAL_IDS, HALVED, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_few_candidates_are_not_halved_further():
    assert rounds(5, 8, 2) == [(5, 0, 2), (5, 2, 4), (5, 4, 8)]
    assert rounds(100, 20, 8) == [(100, 0, 8), (25, 8, 16), (8, 16, 20)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_figure_marks_what_was_estimated_on_fewer_prompts(
    tiny_llama, candidates, few, one_of_four, theme
):
    table = sweep(tiny_llama, candidates, few, REFUSAL_IDS, HALVED).table
    marks = next(t for t in sweep_figure(table, theme).data if t.name == "estimated on fewer prompts")
    assert len(marks.x) == int(((table.n_pairs > 0) & (table.n_pairs < 6)).sum())
    whole = sweep(tiny_llama, candidates, few, REFUSAL_IDS, WHOLE).table
    names = [t.name for t in sweep_figure(whole, theme).data]
    assert "estimated on fewer prompts" not in names
    assert sweep_figure(table.drop(columns="n_pairs"), theme).data  # a table of before
