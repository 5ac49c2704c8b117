"""The main path: from a model to an aligned checkpoint and a report.

1. direction   find the direction that makes the model refuse; added, it turns the base into the teacher
2. tokens      select the output tokens that steering moves
3. distill     teach the model on those tokens alone
4. export      write a plain Hugging Face model, reloaded once in a fresh process
5. evaluate    measure base, teacher and student on the test split, and on prompts of other forms
6. explain     say why these tokens, how much they cover, how stable they are
7. report      show all of it on one offline page

Each stage loads files of the run folder, calls one function of the library and saves what it returns. It is
skipped where its files are complete, so an interrupted run continues.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from rich.console import Console

from safesteer import recipes
from safesteer._clock import staged
from safesteer._errors import SafeSteerError
from safesteer._files import locked, write_json_lines, write_text
from safesteer.attribution.explanation import explain
from safesteer.attribution.grid import GRID_FILE, MAX_NEW_TOKENS, answer_grid
from safesteer.directions.finding import find_direction
from safesteer.directions.reader_fitting import fit_reader
from safesteer.directions.shifts import SHIFT_FILE, shift_along
from safesteer.distillation.loop import Student, Training, restore_student, train_student
from safesteer.distillation.rollouts import trained_prompts
from safesteer.evaluation.dial import keep_rows_of
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.robust import measured
from safesteer.evaluation.scores import evaluate
from safesteer.evaluation.sets import check_sets, rows_folder, score_sets
from safesteer.exporting import check_reload, export, rounding_note
from safesteer.judges.judge import Judge
from safesteer.judges.sentences import declines
from safesteer.judges.wording import refuses
from safesteer.model_card import CARD, write_card
from safesteer.models.adapter import put_back, without_adapter
from safesteer.models.chat_model import ChatModel, ModelLike
from safesteer.models.placement import is_offloaded
from safesteer.models.precision import cast_weights, in_precision_of, settled_precision, weight_dtype
from safesteer.models.processes import share_work
from safesteer.models.sharding import on_cpu, require_processes
from safesteer.prompts.prompt_set import LABELS, PromptSet, load_prompts
from safesteer.report.page import write_report
from safesteer.report.reader_figures import READER_FILE, READER_SCORES_FILE
from safesteer.report.set_table import SET_ANSWERS_FILE, SETS_FILE, set_lines
from safesteer.run_folder import STAGES, Run, check_base, is_due, model_source, open_run, record_stage
from safesteer.tokens.selection import select_tokens

SHARED = ("direction", "tokens", "distill", "evaluate")  # stages in which every process takes part


def align(
    model: str | Path | ModelLike = "smollm2-135m",
    out: str | Path = "run",
    recipe: recipes.Recipe | None = None,
    *,
    prompts: PromptSet | None = None,
    judge: Judge | None = None,
    stages: tuple[str, ...] = STAGES,
    track: str | None = None,
    console: Console | None = None,
) -> Path:
    """Align a model and write the run folder `out`; return its path.

    An interrupted run of the same settings continues. Under torchrun or accelerate launch the processes share
    prompts and answers of the stages direction, tokens, distill and evaluate; the first one does everything
    else, and writes.

    Args:
        model: What `load_model` takes by name (a Hub id, a folder, a GGUF file, "smollm2-135m",
            "qwen2.5-coder-0.5b"), or an open model, which stays as it is.
        out: The run folder.
        recipe: Settings (`safesteer.recipe`, `Recipe.load`); None: the preset "quick". The preset "paper"
            becomes that of the model's family.
        prompts: Prompts with the splits train, val, distill and test; None: the project's own.
        judge: Says which answers refuse; None: the direction is chosen by how answers open (`refuses`), and
            the test prompts are judged by their sentences (`declines`).
        stages: Of "direction", "tokens", "distill", "export", "evaluate", "explain" and "report".
        track: A tracker of accelerate (tensorboard, wandb, ...) that follows the distillation.
        console: Where to print; None: the terminal.

    Raises:
        SafeSteerError: For an unknown stage, a template for an open model, a folder of other settings, or
            a second run at work in it; for an open model that a device map has spread.
    """
    for stage in stages:
        if stage not in STAGES:
            raise SafeSteerError(f"Unknown stage '{stage}': use some of {', '.join(STAGES)}.")
    recipe = recipe or recipes.recipe()
    prompts = prompts or load_prompts(recipe.prompts)
    if recipe.distill.sharded:
        require_processes()
        if recipe.device_map:
            raise SafeSteerError(
                "device_map spreads the model of one process, distill.sharded one over processes: choose one."
            )
    for name in ("train", "val", "test"):  # what is missing is reported before any work
        prompts.split(name).require_kinds()
    trained_prompts(prompts, recipe.distill)
    check_sets(recipe.evaluate.sets, rows_folder(recipe.evaluate))
    judges, source = (judge or refuses, judge or declines), model_source(model, recipe)
    run = Run(Path(out), source, recipe, prompts, *judges, console or Console(), track)
    base = run.load_base() if isinstance(source, str) else source
    check_base(run, base, trains="distill" in stages)
    processes = PartialState(cpu=base.device.type == "cpu")
    first = processes.is_main_process
    run = replace(run, console=run.console if first else Console(quiet=True))
    run = replace(run, recipe=_for_family(recipe, base, run.console))
    with locked(run.path) if first else nullcontext():
        if first:
            open_run(run, base)
            _say_precision(run)
        for stage in (s for s in STAGES if s in stages):
            processes.wait_for_everyone()  # all see the same manifest
            due = is_due(run, stage)
            processes.wait_for_everyone()
            if not due or not (first or stage in SHARED):
                continue
            run.console.print(f"[bold]{stage}[/bold]", highlight=False)
            started = time.perf_counter()
            with staged(stage):
                written = _RUN[stage](run, base)
                if first:
                    record_stage(run, stage, written, time.perf_counter() - started)
        processes.wait_for_everyone()
    return run.path


def _for_family(recipe: recipes.Recipe, base: ChatModel, console: Console) -> recipes.Recipe:
    """Choose among the authors' presets by the model, and say which."""
    kind = base.config.model_type
    chosen = recipes.for_family(recipe, kind)
    if chosen != recipe:
        known = kind.startswith(("qwen", "llama"))
        why = f"the model is of type '{kind}'" + ("" if known else ", for which the authors have no values")
        console.print(f"The preset paper is {chosen.preset} here: {why}.", highlight=False)
    return chosen


