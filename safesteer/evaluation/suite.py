"""A suite: refusals, over-refusals, capability, drift and perplexity of one model, or of a run's base
and student, as one table with intervals.

Every (model, measure) pair is a file in OUT/parts, written when it is done, so an interrupted suite
continues. `suite.json` says what was measured on which models; a folder of another suite is refused.

    quick   32 pairs of the test split; no capability
    small   the 100 test pairs; 200 rows each of ARC-Easy, PIQA and LAMBADA
    paper   the paper's benchmarks and tasks, whole
Drift: KL(base || student) along the base's answers to harmless prompts, and the shift of the final
hidden state at the last prompt position in units of the base's spread (paper, Figure 3).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from safesteer._errors import SafeSteerError
from safesteer._files import json_lines, locked, read_json, write_json, write_text
from safesteer._intervals import bootstrap, wilson
from safesteer.directions.inspection import representation_shift
from safesteer.evaluation.capability import capability, command_line
from safesteer.evaluation.humaneval import humaneval, problems
from safesteer.evaluation.scores import kl_on_answers
from safesteer.judges.judge import Judge, judge_all, judge_name, outcomes
from safesteer.judges.wording import refuses, refuses_anywhere
from safesteer.models.chat_model import ChatModel, hf_model
from safesteer.models.generation import generate
from safesteer.models.loading import load_model
from safesteer.models.text_loss import general_text, perplexity
from safesteer.prompts.benchmarks import benchmark_named, load_benchmark
from safesteer.prompts.prompt_set import load_prompts
from safesteer.report.page import suite_page
from safesteer.settings import EvaluateConfig

HUMANEVAL, WIKITEXT = "humaneval", "wikitext2_test.jsonl"
OWN = {"own-harmful": "harmful", "own-harmless": "over-refusal"}  # the project's held-out pairs


@dataclass(frozen=True)
class Suite:
    """What is measured. `n_prompts` of each set of prompts and `n_rows` of each task (None: all)."""

    sets: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    n_prompts: int | None = None
    n_rows: int | None = None
    max_new_tokens: int = 32
    perplexity_tokens: int = 16384


SUITES = {
    "quick": Suite(tuple(OWN), n_prompts=32, perplexity_tokens=4096),
    "small": Suite(tuple(OWN), ("arc_easy", "piqa", "lambada_openai"), n_rows=200),
    "paper": Suite(
        (
            "advbench",
            "pku-saferlhf",
            "harmbench",
            "jailbreakbench",
            "sorry-bench",
            "harmfulqa",
            "alert",
            "strongreject",
            "xstest",
            "or-bench",
            "jailbreakbench-benign",
            "alpaca-eval",
            *OWN,
        ),
        ("mmlu_stem", "gsm8k", "minerva_math500", HUMANEVAL, "ifeval", "arc_easy", "piqa", "lambada_openai"),
        max_new_tokens=256,
    ),
}


def run_suite(
    target: str | Path,
    suite: str | Suite = "quick",
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    judge: Judge = refuses,
    allow_code: bool = False,
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure a model (Hub id, folder) or a run folder's base and student; returns the table.

    Columns: model, kind, name, metric, value, low, high (95 %), n. OUT (default: a folder in the run,
    or `suite-NAME` here) receives evaluation.json, evaluation.csv, evaluation.html and answers.jsonl.
    `data` is a folder of local rows. HumanEval is left out unless `allow_code`, because it runs what the
    model wrote. Raises SafeSteerError for an unknown suite or a folder of another.
    """
    if isinstance(suite, str) and suite not in SUITES:
        raise SafeSteerError(f"Unknown suite '{suite}': use one of {', '.join(SUITES)}.")
    name = suite if isinstance(suite, str) else "custom"
    chosen = SUITES[suite] if isinstance(suite, str) else suite
    sources = _sources(target)
    at_run = "student" in sources
    folder = Path(out) if out else (Path(target) / f"suite-{name}" if at_run else Path(f"suite-{name}"))
    console = console or Console()
    if HUMANEVAL in chosen.tasks and not allow_code:
        console.print("HumanEval runs what the model writes, and is left out unless you allow it.")
        chosen = replace(chosen, tasks=tuple(t for t in chosen.tasks if t != HUMANEVAL))
    models = {label: load_model(source) for label, source in sources.items()}
    with locked(folder):
        _identify(folder, chosen, judge, data, models)
        rows: list[dict] = []
        for label, chat in models.items():
            for item, measure in _measures(chosen, label, models, folder, data, judge):
                part = folder / "parts" / f"{label}--{item}.json"
                if not part.exists():
                    console.print(f"{label}: {item}", highlight=False)
                    write_json(part, measure(chat))
                rows += [{"model": label, **row} for row in read_json(part)["rows"]]
        table = pd.DataFrame(rows, columns=["model", "kind", "name", "metric", "value", "low", "high", "n"])
        write_json(folder / "evaluation.json", {"suite": asdict(chosen), "rows": rows})
        write_text(folder / "evaluation.csv", table.to_csv(index=False))
        write_text(folder / "evaluation.html", suite_page(table, f"{target}: suite {name}"))
        answers = [
            a for p in sorted((folder / "parts").glob("*.json")) for a in read_json(p).get("answers", [])
        ]
        write_text(folder / "answers.jsonl", "".join(json.dumps(a) + "\n" for a in answers))
        for task in (t for t in chosen.tasks if t != HUMANEVAL and data is not None):
            for label, chat in models.items():  # where the weights lie: the harness knows no short names
                text = command_line(
                    str(hf_model(chat.model).name_or_path), folder / "tasks", task, chosen.n_rows
                )
                console.print(f"the same by the harness ({label}): {text}", highlight=False, soft_wrap=True)
    return table


