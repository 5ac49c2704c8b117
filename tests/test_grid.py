"""The recorded grid of answers beside `ss.trace` and `ss.generate`, and as the page holds it."""

import json
from dataclasses import replace

import pytest
from test_attribution import CONFIG, HOSTILE, answer_rows, fill_run

import safesteer as ss
from conftest import PROMPTS, copy_of
from safesteer._errors import SafeSteerError
from safesteer.attribution.grid import GRID_FILE, AnswerGrid, answer_grid, layers_around
from safesteer.report.lens_data import MODELS, pack_grid
from safesteer.report.page import build_page
from safesteer.report.page_data import load_page_data

N_TOKENS = 6


@pytest.fixture(scope="module")
def chosen(tiny_llama, direction):
    return ss.select_tokens(tiny_llama, direction, PROMPTS, CONFIG)


@pytest.fixture(scope="module")
def student(tiny_llama):
    changed = copy_of(tiny_llama)
    for p in changed.model.parameters():
        p.data *= 1.05
    return changed


@pytest.fixture(scope="module")
def grid(tiny_llama, direction, chosen, student) -> AnswerGrid:
    shares = []
    made = answer_grid(
        tiny_llama,
        direction,
        chosen,
        student,
        prompts=PROMPTS[:2],
        max_new_tokens=N_TOKENS,
        progress=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    return made


def test_the_grid_lies_around_the_direction(grid, direction):
    assert grid.layers == (0, 1, 2)
    assert grid.coeffs == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert (grid.layer, grid.coeff) == (direction.layer, direction.coeff)
    assert len(grid.cells) == 2 * 3 * 5
    assert layers_around(0, 30) == (0, 5)
    assert layers_around(29, 30) == (24, 29)


def test_a_cell_holds_what_each_model_answers(grid, tiny_llama, direction, student):
    for cell in grid.cells:
        prompt = grid.prompts[cell.prompt]
        with ss.steer(tiny_llama, replace(direction, layer=cell.layer, coeff=cell.coeff)):
            (steered,) = ss.generate(tiny_llama, [prompt], max_new_tokens=N_TOKENS)
        (base,), (taught,) = (
            ss.generate(model, [prompt], max_new_tokens=N_TOKENS) for model in (tiny_llama, student)
        )
        shown = [tiny_llama.decode_answer([t.id for t in trace.tokens]) for trace in cell.traces]
        assert shown == [base, steered, taught]
        assert [trace.author for trace in cell.traces] == ["base", "teacher", "student"]


def test_numbers_are_those_of_trace(grid, tiny_llama, direction, chosen, student):
    for cell in grid.cells[::4]:
        moved = replace(direction, layer=cell.layer, coeff=cell.coeff)
        for got in cell.traces:
            ids = [t.id for t in got.tokens]
            (want,) = ss.trace(tiny_llama, moved, chosen, [grid.prompts[cell.prompt]], [ids], student)
            for a, b in zip(got.tokens, want.tokens, strict=True):
                assert (a.id, a.text, a.in_s, a.rank_base) == (b.id, b.text, b.in_s, b.rank_base)
                for name in ("p_base", "p_steered", "p_student", "kl_share"):
                    assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-5)
                assert (a.lift, a.kl) == pytest.approx((b.lift, b.kl), abs=1e-5)
                assert [t.id for t in a.top_steered] == [t.id for t in b.top_steered[:3]]


def test_a_strength_of_zero_is_the_base(grid):
    for cell in grid.cells:
        if cell.coeff == 0:
            base, steered, _ = cell.traces
            assert [t.id for t in steered.tokens] == [t.id for t in base.tokens]
            assert max(abs(t.lift) for t in base.tokens) < 1e-5


def test_it_survives_its_file_and_a_torn_one_is_one_sentence(grid, tmp_path):
    path = tmp_path / GRID_FILE
    grid.save(path)
    assert AnswerGrid.load(path) == grid
    whole = json.loads(path.read_text(encoding="utf-8"))
    for broken in ({}, [], whole | {"cells": whole["cells"][1:]}, whole | {"prompts": [], "cells": []}):
        path.write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(SafeSteerError, match="not a grid of answers of this version"):
            AnswerGrid.load(path)


def test_what_is_equal_is_written_once(grid):
    data = pack_grid(grid)
    at = iter(data["cells"])
    own = {p: set() for p in range(2)}
    for cell in grid.cells:
        for packed, trace in zip(next(at), cell.traces, strict=True):
            for model, number in zip(MODELS, packed["read"], strict=True):
                for row, token in zip(data["readings"][number], trace.tokens, strict=True):
                    assert row[0] == pytest.approx(getattr(token, f"p_{model}"), rel=6e-3)
                    assert row[1] == getattr(token, f"rank_{model}")
                    assert row[2::2] == [t.id for t in getattr(token, f"top_{model}")]
            assert [t[0] for t in packed["tokens"]] == [t.id for t in trace.tokens]
            assert [data["vocabulary"][str(t.id)] for t in trace.tokens] == [t.text for t in trace.tokens]
            if trace.author == "base":
                own[cell.prompt].add(packed["read"][0])
    assert all(len(numbers) == 1 for numbers in own.values())


def test_a_report_shows_it_or_says_what_is_missing(grid, chosen, tmp_path):
    run = fill_run(tmp_path / "run", chosen, None, answer_rows(2))
    without = load_page_data(run)
    assert without["lens"] is None
    assert "lens.json is missing" in without["missing"]["lens"]
    hostile = replace(grid, prompts=(HOSTILE[0], HOSTILE[2]))
    hostile.save(run / GRID_FILE)
    data = load_page_data(run)
    assert len(data["lens"]["cells"]) == len(grid.cells)
    page, plain = build_page(data), build_page(without)
    for tag in ("<script", "</script", "<img", "<!--", "onerror=alert(1)>"):
        assert page.count(tag) == plain.count(tag)
    assert "\u202e" not in page
    (run / GRID_FILE).write_text("broken\x00{")
    assert "could not be read" in load_page_data(run)["missing"]["lens"]


def test_a_model_without_a_student_has_two_answers(tiny_llama, direction, chosen):
    made = answer_grid(tiny_llama, direction, chosen, prompts=PROMPTS[:1], max_new_tokens=2)
    assert pack_grid(made)["models"] == ["base", "steered"]


def test_the_grid_needs_a_prompt_and_a_direction_that_is_added(tiny_llama, direction, chosen):
    with pytest.raises(SafeSteerError, match="needs a prompt"):
        answer_grid(tiny_llama, direction, chosen, prompts=[])
    with pytest.raises(SafeSteerError, match="operation 'ablate'"):
        answer_grid(tiny_llama, replace(direction, operation="ablate"), chosen, prompts=["Hello"])
