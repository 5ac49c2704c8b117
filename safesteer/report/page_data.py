"""Collect what the page shows from a run folder: one JSON value, every text in it made safe.

1. Read each file of the folder. One that is missing or damaged leaves a line in `missing`.
2. Turn values into rows for tables and into plotly figures.
3. Traces are the bulk: alternatives are written as ids into one table of token texts, numbers with
   four digits.
4. Every string passes `running`, so no invisible or direction-changing character gets through.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from safesteer._errors import SafeSteerError
from safesteer._files import json_lines, read_json
from safesteer._token_text import readable, running, visible
from safesteer.attribution.grid import GRID_FILE, AnswerGrid
from safesteer.attribution.result import Attribution
from safesteer.attribution.stories import TokenStory
from safesteer.attribution.tracing import Alternative, Trace, TraceToken
from safesteer.directions.shifts import SHIFT_FILE
from safesteer.directions.sweeping import COLUMNS
from safesteer.report import direction_figures, figures
from safesteer.report.dial_figure import DIAL_FILE, strengths_figure
from safesteer.report.lens_data import pack_grid
from safesteer.report.reader_figures import READER_FILE, READER_SCORES_FILE, reader_figure
from safesteer.report.set_table import SETS_FILE, set_summary
from safesteer.steering.direction import Direction
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.token_set import Context, TokenSet

SECTIONS = {  # section -> its file, and what the page says without it
    "evaluation": ("evaluation.json", "This run has no evaluation yet"),
    "sets": (SETS_FILE, "This run has no scores on other prompts yet"),
    "answers": ("answers.jsonl", "This run has no answers to compare yet"),
    "sweep": ("sweep.csv", "This run has no sweep of directions yet"),
    "direction": ("direction.safetensors", "This run has no direction yet"),
    "reader": (READER_FILE, "This run has no reader of harmfulness"),
    "tokens": ("tokens.json", "This run has no safety tokens yet"),
    "history": ("history.jsonl", "This run has no training history yet"),
    "shift": (SHIFT_FILE, "This run has not measured yet how far the student follows the steering"),
    "dial": (
        DIAL_FILE,
        "Strengths are not measured yet: safesteer evaluate RUN --dial",
    ),
    "attribution": ("attribution.json", "This run has no token attribution yet"),
    "lens": (GRID_FILE, "This run has no answers at other layers and strengths"),
}


def load_page_data(run: Path) -> dict[str, Any]:
    """Return everything the page needs. Only manifest.json must exist."""
    manifest = read_json(run / "manifest.json")
    readers: dict[str, Callable[[Path], Any]] = {
        "evaluation": read_json,
        "sets": lambda path: set_summary(pd.read_csv(path)),
        "answers": json_lines,
        "sweep": _read_sweep,
        "direction": Direction.load,
        "reader": _read_reader,
        "tokens": TokenSet.load,
        "history": json_lines,
        "shift": pd.read_csv,
        "dial": lambda path: strengths_figure(pd.read_csv(path)),
        "attribution": Attribution.load,
        "lens": AnswerGrid.load,
    }
    values, missing = {}, {}
    for name, (file, sentence) in SECTIONS.items():
        values[name] = None
        if not (run / file).is_file():
            missing[name] = f"{sentence} ({file} is missing)."
            continue
        try:
            values[name] = readers[name](run / file)
        except (SafeSteerError, ValueError, OSError) as error:
            missing[name] = f"{file} could not be read: {error}"
        except (KeyError, AttributeError, TypeError, IndexError) as error:  # a file of another shape
            missing[name] = f"{file} could not be read: it lacks {error}"
    attribution: Attribution | None = values["attribution"]
    shown = {
        "run": _run_facts(manifest),
        "evaluation": values["evaluation"],
        "sets": None if values["sets"] is None else values["sets"].to_dict("records"),
        "answers": [_answer(r) for r in values["answers"]] if values["answers"] else None,
        "sweep": _sweep_rows(values["sweep"]) if values["sweep"] is not None else None,
        "direction": _direction(values["direction"]) if values["direction"] else None,
        "tokens": _tokens(values["tokens"], attribution) if values["tokens"] else None,
        "traces": _traces(attribution.traces) if attribution and attribution.traces else None,
        "coverage": _coverage(attribution) if attribution else None,
        "lens": pack_grid(values["lens"]) if values["lens"] else None,
        "figures": _figures(values),
        "templates": {theme: figures.template(theme).to_plotly_json() for theme in ("light", "dark")},
        "missing": missing,
    }
    return safe_values(shown)


def safe_values(value: Any) -> Any:
    """Make every string safe and every number short, at any depth."""
    if isinstance(value, str):
        return running(value)
    if isinstance(value, Mapping):
        return {running(str(k)): safe_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [safe_values(v) for v in value]
    if isinstance(value, float):
        # JSON knows no NaN; four digits are more than any number on the page shows.
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    return value


def _read_sweep(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={"position": str, "reason": str, "extraction": str})
    lacking = [c for c in COLUMNS if c not in table and c != "n_pairs"]  # tables of before lack that one
    if lacking:
        raise ValueError(f"columns {lacking} are missing")
    return table.assign(kept=table.kept.astype(str).str.lower() == "true")


def _read_reader(path: Path) -> go.Figure:
    scores = pd.read_csv(path.parent / READER_SCORES_FILE)
    by_label = {str(label): rows.score for label, rows in scores.groupby("label")}
    return reader_figure(HarmfulnessReader.load(path), by_label)


def _run_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    stages = manifest.get("stages") or {}
    named = ("preset", "seed", "fingerprint", "prompts_hash", "template_hash")
    facts = {k: str(manifest[k]) for k in named if manifest.get(k) is not None}
    facts |= {f"{k} version": str(v) for k, v in (manifest.get("versions") or {}).items()}
    return {
        "model": str(manifest.get("model", "")),
        "name": str(manifest.get("name", "")),
        "date": str(manifest.get("created", ""))[:10],
        "preset": str(manifest.get("preset", "")),
        "seed": str(manifest.get("seed", "")),
        "facts": facts,
        "stages": [
            {"stage": k, "seconds": v.get("seconds"), "peak_mb": v.get("peak_mb")}
            for k, v in stages.items()
            if isinstance(v, Mapping)
        ],
        "config": json.dumps(manifest.get("recipe", {}), indent=2, ensure_ascii=False),
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {k: str(row.get(k) or "") for k in ("prompt", "label", "category")}
    for name in ("base", "teacher", "student"):
        if row.get(name) is not None:
            texts[name] = str(row[name])
            texts[f"{name}_refuses"] = row.get(f"{name}_refuses")
    return texts


def _sweep_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    numbers = ("ablation_refusal", "steering_refusal", "kl_harmless")
    return [
        {
            "position": str(row["position"]),
            "layer": int(row["layer"]),
            **{n: None if pd.isna(row[n]) else float(row[n]) for n in numbers},
            "kept": bool(row["kept"]),
            "reason": str(row["reason"]),
        }
        for row in table.to_dict("records")
    ]


def _direction(direction: Direction) -> dict[str, Any]:
    return {
        "position": direction.position,
        "layer": direction.layer,
        "coeff": direction.coeff,
        "norm": float(direction.vector.float().norm()),
    }


def _tokens(tokens: TokenSet, attribution: Attribution | None) -> dict[str, Any]:
    rows = []
    for number, t in enumerate(tokens.tokens, start=1):
        story = attribution.stories.get(t.id) if attribution else None
        rows.append(
            {
                "number": number,
                "id": t.id,
                "text": visible(story.text if story else t.text),
                "group": story.group if story else "",
                "votes": t.votes,
                "votes_by_position": list(t.votes_by_position),
                "lift": t.mean_delta,
                "p_base": t.p_base,
                "p_steered": t.p_steered,
                "contexts": [_context(c) for c in t.contexts],
                "story": _story(story) if story else None,
            }
        )
    return {"rows": rows, "n_positions": tokens.n_positions, "settings": tokens.settings}


def _context(context: Context) -> dict[str, Any]:
    return vars(context) | {"answer_so_far": readable(context.answer_so_far)}


def _story(story: TokenStory) -> dict[str, Any]:
    return {
        "reason": story.group_reason,
        "n_positions": story.n_positions,
        "votes": story.votes,
        "votes_by_prompt": [[p.prompt, p.votes] for p in story.votes_by_prompt],
        "n_prompts_voting": story.n_prompts_voting,
        "n_prompts": story.n_prompts,
        "p_base": story.p_base,
        "p_steered": story.p_steered,
        "rank_base": story.rank_base,
        "rank_steered": story.rank_steered,
        "direct": story.direct,
        "change": story.change,
        "later_layers": story.later_layers,
        "neighbours": [[visible(text), cosine] for text, cosine in story.neighbours],
        "places": [_context(p) for p in story.places],
    }


def _traces(traces: tuple[Trace, ...]) -> dict[str, Any]:
    """Return traces as rows of numbers; token texts once, in `vocabulary`. See `unpack` in the script."""
    vocabulary: dict[str, str] = {}

    def know(token: TraceToken | Alternative) -> None:
        if str(token.id) not in vocabulary:
            vocabulary[str(token.id)] = visible(token.text)

    def top(alternatives: tuple[Alternative, ...]) -> list[float | int]:
        for a in alternatives:
            know(a)
        return [x for a in alternatives for x in (a.id, _short(a.p))]

    rows = []
    for t in traces:
        tokens = []
        for x in t.tokens:
            know(x)
            p = [x.p_base, x.p_steered, x.p_student]
            ranks = [x.rank_base, x.rank_steered, x.rank_student]
            tops = [top(x.top_base), top(x.top_steered), top(x.top_student)]
            numbers = [_short(x.lift), _short(x.kl), _short(x.kl_share), int(x.in_s)]
            tokens.append([x.id, [None if v is None else _short(v) for v in p], ranks, *numbers, tops])
        rows.append({"prompt": t.prompt, "label": t.label, "author": t.author, "tokens": tokens})
    return {"vocabulary": vocabulary, "rows": rows}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _coverage(attribution: Attribution) -> dict[str, Any]:
    """Return the table beside the curves: shares at the size of S."""
    texts = [
        {
            "name": text.name,
            "n_positions": text.n_positions,
            "kl": text.kl,
            **{
                c.name: {
                    "kl_share": c.kl_share.mean[text.ks.index(text.k)],
                    "mass_teacher": c.mass_teacher.mean[text.ks.index(text.k)],
                    "mass_base": c.mass_base.mean[text.ks.index(text.k)],
                }
                for c in text.curves
            },
        }
        for text in attribution.coverage.texts
    ]
    return {
        "k": attribution.coverage.k,
        "texts": texts,
        "answer_shares": [vars(share) for share in attribution.coverage.answer_shares],
        "n_prompts": attribution.stability.n_prompts,
    }


def _figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Draw figures by name, without their template: the page adds the one of its theme."""
    made: dict[str, go.Figure] = {}
    if values["evaluation"]:
        made["evaluation"] = figures.evaluation_figure(values["evaluation"])
    if values["sweep"] is not None:
        chosen = values["direction"]
        at = (chosen.position, chosen.layer) if chosen else None
        made["sweep"] = direction_figures.sweep_figure(values["sweep"], chosen=at)
    if values["reader"] is not None:
        made["reader"] = values["reader"]
    attribution: Attribution | None = values["attribution"]
    if values["tokens"]:
        stories = attribution.stories if attribution else {}
        rows = [
            {
                "text": stories[t.id].text if t.id in stories else t.text,
                "votes_by_position": t.votes_by_position,
            }
            for t in values["tokens"].tokens
        ]
        made["votes"] = figures.votes_figure(rows)
    if values["history"]:
        made["training"] = figures.training_figure(values["history"])
    if values["shift"] is not None:
        made["shift"] = figures.along_figure(values["shift"])
    if values["dial"] is not None:
        made["dial"] = values["dial"]
    if attribution:
        for i, text in enumerate(attribution.coverage.texts):
            made[f"coverage-{i}"] = figures.coverage_figure(text)
        made["steps"] = figures.steps_figure(attribution.coverage)
        made["stability"] = figures.stability_figure(attribution.stability)
    return {name: plain_figure(figure) for name, figure in made.items()}


def plain_figure(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as JSON values, without its template."""
    raw = json.loads(str(figure.to_json()))
    raw["layout"].pop("template", None)
    return raw
