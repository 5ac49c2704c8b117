"""Pictures of directions: the sweep, strengths, writers, planes of residuals, likeness.

Drawn from the plain tables of `sweep`, `calibration.grid` and `reading`, in the look of `figures`.
"""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from safesteer.report.figures import COLOURS, DIVERGING, SEQUENCE, Theme, figure_of, numbers, safe

LABELS = {
    "ablation_refusal": "refusal score, harmful, ablated",
    "steering_refusal": "refusal score, harmless, steered",
    "kl_harmless": "KL on harmless, ablated",
}


def sweep_figure(
    table: pd.DataFrame,
    theme: Theme = "light",
    *,
    score: str = "",
    chosen: tuple[str, int] | None = None,
) -> go.Figure:
    """A candidate for each position x layer: a heatmap, or a line where there is one position.

    `score` is a column of the sweep table; by default the one that selection ranks by. Hover shows
    all scores and why the candidate was kept or dropped. `chosen` is the (position, layer) to ring.
    """
    ranked_by = "ablation_refusal" if "instruction" in set(table.extraction) else "steering_refusal"
    score = score or ranked_by
    facts = [_sweep_hover(row) for row in table.to_dict("records")]
    positions = list(dict.fromkeys(table.position.astype(str)))
    name = {"ablation_refusal": "ablation", "steering_refusal": "steering"}.get(score, score)
    label = f"refusal score, {name} (nats)" if score != "kl_harmless" else "KL on harmless (nats)"
    if len(positions) == 1:
        marks = go.Scatter(
            x=table.layer.tolist(),
            y=numbers(table[score]),
            text=facts,
            hovertemplate="%{text}<extra></extra>",
            mode="lines+markers",
            line={"color": COLOURS["teacher"], "width": 2},
            marker={"size": 8, "symbol": ["circle" if k else "circle-open" for k in table.kept]},
            name="candidate (filled: passes every threshold)",
        )
        level = table.loc[table.layer == chosen[1], score] if chosen else []
        marks = [marks, *_ring([chosen[1]], list(level))] if chosen and len(level) else [marks]
        return figure_of(marks, "layer (steering is added to its input)", label, theme)
    shape = (len(positions), table.layer.nunique())
    if len(table) != shape[0] * shape[1]:
        return figure_of([], "layer", label, theme)
    table = table.assign(facts=facts, at=table.position.astype(str))
    values = table.pivot(index="at", columns="layer", values=score).loc[positions]
    hover = table.pivot(index="at", columns="layer", values="facts").loc[positions]
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
    height = 140 + 30 * len(positions)
    kept = table[table.kept]
    dots = go.Scatter(
        x=kept.layer.tolist(),
        y=[safe(p) for p in kept["at"]],
        mode="markers",
        marker={"size": 4, "color": "#1f2933"},
        hoverinfo="skip",
        name="passes every threshold",
    )
    ring = _ring([chosen[1]], [safe(chosen[0])]) if chosen else []
    figure = figure_of([heat, dots, *ring], "layer", "position after the instruction", theme, height=height)
    return figure.update_yaxes(type="category")


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
    rate = float(row.get("refusal_rate", math.nan))
    if not math.isnan(rate):
        lines.append(f"answers to harmless prompts that refuse, steered: {rate:.0%}")
    return "<br>".join([*lines, f"{'kept' if row['kept'] else 'dropped'}: {safe(str(row['reason']), 90)}"])


def strength_figure(table: pd.DataFrame, theme: Theme = "light", *, y: str = "kl_harmless") -> go.Figure:
    """What a coefficient costs and buys, a line a layer: one column of `calibration.grid` against it."""
    labels = {
        "kl_harmless": "KL on harmless prompts (nats a token)",
        "refusal_score": "refusal score, harmful (nats)",
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


def writers_figure(table: pd.DataFrame, theme: Theme = "light", *, n: int = 20) -> go.Figure:
    """The n components whose output differs most along the direction (`reading.writers`)."""
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
    """Residuals of harmful and harmless prompts in two components, with a slider over layers.

    Takes `reading.residual_pca`. The arrow is the direction, as long as the means are apart.
    """
    layers = sorted(table.layer.unique().tolist())
    layer = layers[len(layers) // 2] if layer is None else layer
    colours = {"harmful": COLOURS["random"], "harmless": COLOURS["student"]}
    traces, owner = [], []
    for at in layers:
        here = table[table.layer == at]
        for label, colour in colours.items():
            rows = here[here.label == label]
            traces.append(
                go.Scatter(
                    x=numbers(rows.pc1),
                    y=numbers(rows.pc2),
                    text=[safe(t, 90) for t in rows.text],
                    name=label,
                    mode="markers",
                    marker={"color": colour, "size": 7, "opacity": 0.8},
                    hovertemplate=f"{label}<br>%{{text}}<extra></extra>",
                    visible=at == layer,
                )
            )
            owner.append(at)
        for row in here[here.label == "direction"].itertuples():
            traces.append(
                go.Scatter(
                    x=[0, row.pc1],
                    y=[0, row.pc2],
                    name="direction",
                    mode="lines+markers",
                    marker={"symbol": "arrow", "size": [0, 14], "angleref": "previous", "color": "#8b5cf6"},
                    line={"color": "#8b5cf6", "width": 3},
                    hovertemplate="direction<extra></extra>",
                    visible=at == layer,
                )
            )
            owner.append(at)
    share = table.groupby("layer").explained.first()
    steps = [
        {
            "label": str(at),
            "method": "update",
            "args": [
                {"visible": [o == at for o in owner]},
                {"xaxis.title.text": f"first component ({share[at]:.0%} of variance in both)"},
            ],
        }
        for at in layers
    ]
    figure = figure_of(
        traces,
        f"first component ({share[layer]:.0%} of variance in both)",
        "second component",
        theme,
        height=460,
    )
    slider = {
        "active": layers.index(layer),
        "steps": steps,
        "currentvalue": {"prefix": "layer "},
        "pad": {"t": 50},
    }
    return figure.update_layout(sliders=[slider])


def cosine_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Cosine between directions (`reading.cosines`)."""
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
