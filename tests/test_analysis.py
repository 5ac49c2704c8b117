"""Ablation scripts: every arm is a valid recipe that changes what it names, and a script runs to its csv."""

import importlib
import runpy
import sys
from dataclasses import asdict

import pandas as pd
import pytest
from test_pipeline import model_folder  # noqa: F401

from conftest import PACKAGE
from safesteer.recipes import recipe

ANALYSIS = PACKAGE.parent / "analysis"
STUDIES = [p.stem for p in sorted(ANALYSIS.glob("*.py")) if "\nARMS = " in p.read_text()]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ANALYSIS))


def flat(values: dict, prefix: str = "") -> dict:
    rows = {}
    for key, value in values.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_every_arm_changes_what_it_names_and_nothing_else(name, preset):
    study = importlib.import_module(name)
    default = flat(asdict(recipe(preset)))
    for arm in study.ARMS.values():
        settings = {k: v for k, v in arm.items() if k != "n_harmful"}
        found = flat(asdict(recipe(preset, **settings)))
        assert {k: v for k, v in found.items() if v != default[k]}.items() <= settings.items()
    assert len({str(sorted(arm.items())) for arm in study.ARMS.values()}) == len(study.ARMS)
    assert "Refuted" in study.__doc__ or "refuted" in study.__doc__


def test_the_makefile_runs_every_study():
    listed = (PACKAGE.parent / "Makefile").read_text()
    assert len(STUDIES) == 10
    assert all(name in listed for name in STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_to_its_csv_and_continues(name, model_folder, tmp_path, monkeypatch):  # noqa: F811
    small = ["--set", "extraction=prefill", "--set", "coeff=1.0", "--set", "tokens.min_steered_prob=0"]
    command = [name, "--model", str(model_folder), "--quick", *small, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    script = str(ANALYSIS / f"{name}.py")
    arms = runpy.run_path(script, run_name="__main__")["ARMS"]
    table = pd.read_csv(tmp_path / f"{name}-quick.csv")
    assert table.arm.tolist() == list(arms)
    assert (tmp_path / f"{name}-quick.html").exists()
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / f"{name}-quick").glob("*.json")}
    assert len(parts) == len(arms)
    runpy.run_path(script, run_name="__main__")
    assert {p: p.stat().st_mtime_ns for p in parts} == parts
