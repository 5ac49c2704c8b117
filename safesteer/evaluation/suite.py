"""A suite: one table with intervals of refusals, over-refusals, capability, drift and perplexity.

It measures one model, or base and student of a run:

    quick   32 pairs of the test split; no capability
    small   the 100 test pairs and 450 prompts of other forms; up to 150 prompts each of public harmful sets,
            XSTest's safe prompts and everyday instructions, where they can be had; 200 rows each of ARC-Easy,
            PIQA and LAMBADA
    paper   the paper's benchmarks and tasks, whole
    robust  how deep refusals go: answers opened for the model, wrapped requests, changed weights (`robust`)

Beside every rate of the first three stands the text quality of those answers. Base and
student answer the same prompts, so changes between them come with a paired interval and McNemar's test.

Drift is KL(base || student) along the base's answers to harmless prompts, and the shift of the final hidden
state at the last prompt position in units of the base's spread (paper, Figure 3).

The folder holds `suite.json` (what is measured on which models; a folder of another suite is refused),
`parts/` (a file per model and measurement, written when it is done, so that an interrupted suite continues),
`results.json`, `results.csv`, `results.html` and `suite_answers.jsonl`. Of the answers that "robust" draws
out of a model only verdicts are written.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from safesteer._errors import SafeSteerError
from safesteer._files import digest, locked, read_json, write_json, write_json_lines, write_text
from safesteer._intervals import bootstrap, wilson
from safesteer.directions.shifts import representation_shift
from safesteer.evaluation.capability import HUMANEVAL, check_rows, measure_capability
from safesteer.evaluation.capability import KNOWN as TASKS
from safesteer.evaluation.humaneval import problems, run_humaneval
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.robust import MAY_FAIL, Robustness, Subject, parts_of
from safesteer.evaluation.rows import change_row, rate, row
from safesteer.evaluation.sets import COLUMNS, OWN, PAIRS, PUBLIC, check_sets, score_set, set_prompts
from safesteer.evaluation.targets import PROBE, acting_on, load_target, run_of
from safesteer.judges.judge import Judge, judge_identity
from safesteer.judges.sentences import declines
from safesteer.models.chat_model import ChatModel, ModelLike
from safesteer.models.drift import kl_on_answers
from safesteer.models.generation import generate, greedy_ids
from safesteer.models.hashing import weights_hash
from safesteer.models.text_loss import WIKITEXT, general_text, perplexity, wikitext
from safesteer.prompts.benchmarks import KNOWN
from safesteer.prompts.prompt_set import load_prompts
from safesteer.report.page import suite_page
from safesteer.settings import EvaluateConfig

NEW_KEYS = ("weights", "first words", "acting", "rows")  # of a folder: earlier versions wrote none


@dataclass(frozen=True)
class Suite:
    """What is measured. `n_prompts` of each set of prompts and `n_rows` of each task (None: all)."""

    sets: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    where_there: tuple[str, ...] = ()  # sets that are left out, with a word, where they cannot be loaded
    n_prompts: int | None = None
    n_rows: int | None = None
    max_new_tokens: int = 128
    perplexity_tokens: int = 16384
    robust: Robustness | None = None

    def described(self) -> dict[str, Any]:
        """Return what is measured, as a folder holds it."""
        values = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in values.items() if name != "robust" or value}


SUITES = {
    "quick": Suite(tuple(PAIRS), n_prompts=32, perplexity_tokens=4096),
    "small": Suite(tuple(OWN), ("arc_easy", "piqa", "lambada_openai"), PUBLIC, n_prompts=150, n_rows=200),
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
    "robust": Suite((), n_prompts=24, perplexity_tokens=4096, robust=Robustness()),
}


@dataclass(frozen=True, eq=False)
class _Job:
    """A suite on some models: what its measurements share."""

    suite: Suite
    models: dict[str, ChatModel]
    folder: Path
    data: Path | None
    judge: Judge


Measure = Callable[[ChatModel], dict[str, Any]]


def run_suite(
    target: str | Path | ModelLike,
    suite: str | Suite = "quick",
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    judge: Judge = declines,
    allow_code: bool = False,
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure a model, or base and student of a run.

    Args:
        target: A run folder, a model's Hub id or folder, or an open model.
        suite: "quick", "small", "paper", "robust", or one of your own.
        out: The folder to write or to continue; None: `suite-NAME`, in the run folder if there is one.
        data: A folder of local benchmark rows; None: the Hub's.
        judge: Says which answers refuse, or are harmful.
        allow_code: Measure HumanEval, which runs what the model wrote, confined.
        console: Where to print what is measured; None: the terminal.

    Returns:
        A row per number: model, kind, name, metric, value, low, high (95 %), n.

    Raises:
        SafeSteerError: For an unknown suite, a run without a trained model, one prompt for a run's drift, or
            a folder of another suite.

    Example:
        >>> ss.run_suite("runs/demo")[["model", "name", "metric", "value"]].head(3)  # doctest: +SKIP
             model          name                   metric    value
        0     base   own-harmful                  refused  0.09375
        1     base   own-harmful     opens with a refusal  0.15625
        2     base  own-harmless                  refused  0.06250
    """
    if isinstance(suite, str) and suite not in SUITES:
        raise SafeSteerError(f"Unknown suite '{suite}': use one of {', '.join(SUITES)}.")
    name, selected = (suite, SUITES[suite]) if isinstance(suite, str) else ("custom", suite)
    run = run_of(target)
    folder = Path(out) if out else (run or Path()) / f"suite-{name}"
    console = console or Console()
    if HUMANEVAL in selected.tasks and not allow_code:
        console.print("HumanEval runs what the model writes, and is left out unless you allow it.")
        selected = replace(selected, tasks=tuple(t for t in selected.tasks if t != HUMANEVAL))
    data = None if data is None else Path(data)
    check_sets(selected.sets, data)
    check_rows(selected.tasks, data)
    if run is not None and selected.n_prompts == 1:
        raise SafeSteerError("The drift of a student is measured over prompts: n_prompts must be at least 2.")
    models = load_target(target, run)
    job = _Job(selected, models, folder, data, judge)
    with locked(folder):
        _check_folder(job)
        rows = [*_measure(job, console), *_changes(job)]
        title = target if isinstance(target, str | Path) else models["model"].name
        return _write(job, rows, f"{title}: suite {name}")


