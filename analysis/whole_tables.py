"""The tables of whole.py and recipes_on_val.py: students of a model that hardly refuses, on val.

In the first stand, beside refusals by set, the AUC of the margin, over-refusal where a constant on the
openers gives AT of the harmful refusals (as in `control_tables`), and what answers read like.
"""

from pathlib import Path

import pandas as pd
from control_tables import AT, look_cells, over_at_equal_harm
from table_text import over_seeds, percent

ROWS = Path(__file__).parent / "results" / "whole"
ON_VAL = Path(__file__).parent / "results" / "recipes_on_val"
FIRST = ("base", "quick", "all")


def table(folder: Path = ROWS) -> tuple[list[str], list[list[str]]]:
    """Make a row per arm and seed: the base, the preset as it was, and the others by name."""
    arms = sorted(path.name.removesuffix(".rows.csv") for path in folder.glob("*.rows.csv"))
    arms.sort(key=lambda stem: FIRST.index(name) if (name := stem.split("--")[0]) in FIRST else len(FIRST))
    titles = ["arm", "harmful, % refused", "harmless", "AUC of the margin"]
    titles += [f"over-refusal at {percent(AT)}", "repeat four words", "KL", "perplexity"]
    return titles, [_line(folder, stem) for stem in arms]


def _line(folder: Path, stem: str) -> list[str]:
    """Write one arm's row."""
    rows = pd.read_csv(folder / f"{stem}.rows.csv")
    damage = pd.read_csv(folder / f"{stem}.damage.csv").iloc[0]
    numbers = [percent(over_at_equal_harm(rows)), percent(damage.repeats)]
    numbers += [f"{damage.kl:.2f}", f"{damage.perplexity:.1f}"]
    return [stem.split("--")[0].replace("_", " "), *look_cells(rows), *numbers]


def on_val(folder: Path = ON_VAL) -> tuple[list[str], list[list[str]]]:
    """Make a row per recipe: the mean of its seeds, and the least and the most of them."""
    titles = ["recipe", "seeds", "harmful, % refused", "twins, % refused", "KL to the base"]
    return titles, [_recipe_line(folder, name) for name in ("base", "preset", "gentle")]


def _recipe_line(folder: Path, name: str) -> list[str]:
    """Write one recipe's row."""
    tables = [pd.read_csv(path) for path in sorted(folder.glob(f"{name}*.rows.csv"))]
    seeds = pd.DataFrame([{**rows.groupby("label").refused.mean(), "kl": rows.kl.mean()} for rows in tables])
    rates = [over_seeds(list(seeds[label]), ".0f", 100) for label in ("harmful", "harmless")]
    return [name, str(len(tables)), *rates, over_seeds(list(seeds.kl), ".3f", 1)]
