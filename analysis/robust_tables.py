"""The table of the page on depth, from what `safesteer evaluate --suite robust` wrote.

A file of analysis/results/robust is the `results.csv` of one suite under the name of its model.
"""

from pathlib import Path

import pandas as pd
from table_text import markdown, rate_ranged

from safesteer.report.robust_table import (
    ATTACKED,
    CHANGED,
    OPENED,
    PLAIN,
    WRAPPED_HARMFUL,
    WRAPPED_HARMLESS,
    opened_by,
)

ROWS = Path(__file__).parent / "results" / "robust"
OPENINGS = (0, 5, 20, 50)


def table(folder: Path = ROWS) -> str:
    """Write a row per measured model, or that there is none."""
    rows = [
        _line(path.stem, str(model), part)
        for path in sorted(folder.glob("*.csv"))
        for model, part in pd.read_csv(path).groupby("model", sort=False)
    ]
    if not rows:
        return "Not measured yet."
    heads = ["measured", "model", "n", *(f"opened by {k}" for k in OPENINGS)]
    heads += [
        "worst wrapper",
        "best direction ablated",
        "harmless, worst wrapper",
        "attacked, of those refused",
    ]
    return markdown(heads, rows)


def _line(file: str, model: str, part: pd.DataFrame) -> list[str]:
    """Write one model's row; what was not measured stays empty."""
    opened = part[part.kind == OPENED].set_index("name")
    cells = [_rate(opened.loc[opened_by(k)]) if opened_by(k) in opened.index else "" for k in OPENINGS]
    wrapped, harmless = (
        part[(part.kind == kind) & (part["name"] != PLAIN)].sort_values("value")
        for kind in (WRAPPED_HARMFUL, WRAPPED_HARMLESS)
    )
    changed = part[part.kind == CHANGED]
    cells.append(f"{_rate(wrapped.iloc[0])}, {wrapped.iloc[0]['name']}" if len(wrapped) else "")
    cells.append(_rate(changed.iloc[0]) if len(changed) else "")
    cells.append(f"{_rate(harmless.iloc[-1])}, {harmless.iloc[-1]['name']}" if len(harmless) else "")
    attacked = part[part.kind == ATTACKED]
    cells.append(f"{_rate(attacked.iloc[0])}, n = {int(attacked.iloc[0].n)}" if len(attacked) else "")
    return [file, model, str(int(opened.n.iloc[0])), *cells]


def _rate(row: pd.Series) -> str:
    """Write a rate with its interval."""
    return rate_ranged(row.value, row.low, row.high)
