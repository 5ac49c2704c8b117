"""Tables of the control of which tokens teach (which_tokens.py), from its committed rows."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from safesteer.evaluation.curves import bias_curve, over_refusal_at

ROWS = Path(__file__).parent / "results" / "which_tokens"
HARMFUL_SETS = ("own-val-harmful", "harmbench")
HARMLESS_SETS = {"xstest": "XSTest, safe", "everyday": "everyday", "own-val-harmless": "twins"}
AT = 0.75  # harmful refusals at which arms are compared
N_DRAWS = 300
NATS = tuple(x / 4 for x in range(-24, 41))
TOKENS = {
    "published 1e-8": "S as published (1e-8), Eq. 6",
    "random": "fifty random ids, Eq. 6",
    "matched": "fifty ids matched in probability, Eq. 6",
    "complement": "all but S, Eq. 6",
    "whole": "whole vocabulary, reverse KL",
    "published 1e-3": "S of tokens that occur (1e-3), Eq. 6",
    "divergence 1e-3": "S of tokens that occur (1e-3), true divergence",
}
OPTIMIZERS = {
    "adam": "Adam",
    "adam 2e-06": "Adam, lr 2e-6",
    "adam 1e-5": "Adam, eps 1e-5",
    "unit sgd": "SGD, steps of one length",
    "sgd": "SGD, one rate",
}


def runs(part: str) -> pd.DataFrame:
    """Read the rows of all arms, with the arm's parts as columns."""
    tables = []
    for path in sorted(ROWS.glob(f"*--*.{part}.csv")):
        tokens, optimizer, seed = path.name.removesuffix(f".{part}.csv").split("--")
        name, draw = re.fullmatch(r"(.*)-(\d+)", tokens).groups()
        labels = {"tokens": name.replace("_", " "), "draw": int(draw)}
        labels |= {"optimizer": optimizer.replace("_", " "), "seed": int(seed)}
        tables.append(pd.read_csv(path).assign(**labels))
    return pd.concat(tables, ignore_index=True)


def _rates(rows: pd.DataFrame, column: str = "refused") -> dict[str, float]:
    """Return the harmful rate, a mean over prompts, and the rate of each harmless set."""
    harmful = rows[rows.set.isin(HARMFUL_SETS)][column].mean()
    return {"harmful": harmful} | {s: rows[rows.set == s][column].mean() for s in HARMLESS_SETS}


def _groups(table: pd.DataFrame):
    """Yield (tokens, optimizer, rows) in the order of the page."""
    for optimizer in OPTIMIZERS:
        for tokens in TOKENS:
            part = table[(table.tokens == tokens) & (table.optimizer == optimizer)]
            if len(part):
                yield tokens, optimizer, part


def _cell(rates: dict[str, float]) -> str:
    return " / ".join(f"{100 * rates[name]:.0f}" for name in ("harmful", *HARMLESS_SETS))


def steps_table() -> tuple[list[str], list[list[str]]]:
    """Make the table of refusals by step: harmful / XSTest safe / everyday / twins, means of the runs."""
    base, table = pd.read_csv(ROWS / "base.csv"), runs("rows")
    steps = sorted(table.step.unique())
    lines = [["base", "", "", _cell(_rates(base)), *[""] * (len(steps) - 1)]]
    lines.append(["teacher (steered)", "", "", _cell(_rates(base, "teacher")), *[""] * (len(steps) - 1)])
    for tokens, optimizer, part in _groups(table):
        n_runs = len(part[["seed", "draw"]].drop_duplicates())
        cells = [_cell(_rates(part[part.step == step])) for step in steps]
        lines.append([TOKENS[tokens], OPTIMIZERS[optimizer], str(n_runs), *cells])
    return ["trained on", "optimizer", "runs", *(f"step {step}" for step in steps)], lines


