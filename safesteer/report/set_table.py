"""Rates on sets of prompts, a row per set: what base and student do with prompts nothing was chosen on.

The files of a run hold a row per number; here the rates, the paired change and the damage to the answers of
one set come together, for the console, the report and the model card.
"""

import pandas as pd

SETS_FILE, SET_ANSWERS_FILE = "held_out.csv", "held_out_answers.jsonl"
REPEATS = "answers that repeat four words"


def set_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per set: what is counted, the rate of every model, the change, and the damage.

    Args:
        table: What `score_sets` returned.

    Returns:
        Columns name, kind, n, counts, then per model its rate and "MODEL repeats" (the share of its answers
        in which four words repeat), and where base and student are there: change, low, high.
    """
    rows = []
    for name, part in table.groupby("name", sort=False):
        rates = part[part.metric.isin(("refused", "safe"))].drop_duplicates("model")
        repeats = part[part.metric == REPEATS].set_index("model").value
        row = {
            "name": name,
            "kind": rates.kind.iloc[0],
            "n": int(rates.n.iloc[0]),
            "counts": rates.metric.iloc[0],
        }
        for model, value in zip(rates.model, rates.value, strict=True):
            row |= {model: value, f"{model} repeats": repeats.get(model)}
        for change in part[part.kind == "change"].itertuples():
            row |= {"change": change.value, "low": change.low, "high": change.high}
        rows.append(row)
    return pd.DataFrame(rows)


def set_lines(table: pd.DataFrame) -> list[str]:
    """Return one readable line per set of what `score_sets` returned."""
    lines = []
    for row in set_summary(table).to_dict("records"):
        rates = ", ".join(f"{m} {row[m]:.0%}" for m in dict.fromkeys(table.model) if m in row)
        change = f" (change {row['low']:+.0%} to {row['high']:+.0%})" if "change" in row else ""
        what = f"{row['name']} ({row['kind']}, {row['n']} prompts)"
        lines.append(f"{what}: {row['counts']} {rates}{change}")
    return lines
