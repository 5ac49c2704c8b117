"""The page of a search: its front as a picture, and behind every point a trial with settings and answers.

The page is put together as the report is (`page.fill_page`): one file, no network, text as text only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from safesteer._files import write_text
from safesteer._version import __version__
from safesteer.report.figures import COLOURS, SEQUENCE, Theme, figure_of, numbers, template
from safesteer.report.page import fill_page
from safesteer.report.page_data import plain_figure, safe_values

DRIFT = ((0.0, COLOURS["student"]), (0.5, "#e5b567"), (1.0, SEQUENCE[3]))  # little KL to much


def write_search_page(path: Path, facts: Mapping[str, Any], trials: pd.DataFrame, luck: pd.DataFrame) -> None:
    """Write the page of a search.

    Args:
        path: The file.
        facts: model, date, judge, base (its objectives), n_pairs, start (the recipe's settings), space (a row
            per setting), answers (of complete trials, by number), made (direction and tokens by number).
        trials: A row per trial, with the columns on_front and chosen.
        luck: What the choice is worth, by rule and objective.
    """
    write_text(path, build_search_page(facts, trials, luck))


def build_search_page(facts: Mapping[str, Any], trials: pd.DataFrame, luck: pd.DataFrame) -> str:
    """Return the page of a search as text; see `write_search_page`."""
    names = [entry["name"] for entry in facts["space"]]
    plain = trials.astype(object).where(trials.notna(), None)
    others = plain.drop(columns=names).to_dict("records")
    settings = plain[names].to_dict("records")
    rows = [{**row, "settings": values} for row, values in zip(others, settings, strict=True)]
    data = {
        **{name: facts[name] for name in ("base", "n_pairs", "start", "space", "made")},
        "answers": {str(number): list(rows) for number, rows in facts["answers"].items()},
        "trials": rows,
        "luck": luck.to_dict("records"),
        "figure": plain_figure(front_figure(trials, facts["base"])),
        "templates": {theme: template(theme).to_plotly_json() for theme in ("light", "dark")},
    }
    about = [
        facts["date"],
        f"{int((trials.state != 'interrupted').sum())} trials",
        f"judged by {facts['judge']}",
    ]
    texts = {
        "title": f"SafeSteer search: {facts['model']}",
        "model": facts["model"],
        "about": " · ".join(filter(None, [*about, f"SafeSteer {__version__}"])),
    }
    return fill_page("search.html", ("search.js",), safe_values(data), safe_values(texts))


def front_figure(trials: pd.DataFrame, base: Mapping[str, float], theme: Theme = "light") -> go.Figure:
    """Draw the complete trials: harmful refusals against over-refusals, coloured by drift.

    Args:
        trials: Columns trial, state, harmful, over_refusal, kl, on_front, chosen.
        base: harmful, over_refusal and kl of the base.
        theme: "light" or "dark".
    """
    complete = trials[trials.state == "complete"]
    rates = "harmful refused %{y:.0%}<br>twins refused %{x:.0%}"
    hover = f"trial %{{customdata}}<br>{rates}<br>KL %{{text}}<extra></extra>"
    scale = {"cmin": 0.0, "cmax": float(complete.kl.max()) or 1.0, "colorscale": DRIFT}
    bar = {"title": {"text": "KL, nats per token", "side": "right"}, "thickness": 10, "outlinewidth": 0}
    groups = [
        ("behind the front", complete[~complete.on_front], {"size": 7, "opacity": 0.45}),
        ("on the front", complete[complete.on_front], {"size": 12, "showscale": True, "colorbar": bar}),
    ]
    traces = [
        go.Scatter(
            x=numbers(rows.over_refusal),
            y=numbers(rows.harmful),
            customdata=[int(n) for n in rows.trial],
            text=[f"{kl:.3f}" for kl in rows.kl],
            name=name,
            mode="markers",
            marker={"color": numbers(rows.kl), **scale, **look},
            hovertemplate=hover,
            cliponaxis=False,
        )
        for name, rows, look in groups
    ]
    chosen = complete[complete.chosen]
    ring = {"symbol": "circle-open", "size": 20, "color": SEQUENCE[2], "line": {"width": 2}}
    cross = {"symbol": "x", "size": 9, "color": COLOURS["base"]}
    xy = {"x": numbers(chosen.over_refusal), "y": numbers(chosen.harmful)}
    traces.append(go.Scatter(**xy, name="chosen", mode="markers", marker=ring, hoverinfo="skip"))
    xy = {"x": [base["over_refusal"]], "y": [base["harmful"]]}
    hover = f"base<br>{rates}<extra></extra>"
    traces.append(go.Scatter(**xy, name="base", mode="markers", marker=cross, hovertemplate=hover))
    axes = "harmless twins refused", "harmful prompts refused"
    figure = figure_of(traces, *axes, theme, height=440, clickmode="event")
    share: dict[str, Any] = {"tickformat": ".0%", "rangemode": "tozero"}
    return figure.update_xaxes(**share).update_yaxes(**share)
