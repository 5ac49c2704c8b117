"""Plotly figures of a run, in one look.

Thin axes, few lines, colours that colour-blind readers can tell apart, a light and a dark template.
Every function takes plain values (a table, a list of records, parts of an Attribution) and returns a
Figure. Text from models and prompts is escaped, because plotly reads labels as markup.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from safesteer._token_text import visible
from safesteer.attribution.coverage import Coverage, Range, TextCoverage
from safesteer.attribution.stability import Stability

Theme = Literal["light", "dark"]

# One colour per thing, everywhere on the page. Chosen to be visible on white and on near-black.
COLOURS = {
    "base": "#7b8794",
    "teacher": "#d97706",
    "student": "#0d9488",
    "S": "#0d9488",
    "best possible": "#7b8794",
    "random candidates": "#d97706",
    "matched in base probability": "#8b5cf6",
    "random": "#c2556a",
    "anchor": "#8b5cf6",
}
SEQUENCE = ("#0d9488", "#d97706", "#8b5cf6", "#c2556a", "#3b82c4", "#7b8794", "#6b8e23", "#a16207")
DIVERGING = ((0.0, "#3b6fb6"), (0.5, "#e9e7e2"), (1.0, "#c2630a"))
WHISKER = {"thickness": 1.2, "width": 4, "color": "#8a8f98"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
INK = {"light": ("#1f2933", "#e4e2dc"), "dark": ("#e6e4df", "#34393f")}


def template(theme: Theme = "light") -> go.layout.Template:
    """Return the look of every figure; the page's own background shows through."""
    ink, grid = INK[theme]
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "ticks": "",
        "automargin": True,
        "title": {"font": {"size": 12}, "standoff": 8},
        "tickfont": {"size": 11},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": SEQUENCE,
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": {"text": ""}},
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
            "hovermode": "closest",
            "bargap": 0.3,
        }
    )


def safe(text: str, width: int = 0) -> str:
    """Return text for a plotly label or hover: visible, escaped, cut to `width` characters unless 0."""
    text = visible(text).replace("␣", " ") if width else visible(text)
    text = text[: width - 1] + "…" if width and len(text) > width else text
    return html.escape(text, quote=False)


def figure_of(
    traces: Sequence[Any], x: str, y: str, theme: Theme, *, height: int = 300, **layout: Any
) -> go.Figure:
    """Return a figure in this look; `x` and `y` are the titles of its axes, `height` is in pixels."""
    figure = go.Figure(list(traces))
    figure.update_layout(template=template(theme), height=height, **layout)
    return figure.update_xaxes(title_text=x).update_yaxes(title_text=y)


def _rgba(colour: str, alpha: float) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def numbers(values: Any) -> list[float | None]:
    """Return floats with None for NaN: a gap in the figure, and valid JSON."""
    return [None if pd.isna(v) else float(v) for v in values]


def votes_figure(tokens: Sequence[Mapping[str, Any]], theme: Theme = "light", n: int = 20) -> go.Figure:
    """Draw the votes of the first `n` safety tokens, stacked by the step of the answer that voted.

    Args:
        tokens: Mappings with `text` and `votes_by_position`.
        theme: "light" or "dark".
        n: Tokens shown.
    """
    tokens = list(tokens)[:n]
    horizon = max((len(t["votes_by_position"]) for t in tokens), default=0)
    # Two ids can look alike, and bars of one name would be merged: the number keeps them apart.
    names = [f"{i + 1}  {safe(t['text'], 24)}" for i, t in enumerate(tokens)]
    bars = []
    for j in range(horizon):
        shade = 1 - 0.75 * j / max(1, horizon - 1)
        bars.append(
            go.Bar(
                y=names,
                x=[t["votes_by_position"][j] for t in tokens],
                name=f"step {j + 1}",
                orientation="h",
                marker={"color": _rgba(COLOURS["student"], shade)},
                hovertemplate=f"step {j + 1}: %{{x}} votes<extra></extra>",
            )
        )
    figure = figure_of(bars, "votes", "", theme, height=90 + 22 * len(tokens), barmode="stack")
    return figure.update_yaxes(autorange="reversed", tickfont={"family": "monospace"})


def _blend(a: str, b: str, share: float) -> str:
    pairs = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in pairs)


