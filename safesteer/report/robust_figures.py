"""The figure of the suite "robust": depth, KL by position, wrapped requests, changed weights and an attack.

1. Refusals by the number of tokens that open the answer: a line per model and opening.
2. KL(base || student) by position, along harmful and harmless answers, where there is a student.
3. A dot with its 95 % interval per wrapper, change of the weights and gradient attack: full for harmful
   prompts, hollow for harmless ones. The attack's is the share of those that were refused before it.
"""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from safesteer.report.figures import COLOURS, SEQUENCE, WHISKER, Theme, numbers, safe, template
from safesteer.report.robust_table import (
    ATTACKED,
    CHANGED,
    KL_HARMFUL,
    KL_HARMLESS,
    OPENED,
    OPENED_BY_BASE,
    PLAIN,
    WRAPPED_HARMFUL,
    WRAPPED_HARMLESS,
    of_kind,
    opened_by,
)

ROW_HEIGHT, TOP, BETWEEN = 28, 320, 90  # pixels: of a name among the dots, of the lines above, and between


def robust_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw the table of the suite "robust", models beside each other.

    Args:
        table: Of `suite.run_suite`.
        theme: "light" or "dark".
    """
    plain = _plain(table).assign(kind=WRAPPED_HARMFUL, name=PLAIN)
    dots = pd.concat([plain, of_kind(table, WRAPPED_HARMFUL, WRAPPED_HARMLESS, CHANGED, ATTACKED)])
    names = list(dict.fromkeys(safe(n, 60) for n in dots["name"]))
    height = ROW_HEIGHT * len(names) + 90
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        row_heights=[TOP, height],
        horizontal_spacing=0.12,
        vertical_spacing=BETWEEN / (TOP + height + BETWEEN),
        subplot_titles=("Opened answers", "Distance from the base", "Wrapped requests, changed weights"),
    )
    for trace in _depth(table):
        figure.add_trace(trace, row=1, col=1)
    for trace in _distance(table):
        figure.add_trace(trace, row=1, col=2)
    for trace in _dots(dots, names):
        figure.add_trace(trace, row=2, col=1)
    counts = of_kind(table, OPENED).metric.iloc[0].partition(",")[0]
    share = "share of prompts refused" if counts == "refused" else "share of safe answers"
    figure.update_layout(template=template(theme), height=TOP + height + BETWEEN + 110)
    # Below the dots: above the figure stand the titles of its parts.
    figure.update_layout(legend={"y": -0.05, "yanchor": "top"}, margin={"t": 30})
    figure.update_xaxes(title_text="tokens that open the answer", type="category", row=1, col=1)
    figure.update_yaxes(title_text=share, tickformat=".0%", range=[0, 1.04], row=1, col=1)
    figure.update_xaxes(title_text="position in the base's answer", row=1, col=2)
    figure.update_yaxes(title_text="KL(base || student), nats", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title_text=share, tickformat=".0%", range=[-0.02, 1.02], row=2, col=1)
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5]}
    return figure.update_yaxes(**ticks, row=2, col=1)


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of answers that nothing opens."""
    opened = of_kind(table, OPENED)
    return pd.DataFrame(opened[opened["name"] == opened_by(0)])


def _colour(model: str) -> str:
    """Return the colour of a model."""
    return COLOURS.get(model, SEQUENCE[4])


def _depth(table: pd.DataFrame) -> list[go.Scatter]:
    """Draw refusals by the tokens that open the answer; none open it at 0, whoever writes the others."""
    traces = []
    for model, of_model in table.groupby("model", sort=False):
        ours, theirs = of_kind(of_model, OPENED), of_kind(of_model, OPENED_BY_BASE)
        lines = [("our text", "solid", ours)]
        if len(theirs):
            lines.append(("the base", "dot", pd.concat([_plain(of_model), theirs])))
        for opener, dash, rows in lines:
            name = f"{safe(str(model))}, opened by {opener}"
            traces.append(
                go.Scatter(
                    x=[n.split()[0] for n in rows["name"]],
                    y=numbers(rows.value),
                    name=name,
                    mode="lines+markers",
                    line={"color": _colour(str(model)), "width": 2, "dash": dash},
                    error_y=_whiskers(rows, str(model)),
                    text=rows.metric.tolist(),
                    hovertemplate=f"{name}<br>%{{x}} tokens: %{{y:.1%}}<br>%{{text}}<extra></extra>",
                )
            )
    return traces


def _distance(table: pd.DataFrame) -> list[go.Scatter]:
    """Draw KL(base || student) by position."""
    traces = []
    for kind, colour in ((KL_HARMFUL, SEQUENCE[3]), (KL_HARMLESS, SEQUENCE[4])):
        rows = of_kind(table, kind)
        if len(rows):
            traces.append(
                go.Scatter(
                    x=[int(n.removeprefix("position ")) for n in rows["name"]],
                    y=numbers(rows.value),
                    name=kind,
                    mode="lines",
                    line={"color": colour, "width": 2},
                    hovertemplate=f"{kind}<br>position %{{x}}: %{{y:.3f}} nats<extra></extra>",
                )
            )
    return traces


def _dots(rows: pd.DataFrame, names: list[str]) -> list[go.Scatter]:
    """Draw a dot per rate, harmless ones hollow; models beside each other, so that no interval hides one."""
    traces, models = [], list(rows.model.unique())
    for model in models:
        shift = 0.3 * (models.index(model) - (len(models) - 1) / 2)
        for label in ("harmful", "harmless"):
            kinds = (WRAPPED_HARMFUL, CHANGED, ATTACKED) if label == "harmful" else (WRAPPED_HARMLESS,)
            part = of_kind(pd.DataFrame(rows[rows.model == model]), *kinds)
            name, symbol = f"{safe(str(model))}, {label}", "circle" if label == "harmful" else "circle-open"
            traces.append(
                go.Scatter(
                    x=numbers(part.value),
                    y=[names.index(safe(n, 60)) + shift for n in part["name"]],
                    name=name,
                    mode="markers",
                    marker={"color": _colour(str(model)), "size": 9, "symbol": symbol},
                    error_x=_whiskers(part, str(model)),
                    text=[f"{safe(n, 80)}: {m}" for n, m in zip(part["name"], part.metric, strict=True)],
                    hovertemplate=f"{name}<br>%{{text}}, %{{x:.1%}}<extra></extra>",
                )
            )
    return traces


def _whiskers(rows: pd.DataFrame, model: str) -> dict[str, Any]:
    """Return plotly's error bars of the 95 % intervals, in the colour of the model."""
    limits = {"array": numbers(rows.high - rows.value), "arrayminus": numbers(rows.value - rows.low)}
    return {**WHISKER, **limits, "color": _colour(model), "thickness": 0.8, "width": 3}
