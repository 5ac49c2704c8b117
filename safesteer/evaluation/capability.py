"""Capability by EleutherAI's lm-evaluation-harness, in this process (extra `eval`).

Prompts, metrics and the extraction of answers are the harness's. Without a network the rows come from local
JSON Lines files: each is rewritten in the columns of the harness's own data set, beside a task file that
includes the harness's and changes nothing but where the rows are. The same files serve the harness's own
command line (`lm_eval --include_path`), which gives the same numbers.

Tasks that ask a question go through the chat template; continuations of plain text do not. Without a
network IFEval also needs nltk's `punkt_tab`, where NLTK_DATA says it is.
"""

import copy
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from safesteer._errors import SafeSteerError, first_line
from safesteer._files import json_lines, write_text
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.parts import hf_model
from safesteer.models.templates import leaves_thinking_out


@dataclass(frozen=True)
class Task:
    """A task of the harness: its name, the metric that is reported, whether the chat template is on.

    `file` holds local rows, and `row` rewrites one in the columns of the harness's data set. `harness` is the
    harness's own task file, within its folder of tasks; `shots` is the number of worked examples before each
    question: none but where that file has them written out, so that local rows and the Hub's give one task.
    `description` is what stands before the question, where the harness has a file per subject for it.
    """

    name: str
    metric: str
    chat: bool
    file: str
    harness: str
    row: Callable[[dict], dict]
    shots: int = 0
    description: str = ""


def _arc(r: dict) -> dict:
    """Rewrite a row of ARC."""
    labels = ["A", "B", "C", "D", "E"][: len(r["choices"])]
    choices = {"text": r["choices"], "label": labels}
    return {"question": r["prompt"], "choices": choices, "answerKey": labels[r["answer"]]}