def _points(rows: pd.DataFrame, base: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a curve's points: the base, and each run after each look."""
    looks = [base, *(part for _, part in rows.groupby(["seed", "draw", "step"]))]
    rates = [_rates(look) for look in looks]
    return pd.DataFrame({"harmful": r["harmful"], "over_refusal": r[name]} for r in rates)


def _drawn(table: pd.DataFrame, random: np.random.Generator, ids: pd.DataFrame) -> pd.DataFrame:
    """Draw prompts anew within each set, the same ones for every look."""
    picked = ids.groupby("set", group_keys=False).sample(frac=1, replace=True, random_state=random)
    return picked.merge(table, on=["set", "row"])


def _with_interval(measure, *tables: pd.DataFrame) -> str:
    ids, random = tables[0][["set", "row"]].drop_duplicates(), np.random.default_rng(0)
    draws = []
    for _ in range(N_DRAWS):
        picked = ids.groupby("set").sample(frac=1, replace=True, random_state=random)
        draws.append(measure(*(picked.merge(t, on=["set", "row"]) for t in tables)))
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * measure(*tables):.0f} ({100 * low:.0f} to {100 * high:.0f})"


def at_equal_harm() -> tuple[list[str], list[list[str]]]:
    """Make the table of over-refusal at equal harmful refusals, beside the base's line of a constant."""
    base, table = pd.read_csv(ROWS / "base.csv"), runs("rows")

    def constant(name: str):
        def measure(rows: pd.DataFrame) -> float:
            harmful = rows[rows.set.isin(HARMFUL_SETS)].margin.to_numpy()
            line = bias_curve(harmful, rows[rows.set == name].margin.to_numpy(), NATS)
            return over_refusal_at(line, AT)

        return measure

    lines = [
        [
            "no training: a constant on the base's openers",
            "",
            *(_with_interval(constant(s), base) for s in HARMLESS_SETS),
        ]
    ]
    for tokens, optimizer, part in _groups(table):
        if (
            _rates(part)["harmful"] < 0.2
            or part.groupby(["seed", "draw", "step"])
            .apply(lambda look: _rates(look)["harmful"], include_groups=False)
            .max()
            < AT
        ):
            continue

        def measure(before: pd.DataFrame, rows: pd.DataFrame, name: str) -> float:
            return over_refusal_at(_points(rows, before, name), AT)

        cells = [
            _with_interval(lambda before, rows, s=s: measure(before, rows, s), base, part)
            for s in HARMLESS_SETS
        ]
        lines.append([TOKENS[tokens], OPTIMIZERS[optimizer], *cells])
    return ["trained on", "optimizer", *HARMLESS_SETS.values()], lines


def instruments() -> tuple[list[str], list[list[str]]]:
    """Make the table of what the first step does, and of where the residual stream is after the last."""
    steps, shift = runs("steps"), runs("shift")
    teacher = pd.read_csv(ROWS / "teacher.shift.csv")
    last, top = shift.step.max(), int(shift.layer.max())

    def along(rows: pd.DataFrame, label: str) -> tuple[float, float]:
        at = rows[(rows.layer == top) & (rows.prompts == label)]
        return at.along.mean(), at.cosine.mean()

    lines = []
    whole = {label: along(teacher, label)[0] for label in ("harmful", "harmless")}
    for tokens, optimizer, part in _groups(steps):
        first = part[part.step == 1]
        moved = shift[(shift.tokens == tokens) & (shift.optimizer == optimizer) & (shift.step == last)]
        shares = [along(moved, label)[0] / whole[label] for label in ("harmful", "harmless")]
        lines.append(
            [
                TOKENS[tokens],
                OPTIMIZERS[optimizer],
                f"{first.mass_teacher.mean():.1e}",
                f"{first.gradient_norm.mean():.2g}",
                f"{first.gradient_cosine.mean():.2f}",
                f"{first.update_cosine.mean():.2f}",
                *(f"{share:.0%}".replace("%", " %") for share in shares),
                f"{along(moved, 'harmful')[1]:.2f}",
            ]
        )
    titles = [
        "trained on",
        "optimizer",
        "teacher's mass",
        "gradient's length",
        "its cosine with that of all tokens",
    ]
    titles += ["the update's", "shift along d, harmful", "harmless", "its cosine with d"]
    return titles, lines
