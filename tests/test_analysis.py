"""Ablation scripts: every arm is a valid recipe that changes what it names, and a script runs to its csv."""

import importlib
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

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
    assert len(STUDIES) == 9
    assert all(name in listed for name in STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selection_method", "figure3_shift"])
def test_a_study_runs_to_its_csv_and_continues(name, model_folder, tmp_path):  # noqa: F811
    small = ["--set", "extraction=prefill", "--set", "coeff=1.0", "--set", "tokens.min_steered_prob=0"]
    command = [sys.executable, str(ANALYSIS / f"{name}.py"), "--model", str(model_folder), "--quick", *small]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(tmp_path / f"{name}-quick.csv")
    table = pd.read_csv(path)
    assert len(table) == 2
    assert (tmp_path / f"{name}-quick.html").exists()
    (part,) = (tmp_path / f"{name}-quick").glob(f"{table.arm[0].replace(' ', '-')}-0.json")
    written = part.stat().st_mtime_ns
    again = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert again.returncode == 0
    assert part.stat().st_mtime_ns == written
