"""What the page shows, read from a run folder: one JSON value, every text in it made safe.

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
from safesteer._files import read_json
from safesteer._token_text import readable, running, visible
from safesteer.attribution.explanation import Attribution
from safesteer.attribution.stories import Why
from safesteer.attribution.tracing import Alternative, Trace, TraceToken
from safesteer.directions.sweeping import COLUMNS
from safesteer.report import direction_figures, figures
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import TokenSet

SECTIONS = {  # file -> what the page says without it
    "evaluation": ("evaluation.json", "This run has no evaluation yet"),
    "answers": ("answers.jsonl", "This run has no answers to compare yet"),
    "sweep": ("sweep.csv", "This run has no sweep of directions yet"),
    "direction": ("direction.safetensors", "This run has no direction yet"),
    "tokens": ("tokens.json", "This run has no safety tokens yet"),
    "history": ("history.jsonl", "This run has no training history yet"),
    "attribution": ("attribution.json", "This run has no token attribution yet"),
}


def page_data(run: Path) -> dict[str, Any]:
    """Everything the page needs. Only manifest.json must exist."""
    manifest = read_json(run / "manifest.json")
    readers: dict[str, Callable[[Path], Any]] = {
        "evaluation": read_json,
        "answers": _json_lines,
        "sweep": _read_sweep,
        "direction": Direction.load,
        "tokens": TokenSet.load,
        "history": _json_lines,
        "attribution": Attribution.load,
    }
    found, missing = {}, {}
    for name, (file, sentence) in SECTIONS.items():
        found[name] = None
        if not (run / file).is_file():
            missing[name] = f"{sentence} ({file} is missing)."
            continue
        try:
            found[name] = readers[name](run / file)
        except (SafeSteerError, ValueError, OSError) as error:
            missing[name] = f"{file} could not be read: {error}"
    story: Attribution | None = found["attribution"]
    shown = {
        "run": _run_facts(manifest),
        "evaluation": found["evaluation"],
        "answers": [_answer(r) for r in found["answers"]] if found["answers"] else None,
        "sweep": _sweep_rows(found["sweep"]) if found["sweep"] is not None else None,
        "direction": _direction(found["direction"]) if found["direction"] else None,
        "tokens": _tokens(found["tokens"], story) if found["tokens"] else None,
        "traces": _traces(story.traces) if story and story.traces else None,
        "coverage": _coverage(story) if story else None,
        "figures": _figures(found),
        "templates": {theme: figures.template(theme).to_plotly_json() for theme in ("light", "dark")},
        "missing": missing,
    }
    return _safe(shown)


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return running(value)
    if isinstance(value, Mapping):
        return {running(str(k)): _safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(v) for v in value]
    if isinstance(value, float):
        # JSON knows no NaN; four digits are more than any number on the page shows.
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    return value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def _read_sweep(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype={"position": str, "reason": str, "extraction": str})
    lacking = [c for c in COLUMNS if c not in table]
    if lacking:
        raise ValueError(f"columns {lacking} are missing")
    return table.assign(kept=table.kept.astype(str).str.lower() == "true")


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
        "config": json.dumps(manifest.get("config", {}), indent=2, ensure_ascii=False),
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


def _tokens(tokens: TokenSet, story: Attribution | None) -> dict[str, Any]:
    rows = []
    for number, t in enumerate(tokens.tokens, start=1):
        why = story.why.get(t.id) if story else None
        text = why.text if why else t.text
        rows.append(
            {
                "number": number,
                "id": t.id,
                "text": visible(text),
                "group": why.group if why else "",
                "votes": t.votes,
                "steps": list(t.votes_by_position),
                "lift": t.mean_delta,
                "p_base": t.p_base,
                "p_teacher": t.p_steered,
                "contexts": [
                    {
                        "prompt": c.prompt,
                        "so_far": readable(c.answer_so_far),
                        "p_base": c.p_base,
                        "p_teacher": c.p_steered,
                    }
                    for c in t.contexts
                ],
                "why": _why(why) if why else None,
            }
        )
    return {"rows": rows, "n_positions": tokens.n_positions, "settings": tokens.settings}


def _why(why: Why) -> dict[str, Any]:
    return {
        "reason": why.group_reason,
        "n_positions": why.n_positions,
        "votes": why.votes,
        "by_prompt": [[p.prompt, p.votes] for p in why.votes_by_prompt],
        "n_prompts_voting": why.n_prompts_voting,
        "n_prompts": why.n_prompts,
        "p_base": why.p_base,
        "p_teacher": why.p_teacher,
        "rank_base": why.rank_base,
        "rank_teacher": why.rank_teacher,
        "direct": why.direct,
        "change": why.change,
        "later": why.later_layers,
        "neighbours": [[visible(text), cosine] for text, cosine in why.neighbours],
        "places": [
            {
                "prompt": p.prompt,
                "so_far": readable(p.answer_so_far),
                "step": p.step,
                "p_base": p.p_base,
                "p_teacher": p.p_teacher,
                "rank_base": p.rank_base,
                "rank_teacher": p.rank_teacher,
            }
            for p in why.places
        ],
    }


def _traces(traces: tuple[Trace, ...]) -> dict[str, Any]:
    """Traces as rows of numbers; token texts once, in `vocabulary`. See `token` in report.js."""
    vocabulary: dict[str, str] = {}

    def know(token: TraceToken | Alternative) -> None:
        if str(token.id) not in vocabulary:
            vocabulary[str(token.id)] = visible(token.text)

    def top(found: tuple[Alternative, ...]) -> list[float | int]:
        for a in found:
            know(a)
        return [x for a in found for x in (a.id, _short(a.p))]

    rows = []
    for t in traces:
        tokens = []
        for x in t.tokens:
            know(x)
            p = [x.p_base, x.p_teacher, x.p_student]
            ranks = [x.rank_base, x.rank_teacher, x.rank_student]
            tops = [top(x.top_base), top(x.top_teacher), top(x.top_student)]
            numbers = [_short(x.lift), _short(x.kl), _short(x.kl_share), int(x.in_s)]
            tokens.append([x.id, [None if v is None else _short(v) for v in p], ranks, *numbers, tops])
        rows.append({"prompt": t.prompt, "label": t.label, "author": t.author, "tokens": tokens})
    return {"vocabulary": vocabulary, "rows": rows}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _coverage(story: Attribution) -> dict[str, Any]:
    """The table beside the curves: shares at the size of S."""
    sources = [
        {
            "name": s.name,
            "n_positions": s.n_positions,
            "kl": s.kl,
            **{
                c.name: {
                    "kl": c.kl_share.mean[s.ks.index(s.k)],
                    "teacher": c.mass_teacher.mean[s.ks.index(s.k)],
                    "base": c.mass_base.mean[s.ks.index(s.k)],
                }
                for c in s.curves
            },
        }
        for s in story.coverage.sources
    ]
    return {
        "k": story.coverage.k,
        "sources": sources,
        "containing": [vars(c) for c in story.coverage.containing],
        "n_prompts": story.stability.n_prompts,
    }


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by name, without their template: the page adds the one of its theme."""
    made: dict[str, go.Figure] = {}
    if found["evaluation"]:
        made["evaluation"] = figures.evaluation_figure(found["evaluation"])
    if found["sweep"] is not None:
        chosen = found["direction"]
        at = (chosen.position, chosen.layer) if chosen else None
        made["sweep"] = direction_figures.sweep_figure(found["sweep"], chosen=at)
    story: Attribution | None = found["attribution"]
    if found["tokens"]:
        rows = [
            {
                "text": story.why[t.id].text if story and t.id in story.why else t.text,
                "votes_by_position": t.votes_by_position,
            }
            for t in found["tokens"].tokens
        ]
        made["votes"] = figures.votes_figure(rows)
    if found["history"]:
        made["training"] = figures.training_figure(found["history"])
    if story:
        for i, source in enumerate(story.coverage.sources):
            made[f"coverage-{i}"] = figures.coverage_figure(source)
        made["steps"] = figures.steps_figure(story.coverage)
        made["stability"] = figures.stability_figure(story.stability)
    return {name: _plain(figure) for name, figure in made.items()}


def _plain(figure: go.Figure) -> dict[str, Any]:
    raw = json.loads(str(figure.to_json()))
    raw["layout"].pop("template", None)
    return raw