def _lines(name: str, xs: Sequence[Any], values: Range, **style: Any) -> list[go.Scatter]:
    """Draw a line of means with a band from the lowest to the highest value."""
    colour: str = style.pop("colour", None) or COLOURS.get(name, SEQUENCE[0])
    shown = []
    if values.low != values.mean or values.high != values.mean:
        shown.append(
            go.Scatter(
                x=[*xs, *reversed(xs)],
                y=[*values.high, *reversed(values.low)],
                mode="lines",
                fill="toself",
                fillcolor=_rgba(colour, 0.15),
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
            )
        )
    line = {"color": colour, "width": 2, **style}
    shown.append(
        go.Scatter(
            x=list(xs),
            y=list(values.mean),
            name=name,
            legendgroup=name,
            mode="lines+markers",
            marker={"size": 5},
            line=line,
            hovertemplate=f"{name}<br>K = %{{x}}: %{{y:.1%}}<extra></extra>",
        )
    )
    return shown


def coverage_figure(text: TextCoverage, theme: Theme = "light") -> go.Figure:
    """Draw the share of KL(teacher || base) that K tokens carry: S against its controls."""
    traces: list[go.Scatter] = []
    for curve in text.curves:
        dash = "dot" if curve.name == "best possible" else "solid"
        traces += _lines(curve.name, text.ks, curve.kl_share, dash=dash)
    figure = figure_of(traces, "K, tokens in the set", "share of KL(teacher || base)", theme, height=340)
    figure.add_vline(x=text.k, line={"color": "rgba(128,128,128,.6)", "dash": "dash", "width": 1})
    note = {"text": f"|S| = {text.k}", "x": text.k, "y": 0, "xanchor": "left", "showarrow": False}
    figure.add_annotation(yref="paper", yanchor="bottom", **note)
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def steps_figure(coverage: Coverage, theme: Theme = "light") -> go.Figure:
    """Draw the share of KL that S carries at each step of the answer, by kind of text."""
    traces = [
        go.Scatter(
            x=[s.steps for s in text.steps],
            y=[s.kl_share["S"] for s in text.steps],
            text=[f"KL {s.kl:.3f} nats per position, {s.n_positions} positions" for s in text.steps],
            name=text.name,
            mode="lines+markers",
            line={"color": SEQUENCE[i % len(SEQUENCE)], "width": 2},
            hovertemplate="step %{x}: %{y:.1%}<br>%{text}<extra></extra>",
        )
        for i, text in enumerate(coverage.texts)
    ]
    figure = figure_of(traces, "step of the answer", "share of KL on S", theme)
    return figure.update_yaxes(tickformat=".0%", range=[0, 1.02]).update_xaxes(type="category")


def stability_figure(stability: Stability, theme: Theme = "light") -> go.Figure:
    """Draw the Jaccard similarity of two selections of K tokens, as a function of K."""
    traces: list[go.Scatter] = []
    names = {"prompts": "halves of the prompts", "samples": "halves of the samples"}
    horizons = [c.name for c in stability.curves if c.name.startswith("horizon")]
    for i, curve in enumerate(stability.curves):
        name, style = names.get(curve.name, curve.name), {"colour": SEQUENCE[i % len(SEQUENCE)]}
        if curve.name in horizons:  # one hue, stronger with the horizon
            h = curve.name.removeprefix("horizon ")
            name = "first step only" if h == "1" else f"first {h} steps only"
            share = (horizons.index(curve.name) + 1) / len(horizons)
            style = {"colour": _blend("#d9d2ee", "#6d3fd1", share), "width": 1.2}
        traces += _lines(name, stability.ks, curve.jaccard, **style)
    chance = Range(stability.chance, stability.chance, stability.chance)
    traces += _lines("chance", stability.ks, chance, colour=COLOURS["base"], dash="dash")
    figure = figure_of(traces, "K, tokens in S", "Jaccard similarity", theme, height=340)
    return figure.update_yaxes(range=[0, 1.02])


def training_figure(history: Sequence[Mapping[str, Any]], theme: Theme = "light") -> go.Figure:
    """Draw loss (left axis), probability of S and refusals of watched prompts (right axis), step by step."""
    steps = [r["step"] for r in history]

    def line(key: str, name: str, colour: str, **more: Any) -> go.Scatter:
        return go.Scatter(
            x=steps,
            y=numbers(r.get(key) for r in history),
            name=name,
            mode=more.pop("mode", "lines"),
            line={"color": colour, "width": 2, **more.pop("line", {})},
            hovertemplate=f"step %{{x}}<br>{name}: %{{y:.4f}}<extra></extra>",
            **more,
        )

    right: dict[str, Any] = {"yaxis": "y2"}
    traces = [
        line("loss", "loss (nats)", SEQUENCE[4]),
        line("mass_on_s_student", "probability of S, student", COLOURS["student"], **right),
        line("mass_on_s_teacher", "probability of S, teacher", COLOURS["teacher"], **right),
        line("val_refused", "harmful val prompts refused", SEQUENCE[3], **right, mode="markers"),
        line(
            "mass_on_s_anchor",
            "probability of S, student on harmless prompts",
            COLOURS["anchor"],
            **right,
            line={"dash": "dot"},
        ),
    ]
    figure = figure_of(traces, "step", "loss (nats)", theme, height=340)
    second = {"overlaying": "y", "side": "right", "showgrid": False, "rangemode": "tozero"}
    return figure.update_layout(
        yaxis2={**second, "tickformat": ".0%", "title": {"text": "probability of S, share refused"}},
        yaxis={"rangemode": "tozero"},
    )