def _check_folder(job: _Job) -> None:
    """Write what is measured into a new folder, or compare it with what the folder holds."""
    ours = {
        "suite": job.suite.described(),
        "judge": judge_identity(job.judge),
        "data": None if job.data is None else str(job.data.resolve()),
        "models": {label: chat.fingerprint for label, chat in job.models.items()},
        "weights": {label: weights_hash(chat.model) for label, chat in job.models.items()},
        # Of the template, thinking and steering, too.
        "first words": {label: generate(chat, PROBE, max_new_tokens=8) for label, chat in job.models.items()},
        "acting": {label: acting_on(chat) for label, chat in job.models.items()},
        "rows": {file.name: digest(file) for file in _row_files(job)},
    }
    path = job.folder / "suite.json"
    if not path.exists():
        write_json(path, ours)
        return
    theirs = {name: ours[name] for name in NEW_KEYS} | read_json(path)  # what earlier versions lack
    different = [k for k, v in ours.items() if theirs.get(k) != v]
    if different:
        raise SafeSteerError(
            f"{job.folder} holds an evaluation with another {', '.join(different)}: choose another folder,"
            " or delete it to start again."
        )


def _row_files(job: _Job) -> Iterator[Path]:
    """Yield the files of local rows that the suite reads."""
    if job.data is None:
        return
    sets = [KNOWN[name].file for name in (*job.suite.sets, *job.suite.where_there) if name in KNOWN]
    tasks = [TASKS[name].file for name in job.suite.tasks if name in TASKS]
    for name in sorted({file for file in (*sets, *tasks, f"{HUMANEVAL}.jsonl", WIKITEXT) if file}):
        if (job.data / name).is_file():
            yield job.data / name


def _measure(job: _Job, console: Console) -> list[dict[str, Any]]:
    """Make the parts that are missing; return the rows of all."""
    rows = []
    for label, chat in job.models.items():
        for item, measure in _measurements(job, label):
            part = job.folder / "parts" / f"{label}--{item}.json"
            if not part.exists():
                console.print(f"{label}: {item}", highlight=False)
                try:
                    write_json(part, measure(chat))
                except SafeSteerError as error:
                    if item not in (*job.suite.where_there, *MAY_FAIL):
                        raise
                    console.print(f"  left out: {error}", highlight=False, markup=False)
                    continue
            rows += [{"model": label, **row} for row in read_json(part)["rows"]]
    return rows


def _write(job: _Job, rows: list[dict[str, Any]], title: str) -> pd.DataFrame:
    """Write the results in every form; return the table."""
    table, parts = pd.DataFrame(rows, columns=COLUMNS), sorted((job.folder / "parts").glob("*.json"))
    write_json(job.folder / "results.json", {"suite": job.suite.described(), "rows": rows})
    write_text(job.folder / "results.csv", table.to_csv(index=False))
    write_text(job.folder / "results.html", suite_page(table, title))
    answers = [answer for part in parts for answer in read_json(part).get("answers", [])]
    write_json_lines(job.folder / "suite_answers.jsonl", answers)
    return table