def _say_precision(run: Run) -> None:
    """Say which precision "auto" is in this run, and why: by this machine, or as the run began."""
    both = {"distill.precision": (run.recipe.distill.precision, run.settled.distill.precision)}
    if isinstance(run.model, str):  # an open model has its precision
        both = {"dtype": (run.recipe.dtype, run.settled.dtype)} | both
    chosen = {name: precision for name, (word, precision) in both.items() if word == "auto"}
    if not chosen:
        return
    here, device = settled_precision("auto", run.device), run.device.type
    why = f"the fast one of this {device}"
    if set(chosen.values()) != {here}:
        why = f"the run began with it, where this {device} would take {here}"
    precisions, names = " and ".join(dict.fromkeys(chosen.values())), ", ".join(chosen)
    run.console.print(f"The precision auto is {precisions} here ({names}): {why}.", highlight=False)


def _direction(run: Run, base: ChatModel) -> list[str]:
    """Stage 1: the direction, with every candidate it was chosen from."""
    with share_work(), run.progress("finding the direction") as progress:
        direction = find_direction(
            base, run.prompts, run.recipe.direction, judge=run.chooser, progress=progress
        )
    if not PartialState().is_main_process:
        return []
    direction.refusal_tokens.save(run.path / "refusal_tokens.csv")
    direction.sweep.save(run.path / "sweep.csv")
    direction.save(run.path / "direction.safetensors")
    written = ["refusal_tokens.csv", "sweep.csv", "direction.safetensors"]
    if direction.rates is not None:
        write_text(run.path / "calibration.csv", direction.rates.to_csv(index=False))
        written.append("calibration.csv")
    for line in direction.story():
        run.say(line)
    if run.recipe.preset == "quick" and direction.native_share >= run.recipe.direction.native_share:
        run.say("for a model that refuses by itself there is a preset of its own: --preset two-sided")
    return written + _write_reader(run, base)