def _shares(bars: Sequence[go.Bar], y: str, theme: Theme) -> go.Figure:
    """Draw bars of shares side by side, from 0 to 100 %."""
    figure = figure_of(bars, "", y, theme, barmode="group", bargroupgap=0.08)
    return figure.update_yaxes(tickformat=".0%", range=[0, 1.04])


def evaluation_figure(scores: Mapping[str, Mapping[str, Any]], theme: Theme = "light") -> go.Figure:
    """Draw refusal rates with 95 % intervals: wanted on harmful prompts, unwanted on harmless ones."""
    kinds = {"refusal_rate_harmful": "harmful prompts", "refusal_rate_harmless": "harmless prompts"}
    bars = []
    for name, row in scores.items():
        keys = [k for k in kinds if row.get(k) is not None]
        limits = [row.get(f"{k}_ci") or (row[k], row[k]) for k in keys]
        bars.append(
            go.Bar(
                x=[kinds[k] for k in keys],
                y=[row[k] for k in keys],
                name=safe(name),
                marker={"color": COLOURS.get(name, SEQUENCE[4])},
                error_y={
                    "array": [high - row[k] for k, (_, high) in zip(keys, limits, strict=True)],
                    "arrayminus": [row[k] - low for k, (low, _) in zip(keys, limits, strict=True)],
                    **WHISKER,
                },
                hovertemplate=f"{safe(name)}<br>%{{x}}: %{{y:.1%}}<extra></extra>",
            )
        )
    counts = next(iter(scores.values()), {}).get("counts", "refused")
    return _shares(
        bars, f"share of prompts {counts}" if counts == "refused" else "share of safe answers", theme
    )


def suite_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw a suite's rates with 95 % intervals, models side by side: refused, over-refused, capability."""
    kinds = ["harmful", "over-refusal", "capability"]
    counted = (table.kind == "capability") | table.metric.isin(("refused", "safe"))  # of several judges
    rates = table[table.kind.isin(kinds) & counted]
    bars = []
    for model, rows in rates.groupby("model", sort=False):
        bars.append(
            go.Bar(
                x=[rows.kind.tolist(), [safe(n) for n in rows["name"]]],
                y=numbers(rows.value),
                name=safe(str(model)),
                marker={"color": COLOURS.get(str(model), SEQUENCE[4])},
                error_y={
                    "array": numbers(rows.high - rows.value),
                    "arrayminus": numbers(rows.value - rows.low),
                    **WHISKER,
                },
                hovertemplate=f"{safe(str(model))}<br>%{{x}}: %{{y:.1%}}<extra></extra>",
            )
        )
    return _shares(bars, "share of prompts or tasks", theme)


def shift_figure(points: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw final hidden states of several models in the first one's principal plane (paper, Figure 3)."""
    traces = []
    for model, rows in points.groupby("model", sort=False):
        shift = rows["shift"].iloc[0]
        traces.append(
            go.Scatter(
                x=rows.pc1,
                y=rows.pc2,
                mode="markers",
                name=f"{safe(str(model))}: shift {shift:.2f}",
                marker={"color": COLOURS.get(str(model), SEQUENCE[4]), "size": 6, "opacity": 0.7},
                text=[safe(t, 60) for t in rows.text],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    return figure_of(traces, "PC 1 of the first model", "PC 2", theme, height=380)


def along_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw how far teacher and student move the residual stream along the steering direction, by layer.

    Args:
        table: Of `directions.shifts.shift_along`.
        theme: "light" or "dark".
    """
    traces = [
        go.Scatter(
            x=rows.layer,
            y=numbers(rows.along),
            name=f"{model}, {label} prompts",
            mode="lines",
            line={"color": COLOURS[str(model)], "width": 2, "dash": "solid" if label == "harmful" else "dot"},
            text=[f"{c:.2f}" for c in rows.cosine],
            hovertemplate="layer %{x}: %{y:.2f}<br>cosine with the direction %{text}<extra></extra>",
        )
        for model in table.model.unique()
        for label, rows in table[table.model == model].groupby("prompts", sort=False)
    ]
    return figure_of(traces, "layer", "shift along the direction", theme, height=320)
