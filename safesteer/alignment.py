"""The main path: from a model's name to an aligned checkpoint and a report.

1. direction    read candidates from residual streams (through a TransformerBridge), score them,
                select one; it turns the base into the teacher
2. tokens       find the output tokens that steering moves
3. distill      teach the model on those tokens alone
then            export, evaluate, explain, report

Each stage reads and writes files of one run folder and is skipped where they are whole, so an
interrupted run continues. `manifest.json` names the files of every finished stage with their hash.
"""

import copy
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from safesteer._errors import SafeSteerError
from safesteer._files import digest, locked, write_text
from safesteer.attribution import explanation
from safesteer.directions.calibration import choose_direction
from safesteer.directions.extraction import (
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.directions.refusal_tokens import filter_by_refusal, learn_refusal_tokens, refusal_scores
from safesteer.directions.sweeping import sweep
from safesteer.distillation.loop import StepRecord, distill
from safesteer.distillation.state import prepare_student
from safesteer.distillation.tracking import tracking
from safesteer.evaluation.scores import Evaluation, evaluate, held_out_check
from safesteer.exporting import check_reload, export, write_card
from safesteer.judges.judge import CachedJudge, Judge, judge_all
from safesteer.judges.wording import refuses
from safesteer.models.adapter import merged, without_adapter, write_adapter
from safesteer.models.chat_model import ChatModel
from safesteer.models.loading import load_model, to_bridge
from safesteer.models.sharding import on_cpu, require_processes, shard
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.recipes import Recipe, quick
from safesteer.report.page import write_report
from safesteer.run_folder import STAGES, Run, finished, open_run, record_stage
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenSet

EXTRACTIONS = {
    "instruction": mean_difference,
    "prefill": prefill_contrast,
    "system": system_contrast,
    "pca": pca_difference,
    "probe": logistic_probe,
}


def align(
    model: str = "smollm2-135m",
    out: str | Path = "run",
    recipe: Recipe | None = None,
    *,
    prompts: PromptSet | None = None,
    judge: Judge = refuses,
    stages: tuple[str, ...] = STAGES,
    track: str | None = None,
    console: Console | None = None,
) -> Path:
    """Align `model` and write the run folder `out`; returns its path.

    `track` is a tracker of accelerate (tensorboard, wandb, ...) that follows the distillation.
    Under torchrun or accelerate launch all processes distil and the first one does the rest.
    Continues an interrupted run of the same settings; raises SafeSteerError for a folder of other
    settings, an unknown stage, or a second run at work in it.
    """
    for stage in stages:
        if stage not in STAGES:
            raise SafeSteerError(f"Unknown stage '{stage}': use some of {', '.join(STAGES)}.")
    chosen, pairs = recipe or quick(), prompts or load_prompts()
    if chosen.distill.sharded:
        require_processes()
    for name in ("train", "val", "distil", "test"):
        pairs.split(name)  # a missing split is reported before any work
    base = load_model(model, dtype=chosen.dtype)
    processes = PartialState(cpu=base.device.type == "cpu")
    first = processes.is_main_process
    console = (console or Console()) if first else Console(quiet=True)
    run = Run(Path(out), model, chosen, pairs, judge, console, track)
    with locked(run.path) if first else nullcontext():
        if first:
            open_run(run, base)
        for stage in (s for s in STAGES if s in stages):
            processes.wait_for_everyone()  # all see the same manifest
            done = finished(run, stage)
            processes.wait_for_everyone()
            if done or not (first or stage == "distill"):
                continue
            run.say(f"[bold]{stage}[/bold]")
            started = time.perf_counter()
            written = _RUN[stage](run, base)
            if first:
                record_stage(run, stage, written, time.perf_counter() - started)
        processes.wait_for_everyone()
    return run.path


def find_direction(run: Run, base: ChatModel) -> list[str]:
    """Stage 1: refusal_tokens.csv, sweep.csv and direction.safetensors."""
    recipe, train, val = run.recipe, run.prompts.split("train"), run.prompts.split("val")
    written = ["refusal_tokens.csv", "sweep.csv", "direction.safetensors"]
    refusal = learn_refusal_tokens(base, val.harmful, val.harmless, run.judge)
    run.say(f"  {refusal}")
    refusal.save(run.path / "refusal_tokens.csv")
    share = float((refusal_scores(base, val.harmful, refusal.ids) > 0).double().mean())
    chosen = recipe.extraction
    if chosen == "auto":
        chosen = "instruction" if share >= recipe.native_share else "prefill"
        run.say(
            f"  the model starts to refuse on {share:.0%} of harmful validation prompts: reading the"
            f" direction by {'difference of means' if chosen == 'instruction' else 'prefill contrast'}"
        )
    n = recipe.sweep.n_prompts
    prompts, selection, held_out = train.first(recipe.n_direction), val.first(n), val.after(n)
    if chosen == "instruction":
        prompts, selection = (filter_by_refusal(base, p, refusal.ids) for p in (prompts, selection))
    candidates = EXTRACTIONS[chosen](to_bridge(base), prompts, seed=recipe.seed)
    with run.progress("scoring candidates") as progress:
        found = sweep(
            base, candidates, selection, refusal.ids, recipe.sweep, held_out=held_out, progress=progress
        )
    found.save(run.path / "sweep.csv")
    ranking = found.ranking
    if recipe.coeff is None and found.rank_by == "steering":
        several = [
            candidates.direction(base, row.position, int(row.layer), prompts=prompts)
            for row in ranking.itertuples()
        ]
        with run.progress("comparing answers") as progress:
            direction, rates = choose_direction(
                base,
                several,
                val.harmful[: recipe.sweep.n_answer_prompts],
                run.judge,
                n_best=recipe.sweep.n_answered,
                progress=progress,
            )
        write_text(run.path / "calibration.csv", rates.to_csv(index=False))
        written.append("calibration.csv")
        rate = rates.refusal_rate.max()
        run.say(f"  of {len(several)} candidates compared by their answers, this one refuses {rate:.0%}")
    else:
        best = ranking.iloc[0]
        coeff = 1.0 if recipe.coeff is None else recipe.coeff
        direction = candidates.direction(base, best.position, int(best.layer), coeff=coeff, prompts=prompts)
    run.say(f"  {direction}")
    direction.save(run.path / "direction.safetensors")
    return written


def find_tokens(run: Run, base: ChatModel) -> list[str]:
    """Stage 2: tokens.json."""
    direction = Direction.load(run.path / "direction.safetensors", base)
    val = run.prompts.split("val")
    texts = val.harmless if run.recipe.tokens.prompts == "harmless" else val.harmful
    tokens = select_tokens(base, direction, texts, run.recipe.tokens)
    run.say(f"  {tokens}")
    tokens.save(run.path / "tokens.json")
    return ["tokens.json"]


def train(run: Run, base: ChatModel) -> list[str]:
    """Stage 3: history.jsonl and the trained weights, checkpointed every few steps."""
    if not run.recipe.distill.sharded:
        return _train(run, base)
    with on_cpu(base.model):  # other stages need it whole; meanwhile the device holds shares of a second one
        return _train(run, load_model(run.model, dtype=run.recipe.dtype, device="cpu"))


def _train(run: Run, base: ChatModel) -> list[str]:
    recipe, config = run.recipe, run.recipe.distill
    direction = Direction.load(run.path / "direction.safetensors", base)
    tokens = TokenSet.load(run.path / "tokens.json")
    # An adapter sits on the base itself; full fine-tuning needs weights of its own.
    loads = "cpu" if config.sharded else "auto"
    student = base if config.lora_rank else load_model(run.model, dtype="float32", device=loads)
    state = prepare_student(student, direction, config)
    if config.sharded:
        shard(base.model)
    stamp = {"recipe": recipe.hash, "tokens": digest(run.path / "tokens.json")}
    checkpoint, history = run.path / "checkpoint.safetensors", run.path / "history.jsonl"
    records: list[dict] = []
    if checkpoint.exists():
        state.load(checkpoint, stamp)
        records = [json.loads(line) for line in history.read_text().splitlines()][: state.step]
        run.say(f"  continuing after step {state.step}")
    harmful = [text for name in recipe.splits for text in run.prompts.split(name).harmful]
    harmless = [text for name in recipe.splits for text in run.prompts.split(name).harmless]
    refresh = partial(_refresh, run, direction) if config.refresh_every else None
    steps = distill(state, base, direction, tokens, harmful, harmless, config, refresh=refresh)
    first, settings = PartialState().is_main_process, {"model": run.model, **asdict(config)}
    try:
        with (
            run.progress("distilling", total=float(config.n_steps)) as progress,
            tracking(run.track, run.path / "tracking", settings) as log,
        ):
            progress(state.step)
            for step in steps:
                records.append(asdict(step))
                progress(step.step)
                log(records[-1], step.step)
                enough = _should_stop(run, base, state.student, step.step)
                last_step = enough or step.step == config.n_steps
                if last_step or step.step % config.checkpoint_every == 0:
                    # History first: it may run ahead of the checkpoint, never behind it.
                    if first:
                        write_text(history, "".join(json.dumps(r) + "\n" for r in records))
                    state.save(checkpoint, stamp, writes=first)
                if enough:
                    break
    finally:
        if config.lora_rank:
            without_adapter(state.student)
    last = StepRecord(**records[-1])
    run.say(
        f"  {last.step} steps: loss {records[0]['loss']:.4f} -> {last.loss:.4f}, mass on S"
        f" {last.mass_on_s_student:.3f} (teacher {last.mass_on_s_teacher:.3f})"
    )
    return ["history.jsonl", "checkpoint.safetensors"]


def _refresh(run: Run, direction: Direction, student: ChatModel) -> tuple[Direction, TokenSet]:
    """The direction at the same position and layer, and S, read from the student as it is now."""
    train, val = run.prompts.split("train").first(run.recipe.n_direction), run.prompts.split("val")
    candidates = EXTRACTIONS[direction.extraction](student, train, seed=run.recipe.seed)
    vector = candidates.vectors[candidates.positions.index(direction.position), direction.layer].cpu()
    again = replace(direction, vector=vector)
    texts = val.harmless if run.recipe.tokens.prompts == "harmless" else val.harmful
    return again, select_tokens(student, again, texts, run.recipe.tokens)


def _should_stop(run: Run, base: ChatModel, student: ChatModel, step: int) -> bool:
    """Early stopping: enough harmful prompts of val refused, at little drift on its harmless ones."""
    recipe = run.recipe
    if not recipe.check_every or step % recipe.check_every:
        return False
    refused, drift = held_out_check(student, base, run.prompts.split("val"), run.judge)
    run.say(f"  step {step}: refuses {refused:.0%} of val, KL on its harmless prompts {drift:.3f}")
    return refused >= recipe.stop_refusal and drift <= recipe.stop_kl


def _student(run: Run) -> ChatModel:
    return load_model(str(run.path / "model"))


def write_model(run: Run, base: ChatModel) -> list[str]:
    """Export: model/ as a plain Hugging Face folder, reloaded once in a fresh process."""
    direction = Direction.load(run.path / "direction.safetensors", base)
    alone = replace(run.recipe.distill, sharded=False)
    state = prepare_student(load_model(run.model, dtype="float32"), direction, alone)
    stamp = {"recipe": run.recipe.hash, "tokens": digest(run.path / "tokens.json")}
    state.load(run.path / "checkpoint.safetensors", stamp)
    student, written = state.student, []
    if run.recipe.distill.lora_rank:
        if run.recipe.keep_adapter:
            write_adapter(student, run.path / "adapter")
            written = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
        student = merged(student)
    export(student, run.path / "model")
    difference = check_reload(run.path / "model")
    run.say(f"  reloaded in a fresh process: logits differ by at most {difference:.1g}")
    return ["model/model.safetensors", "model/config.json", "model/tokenizer.json", *written]


def measure(run: Run, base: ChatModel) -> list[str]:
    """Evaluate base, teacher and student on the test split: evaluation.json and answers.jsonl."""
    direction = Direction.load(run.path / "direction.safetensors", base)
    config = run.recipe.evaluation
    test = run.prompts.split("test").first(config.n_prompts)
    scores, answers, judge = {}, {}, CachedJudge(run.judge)
    with run.progress("evaluating", total=3.0) as progress:
        scores["base"], answers["base"] = evaluate(base, base, test, config, judge=judge)
        reference = answers["base"]["harmless"]
        progress(1)
        # Drift is measured against the unsteered base, so a copy carries the steering.
        teacher = replace(base, model=copy.deepcopy(base.model))
        with steer(teacher, direction):
            scores["teacher"], answers["teacher"] = evaluate(
                teacher, base, test, config, judge=judge, base_answers=reference
            )
        progress(2)
        scores["student"], answers["student"] = evaluate(
            _student(run), base, test, config, judge=judge, base_answers=reference
        )
    evaluation = Evaluation(scores)
    evaluation.save(run.path / "evaluation.json")
    lines = []
    for label in ("harmful", "harmless"):
        rows = [p for p in test.prompts if p.label == label]
        texts = [p.text for p in rows]
        refused = {name: judge_all(judge, texts, answers[name][label]) for name in scores}
        for i, p in enumerate(rows):
            row = {"prompt": p.text, "label": label, "category": p.category}
            for name in scores:
                text = answers[name][label][i]
                row |= {name: text, f"{name}_refuses": refused[name][i]}
            lines.append(json.dumps(row, ensure_ascii=True))
    write_text(run.path / "answers.jsonl", "\n".join(lines) + "\n")
    settings = {"model": run.model, **asdict(run.recipe)}
    write_card(run.path / "model", run.model, direction, settings, scores)
    for line in repr(evaluation)[len("Evaluation(") : -1].split("; "):
        run.say(f"  {line}")
    return ["evaluation.json", "answers.jsonl", "model/README.md"]


def explain(run: Run, base: ChatModel) -> list[str]:
    """Why these tokens, how much they cover, how stable they are: attribution.json."""
    direction = Direction.load(run.path / "direction.safetensors", base)
    tokens = TokenSet.load(run.path / "tokens.json")
    answers = [json.loads(line) for line in (run.path / "answers.jsonl").read_text().splitlines()]
    val, config = run.prompts.split("val"), run.recipe.explain
    with run.progress("explaining") as progress:
        found = explanation.explain(
            base, _student(run), direction, tokens, val, answers, config, progress=progress
        )
    found.save(run.path / "attribution.json")
    return ["attribution.json"]


def write_page(run: Run, base: ChatModel) -> list[str]:
    """report.html, one offline file."""
    write_report(run.path)
    return ["report.html"]


_RUN = {
    "direction": find_direction,
    "tokens": find_tokens,
    "distill": train,
    "export": write_model,
    "evaluate": measure,
    "explain": explain,
    "report": write_page,
}