def _write_reader(run: Run, base: ChatModel) -> list[str]:
    """Fit a reader of harmfulness on the prompts that train, for gated steering, and score val with it."""
    val = run.prompts.split("val")
    try:
        reader = fit_reader(base, run.prompts.split("train", "distill"))
    except SafeSteerError as error:
        run.say(f"no reader of harmfulness: {error}")
        return []
    reader.save(run.path / READER_FILE)
    scores = [{"label": label, "score": x} for label in LABELS for x in reader.scores(base, val.texts(label))]
    write_text(run.path / READER_SCORES_FILE, pd.DataFrame(scores).round(4).to_csv(index=False))
    run.say(reader)
    return [READER_FILE, READER_SCORES_FILE]


def _tokens(run: Run, base: ChatModel) -> list[str]:
    """Stage 2: the safety tokens."""
    texts = run.prompts.split("val").texts(run.recipe.tokens.prompts)
    with share_work():
        tokens = select_tokens(base, run.load_direction(base), texts, run.recipe.tokens)
    if not PartialState().is_main_process:
        return []
    tokens.save(run.path / "tokens.json")
    run.say(tokens)
    return ["tokens.json"]


def _distill(run: Run, base: ChatModel) -> list[str]:
    """Stage 3: the history and the trained weights, as a checkpoint."""
    if not run.recipe.distill.sharded:
        return _train(run, base, "auto")
    with on_cpu(base.model):  # other stages need it; meanwhile the device holds shares of a second one
        return _train(run, run.load_base(device="cpu"), "cpu")


def _train(run: Run, base: ChatModel, device: str) -> list[str]:
    config = run.settled.distill
    # An adapter sits on the base itself; full fine-tuning needs weights of its own.
    student = None if config.lora_rank else run.load_base(dtype="float32", device=device)
    with put_back(base.model), run.progress("distilling") as progress:
        training = Training(run.path, run.track, run.chooser, progress)
        state, history = train_student(run.load_teacher(base), run.prompts, config, student, training)
    if config.lora_rank:
        without_adapter(state.student)
    run.say(repr(Student(base.model, base.tokenizer, base.name, history=history)))
    return ["history.jsonl", "checkpoint.safetensors"]


def _export(run: Run, base: ChatModel) -> list[str]:
    """Stage 4: a plain Hugging Face folder that is proven to reload."""
    config, trust = run.settled.distill, run.recipe.trust_remote_code
    weights, dtype = _weights_to_export(run)
    student = restore_student(weights, run.load_teacher(base), run.prompts, config, run.path)
    export(student, run.path / "model", dtype=dtype, replace=True)
    if note := rounding_note(base, student, dtype):
        run.say(note)
    device_map = "disk" if is_offloaded(student.model) else None
    difference = check_reload(run.path / "model", trust_remote_code=trust, device_map=device_map)
    run.say(f"reloaded in a fresh process: logits differ by at most {difference:.1g}")
    if run.recipe.quantize:
        run.say("not quantized: it differs from the student that was trained by the rounding of the base")
    folders = ["model"] + (["adapter"] if config.lora_rank and config.keep_adapter else [])
    files = (path for folder in folders for path in (run.path / folder).rglob("*") if path.is_file())
    return sorted(path.relative_to(run.path).as_posix() for path in files)


