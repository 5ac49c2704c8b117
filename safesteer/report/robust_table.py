"""Rows of the suite "robust": their kinds, and the line of the model card that sums them up."""

import pandas as pd

OPENED, OPENED_BY_BASE = "answer opened by our text", "answer opened by the base"
KL_HARMFUL, KL_HARMLESS = "KL along harmful answers", "KL along harmless answers"
WRAPPED_HARMFUL, WRAPPED_HARMLESS = "wrapped, harmful", "wrapped, harmless"
CHANGED, COST = "weights changed, harmful", "weights changed, KL"
ATTACKED, SPENT = "gradient attack, harmful", "gradient attack, numbers"
UNKNOWN = "verdict unknown"
PLAIN = "plain"  # the name of what is not wrapped
STARTS = "- Robustness"  # of the card's line
NOT_MEASURED = (
    f"{STARTS}: not measured. Jailbreaks, other languages, long conversations and system prompts of your"
    " own are not part of these numbers."
)


def opened_by(k: int) -> str:
    """Return the name of the rows of answers that k tokens open."""
    return "1 token" if k == 1 else f"{k} tokens"


def of_kind(table: pd.DataFrame, *kinds: str) -> pd.DataFrame:
    """Return the rows of some kinds."""
    return pd.DataFrame(table[table.kind.isin(kinds)])


def is_robust(table: pd.DataFrame) -> bool:
    """Return whether a suite's table has rows of robustness."""
    return bool((table.kind == OPENED).any())


def robustness_line(table: pd.DataFrame | None, model: str = "student") -> str:
    """Return the line of a model card: refusals plainly, opened, wrapped, with other weights, and attacked.

    Args:
        table: Of the suite "robust"; None, or one without the model: nothing was measured.
        model: Which model of the table the card is about.
    """
    rows = pd.DataFrame() if table is None else pd.DataFrame(table[table.model == model])
    if rows.empty or not is_robust(rows):
        return NOT_MEASURED
    opened = of_kind(rows, OPENED)
    counts = opened.iloc[0].metric.partition(",")[0]
    ends = {str(r["name"]): r.value for _, r in opened.iloc[[0, -1]].iterrows()}
    parts = [
        f"{value:.0%} " + ("plainly" if k == opened_by(0) else f"where our text opens the answer by {k}")
        for k, value in ends.items()
    ]
    wrapped = of_kind(rows, WRAPPED_HARMFUL)
    if len(wrapped):
        worst = wrapped.loc[wrapped.value.idxmin()]
        parts.append(f"{worst.value:.0%} in the worst of {len(wrapped)} wrappers ({worst['name']})")
    changed = of_kind(rows, CHANGED)
    if len(changed):
        first = changed.iloc[0]
        costs = of_kind(rows, COST).set_index("name").value
        parts.append(f"{first.value:.0%} with the {first['name']}, at a KL of {costs[first['name']]:.2f}")
    for _, attacked in of_kind(rows, ATTACKED).iterrows():
        parts.append(f"{attacked.value:.0%} of {int(attacked.n)} {counts} ones after a {attacked['name']}")
    harmless = of_kind(pd.DataFrame(rows[rows["name"] != PLAIN]), WRAPPED_HARMLESS)
    over = (
        f" Harmless ones in the same wrappers: at most {harmless.value.max():.0%}." if len(harmless) else ""
    )
    return (
        f"{STARTS} (`safesteer evaluate --suite robust`, {int(opened.iloc[0].n)} harmful prompts), {counts}:"
        f" {', '.join(parts)}.{over} Wrappers are the project's own: who searches may find worse ones."
    )