def _piqa(r: dict) -> dict:
    """Rewrite a row of PIQA."""
    return {"goal": r["prompt"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["answer"]}


def _mmlu(r: dict) -> dict:
    """Rewrite a row of MMLU; the harness names the subject before the question."""
    subject = r.get("category", "many subjects").replace("_", " ")
    return {"question": r["prompt"], "choices": r["choices"], "answer": r["answer"], "subject": subject}


def _ifeval(r: dict) -> dict:
    """Rewrite a row of IFEval; the JSON reader wants the same keys in every row."""
    names = IFEVAL_ARGUMENTS.split()
    kwargs = [{n: arguments.get(n) for n in names} for arguments in r["tests"]["kwargs"]]
    ids = r["tests"]["instruction_id_list"]
    return {"key": r["id"], "prompt": r["prompt"], "instruction_id_list": ids, "kwargs": kwargs}


HUMANEVAL = "humaneval"  # no task of the harness here: see `evaluation.humaneval`
IFEVAL_ARGUMENTS = """
    relation num_words num_sentences num_paragraphs nth_paragraph first_word num_placeholders
    postscript_marker num_bullets num_highlights section_spliter num_sections keyword keywords
    frequency forbidden_words letter let_frequency let_relation language prompt_to_repeat end_phrase
    capital_frequency capital_relation
"""

TASKS = (
    Task("arc_easy", "acc", True, "arc_easy.jsonl", "arc/arc_easy.yaml", _arc),
    Task("piqa", "acc", True, "piqa_val.jsonl", "piqa/piqa.yaml", _piqa),
    Task(
        "lambada_openai",
        "acc",
        False,
        "lambada_openai.jsonl",
        "lambada/lambada_openai.yaml",
        lambda r: {"text": f"{r['prompt']} {r['answer']}"},
    ),
    Task(
        "mmlu_stem",
        "acc",
        True,
        "mmlu_stem.jsonl",
        "mmlu/default/_default_template_yaml",
        _mmlu,
        description="The following are multiple choice questions (with answers) about {{subject}}.\n\n",
    ),
    Task(
        "gsm8k",
        "exact_match,flexible-extract",
        True,
        "gsm8k_test.jsonl",
        "gsm8k/gsm8k.yaml",
        lambda r: {"question": r["prompt"], "answer": r["solution"]},
    ),
    Task(
        "minerva_math500",
        "math_verify",
        True,
        "math500.jsonl",
        "minerva_math/minerva_math500.yaml",
        lambda r: {"problem": r["prompt"], "solution": f"\\boxed{{{r['answer']}}}"},
        shots=4,
    ),
    Task("ifeval", "prompt_level_strict_acc", True, "ifeval.jsonl", "ifeval/ifeval.yaml", _ifeval),
)
KNOWN = {task.name: task for task in TASKS}


def task_named(name: str) -> Task:
    """Return a task by its name; raises SafeSteerError for an unknown one."""
    if name not in KNOWN:
        raise SafeSteerError(f"Unknown capability task '{name}': use some of {', '.join(KNOWN)}.")
    return KNOWN[name]


def local_name(task: Task) -> str:
    """Return the name of the task file that reads local rows."""
    return f"{task.name}_local"


def check_rows(names: Sequence[str], data: Path | None) -> None:
    """Check that tasks can be measured, before an hour has gone into what comes before them.

    Raises:
        SafeSteerError: For a task that there is not, or whose rows the folder of data does not hold; where
            a task needs the extra `eval` and it is missing.
    """
    files = {name: f"{name}.jsonl" if name == HUMANEVAL else task_named(name).file for name in names}
    for name, file in files.items():
        if data is not None and not (data / file).is_file():
            raise SafeSteerError(
                f"{data} holds no {file} for the task '{name}': name another folder of data, or"
                " none to load the task from the Hub."
            )
    if files.keys() - {HUMANEVAL}:
        _require_harness()


def _require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise SafeSteerError("Capability needs the extra `eval`: pip install 'safesteer[eval]'.")


def write_tasks(folder: Path, data: Path, names: Sequence[str]) -> None:
    """Write task files over local rows, for the harness in this process and for its command line."""
    import lm_eval.tasks
    import yaml

    tasks = Path(lm_eval.tasks.__file__).parent
    check_rows(names, data)
    for task in map(task_named, names):
        source = data / task.file
        rows = folder.resolve() / f"{task.name}.jsonl"
        write_text(rows, "".join(json.dumps(task.row(r)) + "\n" for r in json_lines(source)))
        changes = {
            "include": str(tasks / task.harness),
            "task": local_name(task),
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "training_split": None,
            "validation_split": None,
            "fewshot_split": None,
            "test_split": "test",
            "num_fewshot": task.shots,
        }
        if task.description:
            changes["description"] = task.description
        write_text(folder / f"{local_name(task)}.yaml", yaml.safe_dump(changes))


def measure_capability(
    chat: ModelLike,
    names: Sequence[str],
    folder: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure `chat`, possibly inside `steer(...)`, on tasks of the harness.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        names: Tasks, of KNOWN.
        folder: Receives the task files over local rows.
        data: A folder of local rows; None: the Hub's.
        limit: Rows per task; None: all.
        batch_size: Rows per forward pass.

    Returns:
        A row per task: task, metric, value, stderr, n, and `correct`: whether each row was answered right, in
        their order, so that two models can be compared row by row.

    Raises:
        SafeSteerError: If the extra `eval` is missing, a task is unknown, or its rows cannot be read.
    """
    chat, tasks = as_chat(chat), [task_named(name) for name in names]
    _require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = Path(folder)
    if data is not None:
        write_tasks(folder, Path(data), names)
    rows = []
    # The harness draws a bar for every step and logs much: what a caller wants is the table.
    with _quiet_children(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        manager = TaskManager(include_path=str(folder) if data is not None else None)
        lm = HFLM(
            pretrained=hf_model(chat.model),
            tokenizer=copy.deepcopy(chat.tokenizer),  # the harness changes its padding
            batch_size=batch_size,
            # As everywhere else here, where the template's own defaults do not say otherwise.
            chat_template_args={"enable_thinking": False} if leaves_thinking_out(chat.tokenizer) else None,
        )
        for task in tasks:
            name = task.name if data is None else local_name(task)
            try:
                result = simple_evaluate(
                    lm,
                    tasks=[name],
                    task_manager=manager,
                    num_fewshot=task.shots,  # the same from local rows and from the Hub
                    limit=limit,
                    apply_chat_template=task.chat,
                    log_samples=True,
                    bootstrap_iters=100,
                )
            except Exception as error:  # the harness and the Hub raise whatever they like
                raise SafeSteerError(
                    f"The task '{task.name}' could not be run: {first_line(error)}"
                ) from error
            assert result is not None
            rows.append(_row(task, name, dict(result)))
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n", "correct"])


@contextmanager
def _quiet_children() -> Iterator[None]:
    """Silence child processes: the harness runs git, which complains outside of a repository."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _row(task: Task, name: str, result: dict) -> tuple[str, str, float, float, int, tuple[bool, ...]]:
    """Read a task's row of the table from the harness's result."""
    metric, _, filtered = task.metric.partition(",")
    key = f"{metric},{filtered or 'none'}"
    scores = result["results"].get(name) or result["groups"][name]
    stderr = scores.get(f"{metric}_stderr,{filtered or 'none'}")
    counts = [n["effective"] for n in result["n-samples"].values()]
    stderr = float(stderr) if isinstance(stderr, int | float) else float("nan")
    samples = [s for part in result["samples"].values() for s in part]
    used = [s for s in samples if s.get("filter", "none") == (filtered or "none")]
    correct = tuple(bool(s[metric]) for s in used)
    return task.name, metric, float(scores[key]), stderr, sum(counts), correct
