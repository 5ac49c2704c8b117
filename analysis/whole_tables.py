"""The tables of whole.py, recipes_on_val.py and search_knee.py: students of a model that hardly refuses.

In the first stand, beside refusals by set, the AUC of the margin, over-refusal where a constant on the
openers gives AT of the harmful refusals (as in `control_tables`), and what answers read like.
"""

from pathlib import Path

import pandas as pd
from control_tables import AT, look_cells, over_at_equal_harm
from table_text import over_seeds, percent, ranged

ROWS = Path(__file__).parent / "results" / "whole"
ON_VAL = Path(__file__).parent / "results" / "recipes_on_val"
SEARCH = Path(__file__).parent / "results" / "search"
OBJECTIVES = {  # of a search: what the table calls them, the prompts, the column of rows, how it is written
    "harmful": ("harmful, % refused", "harmful", "refused", ".0f", 100),
    "over_refusal": ("twins, % refused", "harmless", "refused", ".0f", 100),
    "kl": ("KL to the base", "harmless", "kl", ".4f", 1),
}
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


def knee(folder: Path = SEARCH) -> tuple[list[str], list[list[str]]]:
    """Make a row per objective: what the search promised of its knee, and what its seeds do on test."""
    promised = pd.read_csv(folder / "corrected.csv").query("rule == 'the knee'").set_index("objective")
    base, seeds = pd.read_csv(folder / "base.csv"), sorted(folder.glob("test--*.csv"))
    lines = []
    for objective, (title, label, column, form, scale) in OBJECTIVES.items():
        value, low, high = promised.loc[objective, ["corrected", "low", "high"]]
        values = [_mean(pd.read_csv(path), label, column) for path in seeds]
        inside = sum(low <= v <= high for v in values)
        lines.append(
            [
                title,
                f"{scale * promised.on_val[objective]:{form}}",
                ranged(value, low, high, form, scale),
                f"{scale * _mean(base, label, column):{form}}",
                over_seeds(values, form, scale),
                f"{inside} of {len(values)}",
            ]
        )
    return ["", "on val", "corrected", "base, test", "knee, test", "seeds inside"], lines


def _mean(rows: pd.DataFrame, label: str, column: str) -> float:
    return float(rows[rows.label == label][column].mean())
