"""Figures of directions: the sweep, strengths, contributions, planes of residuals, cosines.

Drawn from the plain tables of `sweeping`, `calibration` and `inspection`, in the look of `figures`.
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from safesteer.directions.sweeping import RANKED_BY_ABLATION
from safesteer.report.figures import COLOURS, DIVERGING, SEQUENCE, Theme, figure_of, numbers, safe

LABELS = {
    "ablation_refusal": "refusal score, harmful prompts, ablated",
    "steering_refusal": "refusal score, harmless prompts, steered",
    "kl_harmless": "KL on harmless prompts, ablated (nats)",
}


def sweep_figure(
    table: pd.DataFrame,
    theme: Theme = "light",
    *,
    score: str = "",
    chosen: tuple[str, int] | None = None,
) -> go.Figure:
    """Draw one score of all candidates: a heatmap of position x layer, or a line for a single position.

    Hover shows all scores and why the candidate was kept or dropped.

    Args:
        table: The table of a `Sweep`.
        theme: "light" or "dark".
        score: A column of the table; by default the one that selection ranks by where nobody said which.
        chosen: (position, layer) of the candidate to mark.
    """
    by_ablation = set(table.extraction) & set(RANKED_BY_ABLATION)
    score = score or ("ablation_refusal" if by_ablation else "steering_refusal")
    table = table.assign(
        hover=[_sweep_hover(row) for row in table.to_dict("records")], at=table.position.astype(str)
    )
    name = {"ablation_refusal": "ablation", "steering_refusal": "steering"}.get(score, score)
    label = f"refusal score, {name} (nats)" if score != "kl_harmless" else "KL on harmless prompts (nats)"
    n_positions, n_layers = len(set(table["at"])), len(set(table["layer"]))
    if n_positions == 1:
        return _sweep_line(table, theme, score, label, chosen)
    if len(table) != n_positions * n_layers:
        return figure_of([], "layer", label, theme)
    return _sweep_heatmap(table, theme, score, label, chosen)


def _sweep_line(
    table: pd.DataFrame, theme: Theme, score: str, label: str, chosen: tuple[str, int] | None
) -> go.Figure:
    marks = [
        go.Scatter(
            x=table.layer.tolist(),
            y=numbers(table[score]),
            text=table.hover.tolist(),
            hovertemplate="%{text}<extra></extra>",
            mode="lines+markers",
            line={"color": COLOURS["teacher"], "width": 2},
            marker={"size": 8, "symbol": ["circle" if k else "circle-open" for k in table.kept]},
            name="candidate (filled: passes every threshold)",
        )
    ]
    level = table.loc[table.layer == chosen[1], score].tolist() if chosen else []
    if chosen and level:
        marks += _ring([chosen[1]], level)
    return figure_of(marks, "layer (steering is added to its input)", label, theme)


def _sweep_heatmap(
    table: pd.DataFrame, theme: Theme, score: str, label: str, chosen: tuple[str, int] | None
) -> go.Figure:
    positions = list(dict.fromkeys(table["at"]))
    values = table.pivot(index="at", columns="layer", values=score).loc[positions]
    hover = table.pivot(index="at", columns="layer", values="hover").loc[positions]
    heat = go.Heatmap(
        z=[numbers(row) for _, row in values.iterrows()],
        x=[int(layer) for layer in values.columns],
        y=[safe(p) for p in positions],
        text=hover.to_numpy().tolist(),
        hovertemplate="%{text}<extra></extra>",
        colorscale=[list(c) for c in DIVERGING],
        zmid=0,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": label, "side": "right"}, "thickness": 10, "outlinewidth": 0},
    )
    passing = table[table.kept]
    dots = go.Scatter(
        x=passing.layer.tolist(),
        y=[safe(p) for p in passing["at"]],
        mode="markers",
        marker={"size": 4, "color": "#1f2933"},
        hoverinfo="skip",
        name="passes every threshold",
    )
    ring = _ring([chosen[1]], [safe(chosen[0])]) if chosen else []
    height = 140 + 30 * len(positions)
    figure = figure_of(
        [heat, *_on_fewer_prompts(table), dots, *ring],
        "layer",
        "position after the instruction",
        theme,
        height=height,
    )
    return figure.update_yaxes(type="category")


def _on_fewer_prompts(table: pd.DataFrame) -> list[go.Scatter]:
    """Mark the candidates that left the sweep early, whose numbers are rougher."""
    if "n_pairs" not in table:  # a table of before
        return []
    rough = table[(table.n_pairs > 0) & (table.n_pairs < table.n_pairs.max())]
    if rough.empty:
        return []
    style = {"size": 5, "symbol": "line-ew-open", "color": "#5b6673"}
    name = "estimated on fewer prompts"
    y = [safe(p) for p in rough["at"]]
    return [
        go.Scatter(x=rough.layer.tolist(), y=y, mode="markers", marker=style, name=name, hoverinfo="skip")
    ]


def _ring(x: list[Any], y: list[Any]) -> list[go.Scatter]:
    style = {"size": 16, "symbol": "circle-open", "color": COLOURS["student"], "line": {"width": 2.5}}
    return [go.Scatter(x=x, y=y, mode="markers", marker=style, name="chosen", hoverinfo="skip")]


def _sweep_hover(row: Mapping[Any, Any]) -> str:
    def number(name: str) -> str:
        return "not run" if pd.isna(row[name]) else f"{row[name]:.3f}"

    lines = [f"<b>position {safe(str(row['position']))}, layer {row['layer']}</b>"]
    for name, label in LABELS.items():
        text = f"{label}: {number(name)}"
        if f"{name}_low" in row and not pd.isna(row[f"{name}_low"]):
            text += f" ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"
        others = {k: float(row.get(f"{name}_{k}", math.nan)) for k in ("random", "shuffled", "held_out")}
        shown = [f"{k.replace('_', ' ')} {v:.2f}" for k, v in others.items() if not math.isnan(v)]
        lines.append(text + (f"<br>    {', '.join(shown)}" if shown else ""))
    return "<br>".join([*lines, f"{'kept' if row['kept'] else 'dropped'}: {safe(str(row['reason']), 90)}"])


def strength_figure(table: pd.DataFrame, theme: Theme = "light", *, y: str = "kl_harmless") -> go.Figure:
    """Draw what a coefficient costs and buys, one line per layer.

    Args:
        table: The table of `calibration.strength_table`.
        theme: "light" or "dark".
        y: The column drawn against the coefficient.
    """
    labels = {
        "kl_harmless": "KL on harmless prompts (nats per token)",
        "refusal_score": "refusal score, harmful prompts (nats)",
        "perplexity": "perplexity",
        "refusal_rate_harmful": "harmful prompts refused",
        "refusal_rate_harmless": "harmless prompts refused",
    }
    traces = []
    lines = table.assign(name=[f"layer {a}, {b}" for a, b in zip(table.layer, table.position, strict=True)])
    for i, name in enumerate(dict.fromkeys(lines.name)):
        rows, name = lines[lines.name == name], safe(name)
        facts = [
            "<br>".join(f"{labels[c]}: {row[c]:.3f}" for c in labels if c in row and not pd.isna(row[c]))
            for row in rows.to_dict("records")
        ]
        traces.append(
            go.Scatter(
                x=numbers(rows.coeff),
                y=numbers(rows[y]),
                text=facts,
                name=name,
                mode="lines+markers",
                line={"color": SEQUENCE[i % len(SEQUENCE)], "width": 2},
                hovertemplate=f"<b>{name}, coefficient %{{x:g}}</b><br>%{{text}}<extra></extra>",
            )
        )
    figure = figure_of(traces, "coefficient", labels.get(y, y), theme, height=340)
    return figure.update_yaxes(tickformat=".0%") if y.startswith("refusal_rate") else figure


def contributions_figure(table: pd.DataFrame, theme: Theme = "light", *, n: int = 20) -> go.Figure:
    """Draw the n components whose output differs most along the direction.

    Args:
        table: The table of `inspection.component_contributions`.
        theme: "light" or "dark".
        n: Components shown.
    """
    top = table.reindex(table.difference.abs().sort_values(ascending=False).index).head(n)
    colours = {"head": COLOURS["student"], "mlp": COLOURS["teacher"], "embed": COLOURS["base"]}
    bars = [
        go.Bar(
            y=rows.component.tolist(),
            x=numbers(rows.difference),
            customdata=rows[["harmful", "harmless"]].to_numpy().tolist(),
            name={"head": "attention head", "mlp": "MLP", "embed": "embedding"}[kind],
            orientation="h",
            marker={"color": colours[kind]},
            hovertemplate="%{y}: %{x:.3f}<br>harmful %{customdata[0]:.3f}, harmless"
            " %{customdata[1]:.3f}<extra></extra>",
        )
        for kind, rows in ((k, top[top.kind == k]) for k in colours if (top.kind == k).any())
    ]
    label = "projection on the direction, harmful minus harmless"
    figure = figure_of(bars, label, "", theme, height=90 + 22 * len(top), barmode="overlay")
    order = top.component.tolist()
    return figure.update_yaxes(categoryorder="array", categoryarray=order, autorange="reversed")


def plane_figure(table: pd.DataFrame, theme: Theme = "light", *, layer: int | None = None) -> go.Figure:
    """Draw residuals of harmful and harmless prompts in two components, with a slider over layers.

    The arrow is the direction, as long as the means are apart.

    Args:
        table: The table of `inspection.residual_pca`.
        theme: "light" or "dark".
        layer: The layer shown first; by default the middle one.
    """
    layers = sorted(table.layer.unique().tolist())
    layer = layers[len(layers) // 2] if layer is None else layer
    marks = {at: _plane_marks(rows, at == layer) for at, rows in table.groupby("layer")}
    share = table.groupby("layer").explained.first()
    titles = {at: f"first component ({share[at]:.0%} of variance in both)" for at in layers}
    traces = [mark for at in layers for mark in marks[at]]
    figure = figure_of(traces, titles[layer], "second component", theme, height=460)
    shown = {at: [other == at for other in layers for _ in marks[other]] for at in layers}
    slider = {
        "active": layers.index(layer),
        "steps": [
            {
                "label": str(at),
                "method": "update",
                "args": [{"visible": shown[at]}, {"xaxis.title.text": titles[at]}],
            }
            for at in layers
        ],
        "currentvalue": {"prefix": "layer "},
        "pad": {"t": 50},
    }
    return figure.update_layout(sliders=[slider])


def _plane_marks(rows: pd.DataFrame, visible: bool) -> list[go.Scatter]:
    """Return the points and the arrow of one layer."""
    colours = {"harmful": COLOURS["random"], "harmless": COLOURS["student"]}
    marks = []
    for label, colour in colours.items():
        points = rows[rows.label == label]
        marks.append(
            go.Scatter(
                x=numbers(points.pc1),
                y=numbers(points.pc2),
                text=[safe(t, 90) for t in points.text],
                name=label,
                mode="markers",
                marker={"color": colour, "size": 7, "opacity": 0.8},
                hovertemplate=f"{label}<br>%{{text}}<extra></extra>",
                visible=visible,
            )
        )
    for arrow in rows[rows.label == "direction"].itertuples():
        marks.append(
            go.Scatter(
                x=[0, arrow.pc1],
                y=[0, arrow.pc2],
                name="direction",
                mode="lines+markers",
                marker={"symbol": "arrow", "size": [0, 14], "angleref": "previous", "color": "#8b5cf6"},
                line={"color": "#8b5cf6", "width": 3},
                hovertemplate="direction<extra></extra>",
                visible=visible,
            )
        )
    return marks


def cosine_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw the cosine between directions (`inspection.cosines`)."""
    names = [safe(str(label)) for label in table.index]
    heat = go.Heatmap(
        z=table.to_numpy().tolist(),
        x=names,
        y=names,
        zmin=-1,
        zmax=1,
        colorscale=[list(c) for c in DIVERGING],
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        colorbar={"title": {"text": "cosine", "side": "right"}, "thickness": 10, "outlinewidth": 0},
    )
    figure = figure_of([heat], "position @ layer", "position @ layer", theme, height=520)
    return figure.update_xaxes(type="category").update_yaxes(type="category", autorange="reversed")