def _sources(target: str | Path) -> dict[str, str]:
    """Names of models and where to load them from."""
    manifest = Path(target) / "manifest.json"
    if not manifest.is_file():
        return {"model": str(target)}
    student = Path(target) / "model"
    if not (student / "config.json").is_file():
        raise SafeSteerError(f"{target} has no exported model yet: finish the run with safesteer align.")
    return {"base": read_json(manifest)["model"], "student": str(student)}


def _identify(folder: Path, suite: Suite, judge: Judge, data, models: dict[str, ChatModel]) -> None:
    ours = {
        "suite": json.loads(json.dumps(asdict(suite))),
        "judge": judge_name(judge),
        "data": str(Path(data).resolve()) if data is not None else None,
        "models": {label: chat.fingerprint for label, chat in models.items()},
    }
    path = folder / "suite.json"
    if path.exists():
        different = [k for k, v in ours.items() if read_json(path).get(k) != v]
        if different:
            raise SafeSteerError(
                f"{folder} holds an evaluation with another {', '.join(different)}: choose another folder,"
                " or delete it to start again."
            )
    else:
        write_json(path, ours)


Measure = Callable[[ChatModel], dict[str, Any]]


def _measures(
    suite: Suite, label: str, models: dict[str, ChatModel], folder: Path, data, judge: Judge
) -> Iterator[tuple[str, Measure]]:
    """(name of the part, what makes it), for one model."""
    for name in suite.sets:
        texts = partial(_texts, name, data, suite.n_prompts)
        yield name, partial(_refusals, label, name, texts, suite, judge)
    for task in suite.tasks:
        if task == HUMANEVAL:
            yield task, partial(_humaneval, data, suite.n_rows)
        else:
            yield task, partial(_capability, task, folder / "tasks", data, suite.n_rows)
    yield "perplexity", partial(_perplexity, suite, data)
    if label == "student":
        few = load_prompts().split("test").first(suite.n_prompts).harmless
        yield "drift", partial(_drift, models["base"], few)


def _texts(name: str, data, limit: int | None) -> list[str]:
    if name in OWN:
        test = load_prompts().split("test").first(limit)
        return test.harmful if name == "own-harmful" else test.harmless
    return load_benchmark(name, data=data, limit=limit)


def _row(kind: str, name: str, metric: str, value: float, limits: tuple[float, float] | None, n: int) -> dict:
    low, high = limits or (None, None)
    return {"kind": kind, "name": name, "metric": metric, "value": value, "low": low, "high": high, "n": n}


def _refusals(
    label: str, name: str, texts: Callable[[], list[str]], suite: Suite, judge: Judge, chat: ChatModel
) -> dict:
    prompts = texts()
    said = generate(chat, prompts, max_new_tokens=suite.max_new_tokens, batch_size=50)
    counts, values = outcomes(judge_all(judge, prompts, said))
    kind = OWN.get(name) or benchmark_named(name).kind
    rows = [_rate(kind, name, counts, [value is True for value in values])]
    if judge is refuses:  # the lenient form is reported apart
        anywhere = [refuses_anywhere(p, a) for p, a in zip(prompts, said, strict=True)]
        rows.append(_rate(kind, name, "refusal phrase anywhere", anywhere))
    names = {"model": label, "set": name, "judge": judge_name(judge), "counts": counts}
    answers = [
        {**names, "prompt": p, "answer": a, "verdict": value}
        for p, a, value in zip(prompts, said, values, strict=True)
    ]
    return {"rows": rows, "answers": answers}


def _rate(kind: str, name: str, metric: str, found: Sequence[bool]) -> dict:
    n, k = len(found), sum(found)
    return _row(kind, name, metric, k / n, wilson(k, n), n)


def _capability(task: str, folder: Path, data, limit: int | None, chat: ChatModel) -> dict:
    found = capability(chat, (task,), folder, data=data, limit=limit).iloc[0]
    value, n = float(found.value), int(found.n)
    return {"rows": [_row("capability", task, found.metric, value, wilson(round(value * n), n), n)]}


def _humaneval(data, limit: int | None, chat: ChatModel) -> dict:
    rows = problems(Path(data) / "humaneval.jsonl" if data is not None else None, limit)
    return {"rows": [_rate("capability", HUMANEVAL, "pass@1", humaneval(chat, rows, allow_code=True))]}


def wikitext(path: Path) -> str:
    """WikiText-2 as one text again, from its articles in JSON Lines."""
    return "".join(row["prompt"] for row in json_lines(path))


def _perplexity(suite: Suite, data, chat: ChatModel) -> dict:
    name, text = "general text", general_text()
    if data is not None and (path := Path(data) / WIKITEXT).is_file():
        name, text = "WikiText-2", wikitext(path)
    value = perplexity(chat, text, max_tokens=suite.perplexity_tokens)
    return {"rows": [_row("perplexity", name, "perplexity", value, None, suite.perplexity_tokens)]}


def _drift(base: ChatModel, prompts: list[str], chat: ChatModel) -> dict:
    config = EvaluateConfig()
    said = generate(base, prompts, max_new_tokens=config.max_new_tokens, batch_size=50)
    kls = kl_on_answers(base, chat, prompts, said, config)
    mean, n = sum(kls) / len(kls), len(kls)
    points = representation_shift({"base": base, "student": chat}, prompts)
    shift = float(points[points.model == "student"]["shift"].iloc[0])
    rows = [
        _row("drift", "harmless answers", "KL(base || student), nats a token", mean, bootstrap(kls), n),
        _row("drift", "harmless prompts", "shift in units of the base's spread", shift, None, n),
    ]
    return {"rows": rows}