def _weights_to_export(run: Run) -> tuple[ChatModel, torch.dtype | str]:
    """Load the base anew, to put what was trained into it; and say in which precision it is written."""
    dtype = run.recipe.export.dtype
    if run.recipe.device_map and run.recipe.distill.lora_rank:  # the adapter is added while weights are read
        weights = run.load_base(dtype="auto" if dtype == "base" else dtype, device_map="disk")
        return weights, weight_dtype(weights.model)
    # A device that holds the base in 4 bits, or a part of it, may have no room for all of it in 16.
    apart = run.recipe.quantize or run.recipe.device_map
    weights = run.load_base(dtype="auto", device="cpu" if apart else "auto", device_map=None)
    stored = weight_dtype(weights.model)
    cast_weights(weights.model, torch.float32)
    return weights, stored if dtype == "base" else dtype


def _evaluate(run: Run, base: ChatModel) -> list[str]:
    """Stage 5: scores and answers of base, teacher and student, and the model card that names them."""
    direction, config, student = run.load_direction(base), run.recipe.evaluate, run.load_student()
    with share_work(), run.progress("evaluating") as progress:
        evaluation = evaluate(
            base, student, direction, run.prompts, config, judge=run.judge, progress=progress
        )
    table, answers = _score_sets(run, base, student)
    if not PartialState().is_main_process:
        return []
    evaluation.save(run.path)
    n = evaluation.scores["base"].n
    log_look(run.path, base, "test", n, "stage evaluate: base and teacher")
    log_look(run.path, student, "test", n, "stage evaluate")
    with in_precision_of(base, student):
        shift = shift_along(base, direction, run.prompts.split("val"), student)
    write_text(run.path / SHIFT_FILE, shift.round(6).to_csv(index=False))
    _write_sets(run, {"base": base, "student": student}, table, answers)
    robust = measured(run.path / "suite-robust", student)
    keep_rows_of(run.path, student)
    write_card(
        run.path / "model",
        base,
        direction,
        run.settled.to_toml(),
        evaluation.scores,
        table,
        run.judge,
        robust,
    )
    for line in evaluation.lines():
        run.say(line)
    return ["evaluation.json", "answers.jsonl", SHIFT_FILE, SETS_FILE, SET_ANSWERS_FILE, f"model/{CARD}"]


def _score_sets(run: Run, base: ChatModel, student: ChatModel) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Score base and student on prompts of other forms and of other people."""
    models = {"base": base, "student": student}
    with share_work(), run.progress("other prompts") as progress, in_precision_of(base, student):
        return score_sets(models, run.recipe.evaluate, run.judge, say=run.say, progress=progress)


def _write_sets(
    run: Run, models: dict[str, ChatModel], table: pd.DataFrame, answers: list[dict[str, Any]]
) -> None:
    """Write what was scored on other prompts, and who looked at them."""
    for label, chat in models.items():
        for name, n in Counter(a["set"] for a in answers if a["model"] == label).items():
            log_look(run.path, chat, name, n, "stage evaluate")
    write_text(run.path / SETS_FILE, table.to_csv(index=False))
    write_json_lines(run.path / SET_ANSWERS_FILE, answers)
    for line in set_lines(table):
        run.say(line)


def _explain(run: Run, base: ChatModel) -> list[str]:
    """Stage 6: why these tokens, and answers as the direction moves."""
    parts = base, run.load_direction(base), run.load_tokens(), run.load_student()
    val, config, answers = run.prompts.split("val"), run.recipe.explain, run.load_answers()
    with run.progress("explaining") as progress:
        attribution = explain(*parts, prompts=val, answers=answers, config=config, progress=progress)
    attribution.save(run.path / "attribution.json")
    shown, n_tokens = [*val.harmful[:1], *val.harmless[:2]], min(MAX_NEW_TOKENS, config.max_tokens)
    with run.progress("moving the direction") as progress:
        grid = answer_grid(*parts, prompts=shown, max_new_tokens=n_tokens, progress=progress)
    grid.save(run.path / GRID_FILE)
    return ["attribution.json", GRID_FILE]


def _report(run: Run, base: ChatModel) -> list[str]:
    """Stage 7: one offline page."""
    write_report(run.path)
    return ["report.html"]


_RUN: dict[str, Callable[[Run, ChatModel], list[str]]] = dict(
    zip(STAGES, (_direction, _tokens, _distill, _export, _evaluate, _explain, _report), strict=True)
)