def _measurements(job: _Job, label: str) -> Iterator[tuple[str, Measure]]:
    """Yield (name of the part, function that makes it) for one model."""
    suite, data = job.suite, job.data
    for name in (*suite.sets, *suite.where_there):
        yield name, partial(_refusals, job, label, name)
    for task in suite.tasks:
        if task == HUMANEVAL:
            yield task, partial(_humaneval, data, suite.n_rows)
        else:
            yield task, partial(_capability, task, job.folder / "tasks", data, suite.n_rows)
    if suite.robust is not None:
        base = job.models["base"] if label == "student" else None
        subject = Subject(job.models[label], base, suite.robust, job.judge)
        for name, part in parts_of(subject):
            yield name, partial(_robust, job, f"robust: {name} of {label}", part, suite.robust.n_harmful)
    yield "perplexity", partial(_perplexity, suite, data)
    if label == "student":
        prompts = load_prompts().split("test").across(suite.n_prompts).harmless
        yield "drift", partial(_drift, job.models["base"], prompts)


def _changes(job: _Job) -> list[dict[str, Any]]:
    """Make a row per set of prompts, task and cell that both models have answered: how the rate changed."""
    if "student" not in job.models:
        return []
    rows = []
    for name, _ in _measurements(job, "student"):
        parts = [job.folder / "parts" / f"{label}--{name}.json" for label in ("base", "student")]
        if all(part.exists() for part in parts):
            before, after = (_judged(read_json(part)) for part in parts)
            if before and after:
                rows.append({"model": "student", **change_row(name, before, after)})
    return rows


def _judged(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a part holds per prompt or task: verdicts with what they count."""
    return next((part[key] for key in ("answers", "correct", "verdicts") if part.get(key)), [])


def _robust(
    job: _Job, why: str, part: Callable[[], dict[str, Any]], n: int, chat: ChatModel
) -> dict[str, Any]:
    """Measure a part of the robustness, and write the look into the ledger."""
    made = part()
    log_look(job.folder, chat, "test", n, why)
    return made


def _refusals(job: _Job, label: str, name: str, chat: ChatModel) -> dict[str, Any]:
    """Judge greedy answers to a set of prompts, and write the look into the ledger."""
    prompts = set_prompts(name, job.data, job.suite.n_prompts)
    scored = score_set(chat, name, prompts, job.judge, max_new_tokens=job.suite.max_new_tokens)
    log_look(job.folder, chat, name, len(prompts), f"suite of {label}")
    return {"rows": scored["rows"], "answers": [{"model": label, **row} for row in scored["answers"]]}


def _capability(
    task: str, folder: Path, data: Path | None, limit: int | None, chat: ChatModel
) -> dict[str, Any]:
    """Measure a task of the harness."""
    result = measure_capability(chat, (task,), folder, data=data, limit=limit).iloc[0]
    value, n = float(result.value), int(result.n)
    made = row("capability", task, result.metric, value, wilson(round(value * n), n), n)
    correct = [{"counts": result.metric, "verdict": right} for right in result.correct]
    return {"rows": [made], "correct": correct}


def _humaneval(data: Path | None, limit: int | None, chat: ChatModel) -> dict[str, Any]:
    """Measure HumanEval; the caller has allowed it."""
    rows = problems(None if data is None else data / "humaneval.jsonl", limit)
    passed = run_humaneval(chat, rows, allow_code=True)
    correct = [{"counts": "pass@1", "verdict": bool(right)} for right in passed]
    return {"rows": [rate("capability", HUMANEVAL, "pass@1", passed)], "correct": correct}


def _perplexity(suite: Suite, data: Path | None, chat: ChatModel) -> dict[str, Any]:
    """Measure the perplexity of WikiText-2 where it is at hand, else of the project's own prose."""
    name, text = "general text", general_text()
    if data is not None and (data / WIKITEXT).is_file():
        name, text = "WikiText-2", wikitext(data)
    value = perplexity(chat, text, max_tokens=suite.perplexity_tokens)
    n = min(suite.perplexity_tokens, len(chat.encode(text)))
    return {"rows": [row("perplexity", name, "perplexity", value, None, n)]}


def _drift(base: ChatModel, prompts: list[str], chat: ChatModel) -> dict[str, Any]:
    """Measure how far the student is from the base on harmless prompts."""
    config = EvaluateConfig()
    answers = greedy_ids(base, prompts, config.n_kl_tokens, batch_size=50)
    kls = kl_on_answers(
        base, chat, prompts, answers, n_tokens=config.n_kl_tokens, batch_size=config.batch_size
    )
    mean, n = sum(kls) / len(kls), len(kls)
    points = representation_shift({"base": base, "student": chat}, prompts)
    shift = float(points[points.model == "student"]["shift"].iloc[0])
    rows = [
        row("drift", "harmless answers", "KL(base || student), nats a token", mean, bootstrap(kls), n),
        row("drift", "harmless prompts", "shift in units of the base's spread", shift, None, n),
    ]
    return {"rows": rows}
