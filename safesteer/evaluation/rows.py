"""Rows of a suite's table: one number each, with its interval."""

from collections.abc import Sequence
from typing import Any

from safesteer._intervals import wilson
from safesteer.evaluation.changes import paired_change
from safesteer.evaluation.quality import repeats_itself, text_quality
from safesteer.report.set_table import REPEATS


def row(kind: str, name: str, metric: str, value: float, limits: tuple[float, float] | None, n: int) -> dict:
    """Make a row of the table."""
    low, high = limits or (None, None)
    return {"kind": kind, "name": name, "metric": metric, "value": value, "low": low, "high": high, "n": n}


def rate(kind: str, name: str, metric: str, holds: Sequence[bool]) -> dict:
    """Make the row of a rate, with its Wilson interval."""
    n, k = len(holds), sum(holds)
    return row(kind, name, metric, k / n, wilson(k, n), n)


def quality_rows(name: str, prompts: Sequence[str], answers: Sequence[str]) -> list[dict]:
    """Make the rows of text quality."""
    quality, kind = text_quality(prompts, answers), "text quality"
    made = [
        rate(kind, name, REPEATS, [repeats_itself(a) for a in answers]),
        row(kind, name, "distinct words per word", quality.distinct, None, quality.n),
        row(kind, name, "words per answer", quality.words, None, quality.n),
    ]
    if quality.code is not None:
        n_coded = round(quality.code * quality.n_code)
        coded = [True] * n_coded + [False] * (quality.n_code - n_coded)
        made.append(rate(kind, name, "code prompts answered with code", coded))
    return made


def change_row(name: str, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict:
    """Make the row of how a rate differs between two models, pair by pair, from their judged answers."""
    change = paired_change([a["verdict"] for a in before], [a["verdict"] for a in after])
    counts, p = after[0]["counts"], f"{change.p:.2g}"
    metric = f"{counts}, student - base ({change.gained} more, {change.lost} less, p {p})"
    return row("change", name, metric, change.value, (change.low, change.high), change.n)
