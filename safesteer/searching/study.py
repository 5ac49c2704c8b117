"""Search the settings of a run: many short trainings on val, and the recipe of the best one.

1. Optuna draws settings (tree-structured Parzen estimator for three objectives; the first trial is the
   recipe as it is), and keeps every trial in `study.db`.
2. Each trial trains and is measured (`trying`); one that is among the worse half at a look ends there.
3. When all are done: the front, the knee, how lucky they are (`ranking`), and the recipe of the choice.

The test split is taken away before anything starts, and val is not trained on. What a trial draws depends on
the seed and on the trials that are finished, so a search that goes on repeats an uninterrupted one.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from safesteer import recipes
from safesteer._errors import SafeSteerError
from safesteer._files import locked, write_json
from safesteer.directions.finding import read_candidates
from safesteer.distillation.state import require_adapter
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.measuring import drift_answers, measure
from safesteer.judges.judge import Judge
from safesteer.judges.sentences import declines
from safesteer.judges.wording import refuses
from safesteer.models.chat_model import ChatModel, ModelLike
from safesteer.progress import Progress
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.run_folder import Run, model_source
from safesteer.searching.choosing import choose
from safesteer.searching.ranking import goes_on
from safesteer.searching.records import (
    BASE,
    TrialRecord,
    finished_trials,
    import_optuna,
    open_folder,
    open_study,
    read_record,
    trial_path,
    write_trials,
)
from safesteer.searching.shared import Shared, are_twins, drawn_val
from safesteer.searching.space import (
    SPACE,
    Range,
    resolve_space,
    starting_point,
    tried_value,
    with_settings,
)
from safesteer.searching.trying import LOOKS, Tried, try_settings

if TYPE_CHECKING:
    from optuna import Study, Trial
else:  # an extra, and slow to import
    Study = Trial = object

OPENING = 0.03  # share of the whole that reading candidates and the base takes, about


def search(
    model: str | Path | ModelLike = "smollm2-135m",
    out: str | Path = "search",
    recipe: recipes.Recipe | None = None,
    *,
    n_trials: int = 30,
    space: Sequence[Range] = SPACE,
    prompts: PromptSet | None = None,
    judge: Judge | None = None,
    console: Console | None = None,
) -> Path:
    """Search the settings of a run on val: harmful refusals up, over-refusal and drift down.

    An interrupted search of the same settings continues; with more trials a finished one goes on.

    Args:
        model: As `align` takes it.
        out: The folder of the search.
        recipe: What is varied; None: the preset "quick". Val is taken out of `distill.splits`.
        n_trials: Trials in all, those that the folder has included.
        space: What is varied, and how far.
        prompts: Prompts with the splits train, val and distill; None: the recipe's. A test split is not read.
        judge: Says which answers refuse; None: as in `align`, `refuses` while students train and `declines`
            where they are measured.
        console: Where to print; None: the terminal.

    Returns:
        The path of `recipe.toml`, the choice (`pick_trial` makes another): give it to `align`.

    Raises:
        SafeSteerError: For a setting or range that does not fit, a folder of another search, a second one at
            work in it, or where no trial is complete.
    """
    import_optuna()  # missing: said before any work
    recipe = _searchable(recipe or recipes.recipe(), n_trials)
    prompts = prompts or load_prompts(recipe.prompts)
    source = model_source(model, recipe)
    sealed = PromptSet(tuple(p for p in prompts.prompts if p.split != "test"), prompts.name)
    for name in ("train", "val", "distill"):
        sealed.split(name)
    run = Run(Path(out), source, recipe, sealed, judge or refuses, judge or declines, console or Console())
    base = run.load_base() if isinstance(source, str) else source
    recipe = recipes.for_family(recipe, base.config.model_type)
    require_adapter(base.model, recipe.distill)
    resolved = resolve_space(space, recipe)
    run = replace(run, recipe=recipe)
    with locked(run.path):
        open_folder(run, base, resolved)
        study = open_study(run.path)
        if len(finished_trials(study)) < n_trials:
            with run.progress("searching") as progress:
                _run_trials(run, base, study, resolved, n_trials, progress)
        path, lines = choose(run.path, None)
    for line in lines:
        run.say(line)
    return path


def _searchable(recipe: recipes.Recipe, n_trials: int) -> recipes.Recipe:
    """Take val out of what is trained on, score all candidates alike; refuse what a search cannot do."""
    if n_trials < 1:
        raise SafeSteerError(f"A search needs at least one trial, not {n_trials}.")
    if recipe.distill.sharded:
        raise SafeSteerError("A search trains in one process: leave out distill.sharded.")
    if recipe.direction.file is not None:
        raise SafeSteerError("A search chooses the direction: leave out direction.file.")
    splits = tuple(name for name in recipe.distill.splits if name != "val")
    if not splits:
        raise SafeSteerError(
            "A search measures val, so nothing is left to train on: add a split to distill.splits."
        )
    # Trials share a sweep over all layers, of which none may decide what another is scored on.
    direction = replace(recipe.direction, n_val_first=None)
    return replace(recipe, direction=direction, distill=replace(recipe.distill, splits=splits))


def _run_trials(
    run: Run, base: ChatModel, study: Study, space: Sequence[Range], n_trials: int, progress: Progress
) -> None:
    """Run the trials that are missing; each is recorded when it is done."""
    done, shared = len(finished_trials(study)), _share(run, base, space)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(starting_point(space, run.recipe))
    write_trials(run.path, study, space)
    n_before = done

    def part(share: float) -> None:
        progress(OPENING + (1 - OPENING) * (done - n_before + share) / (n_trials - n_before))

    part(0.0)
    while done < n_trials:
        trial = _ask(study, space, run.recipe.seed, done)
        run.say(_run_trial(run, shared, study, trial, space, part))
        write_trials(run.path, study, space)
        done = len(finished_trials(study))
        part(0.0)


def _share(run: Run, base: ChatModel, space: Sequence[Range]) -> Shared:
    """Make what all trials share."""
    config, val = run.recipe.direction, drawn_val(run.prompts, run.recipe.seed)
    reading = read_candidates(base, run.prompts, config, run.chooser)
    if trial_path(run.path, BASE).exists():
        measured = read_record(run.path, BASE).measured
    else:
        measured = measure(base, base, val, run.recipe.evaluate, run.judge)
        prompts = {"harmful": tuple(map(str, val.harmful)), "harmless": tuple(map(str, val.harmless))}
        write_json(trial_path(run.path, BASE), asdict(TrialRecord(measured, prompts, are_twins(val))))
        log_look(run.path, base, "val", len(val.harmful), "search: base")
    widest = {entry.name: entry.high for entry in space}.get(
        "direction.max_layer_share", config.max_layer_share
    )
    along = drift_answers(base, val, run.recipe.evaluate)
    return Shared(base, run.prompts, val, reading, measured, along, widest, run.chooser)


def _ask(study: Study, space: Sequence[Range], seed: int, done: int) -> Trial:
    """Draw the settings of the next trial; what is drawn depends on the trials that are finished."""
    optuna = import_optuna()
    study.sampler = optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence((seed, done)).generate_state(1)[0])
    )
    kinds: dict[str, Any] = {}
    for entry in space:
        low, high = entry.low, entry.high
        if entry.whole:
            kinds[entry.name] = optuna.distributions.IntDistribution(int(low), int(high), log=entry.log)
        else:
            kinds[entry.name] = optuna.distributions.FloatDistribution(low, high, entry.log, entry.step)
    return study.ask(kinds)


def _run_trial(
    run: Run, shared: Shared, study: Study, trial: Trial, space: Sequence[Range], progress: Progress
) -> str:
    """Run one trial and tell the study what it came to; return a line about it."""
    states = import_optuna().trial.TrialState
    started = time.perf_counter()
    values = {entry.name: tried_value(entry, trial.params[entry.name]) for entry in space}
    try:
        recipe = with_settings(run.settled, values)
        why = f"search: trial {trial.number}"
        with closing(try_settings(run, shared, recipe, why, progress)) as steps:
            tried = next(steps)
            while tried.look is not None and _goes_on(study, trial, tried):
                tried = next(steps)
    except SafeSteerError as error:
        trial.set_user_attr("seconds", round(time.perf_counter() - started, 1))
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=states.FAIL)
        return f"trial {trial.number} failed: {error}"
    measured, n_pairs = tried.measured, len(tried.measured.harmful)
    facts = {"values": measured.objectives, "n_pairs": n_pairs, "layer": tried.direction.layer}
    for name, fact in (facts | {"seconds": round(time.perf_counter() - started, 1)}).items():
        trial.set_user_attr(name, fact)
    harmful, over_refusal, kl = measured.objectives
    numbers = f"refuses {harmful:.0%} of harmful prompts and {over_refusal:.0%} of their twins, KL {kl:.3f}"
    if tried.look is not None:
        reason = f"among the worse half after {LOOKS[tried.look][0]:.0%} of the steps"
        trial.set_user_attr("reason", f"{reason}, on {n_pairs} val prompts of each kind")
        study.tell(trial, state=states.PRUNED)
        return f"trial {trial.number} ended {reason}: {numbers}"
    texts = tuple(token.text for token in tried.tokens.tokens)
    record = TrialRecord(measured, {}, direction=repr(tried.direction), tokens=texts)
    write_json(trial_path(run.path, trial.number), asdict(record))
    study.tell(trial, measured.objectives)
    return f"trial {trial.number}: {numbers}"


def _goes_on(study: Study, trial: Trial, tried: Tried) -> bool:
    """Record what a look saw, and compare it with what the other trials did there."""
    name = f"look {tried.look}"
    others = [t.user_attrs[name] for t in finished_trials(study) if name in t.user_attrs]
    trial.set_user_attr(name, tried.measured.losses)
    return goes_on(tried.measured.losses, others)
