"""The figure of the dial: what a model between base and student refuses, and how far it is from the base."""

import pandas as pd
import plotly.graph_objects as go

from safesteer.report.figures import COLOURS, WHISKER, Theme, figure_of, numbers

DIAL_FILE = "dial.csv"


def strengths_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw refusals (left axis) and drift (right axis) against the strength, with 95 % intervals.

    Args:
        table: Of `evaluation.dial.measure_strengths`.
        theme: "light" or "dark".
    """
    rows = table.sort_values("strength")

    def line(key: str, name: str, colour: str, form: str, **more: str) -> go.Scatter:
        return go.Scatter(
            x=numbers(rows.strength),
            y=numbers(rows[key]),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "dot" if more else "solid"},
            error_y={
                "array": numbers(rows[f"{key}_high"] - rows[key]),
                "arrayminus": numbers(rows[key] - rows[f"{key}_low"]),
                **WHISKER,
            },
            hovertemplate=f"strength %{{x:g}}<br>{name}: %{{y:{form}}}<extra></extra>",
            **more,
        )

    lines = [
        line("harmful", "harmful prompts", COLOURS["student"], ".0%"),
        line("over_refusal", "their harmless twins", COLOURS["teacher"], ".0%"),
        line("kl", "KL on harmless prompts", COLOURS["base"], ".3f", yaxis="y2"),
    ]
    counts = str(rows.counts.iloc[0]) if len(rows) else "refused"
    title = "strength: 0 is the base, 1 the student"
    figure = figure_of(lines, title, f"share {counts}", theme, height=360)
    drift = {"text": "KL, nats per token"}
    figure.update_layout(
        yaxis={"tickformat": ".0%", "range": [0, 1.04]},
        yaxis2={"overlaying": "y", "side": "right", "showgrid": False, "rangemode": "tozero", "title": drift},
    )
    return figure
