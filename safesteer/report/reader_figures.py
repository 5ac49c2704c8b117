"""The figure of a reader of harmfulness: its scores, where it draws the line, and the layer that it reads."""

from collections.abc import Iterable, Mapping
from typing import Any

import plotly.graph_objects as go

from safesteer.report.figures import COLOURS, SEQUENCE, Theme, figure_of, numbers, safe
from safesteer.steering.reader import HarmfulnessReader

# Of a run folder: the reader, and its scores of the val prompts, which it was not fitted on.
READER_FILE, READER_SCORES_FILE = "reader.safetensors", "reader_scores.csv"
KINDS = {"harmful": COLOURS["random"], "harmless": COLOURS["student"]}


def reader_figure(
    reader: HarmfulnessReader, scores: Mapping[str, Iterable[float]], theme: Theme = "light"
) -> go.Figure:
    """Draw scores set by set with both thresholds, and beside them the AUC of every layer that was tried.

    Args:
        reader: Its threshold, its layer and its curve are drawn; without a curve there is one panel.
        scores: What `reader.scores` returns for prompts that it was not fitted on, by the name of their set;
            "harmful" and "harmless" have colours of their own.
        theme: "light" or "dark".
    """
    others = iter(SEQUENCE[2:] * len(scores))
    sets = [_scores_of(n, v, reader.threshold, KINDS.get(n) or next(others)) for n, v in scores.items()]
    curve = _curve(reader) if len(reader.layer_aucs) > 1 else []
    figure = figure_of(
        [*sets, *curve],
        "log-odds that the prompt is harmful (nats)",
        "",
        theme,
        height=140 + 60 * len(sets),
        showlegend=False,
    )
    line = {"color": "rgba(128,128,128,.6)", "dash": "dash", "width": 1}
    for score in sorted({reader.lower, reader.threshold}):
        at = {"x0": score, "x1": score, "y0": 0, "y1": 1}
        figure.add_shape(type="line", xref="x", yref="y domain", line=line, **at)
    figure.update_yaxes(autorange="reversed")
    if not curve:
        return figure
    second: dict[str, Any] = {"anchor": "x2", "side": "right", "title": {"text": "AUC, cross-validated"}}
    return figure.update_layout(
        xaxis={"domain": [0, 0.62]},
        xaxis2={"domain": [0.68, 1], "anchor": "y2", "title": {"text": "layer"}},
        yaxis2=second,
    )


def _scores_of(name: str, values: Iterable[float], threshold: float, colour: str) -> go.Violin:
    """Return one set's distribution, its name with the share above the threshold."""
    drawn = numbers(values)
    above = sum(v is not None and v > threshold for v in drawn)
    label = f"{safe(name, 30)}, {above / max(1, len(drawn)):.0%} above"
    return go.Violin(
        x=drawn,
        y=[label] * len(drawn),
        name=label,
        orientation="h",
        points="all",
        pointpos=0,
        jitter=0.4,
        spanmode="hard",
        line={"color": colour, "width": 1.2},
        marker={"color": colour, "size": 4, "opacity": 0.6},
        hovertemplate=f"{label}<br>%{{x:.2f}} nats<extra></extra>",
    )


def _curve(reader: HarmfulnessReader) -> list[go.Scatter]:
    """Return the AUC per layer, with a ring at the layer that is read."""
    layers, aucs = zip(*reader.layer_aucs, strict=True)
    at = layers.index(reader.layer)
    ring = {"size": 16, "symbol": "circle-open", "color": COLOURS["student"], "line": {"width": 2.5}}
    axes: dict[str, Any] = {"xaxis": "x2", "yaxis": "y2"}
    return [
        go.Scatter(
            x=list(layers),
            y=numbers(aucs),
            mode="lines+markers",
            line={"color": COLOURS["teacher"], "width": 2},
            marker={"size": 5},
            hovertemplate="layer %{x}: AUC %{y:.3f}<extra></extra>",
            **axes,
        ),
        go.Scatter(x=[layers[at]], y=[aucs[at]], mode="markers", marker=ring, hoverinfo="skip", **axes),
    ]
