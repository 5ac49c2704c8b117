"""The folder of a search: what it searches, Optuna's study, a file per complete trial, and the table of all.

    search.json     what identifies the search: model, prompts, judge, space
    start.toml      the recipe that is varied
    study.db        Optuna's storage (SQLite): settings, state and values of every trial
    trials/NNN.json what a complete trial did with every val prompt; base.json: what the base does
    trials.csv      a row per trial, also of those that failed or were ended, with the reason

A trial that a dead process left running is marked as interrupted, and its settings are tried again.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from safesteer._errors import SafeSteerError
from safesteer._files import read_json, read_value, write_json, write_text
from safesteer._version import __version__
from safesteer.evaluation.measuring import Measured
from safesteer.judges.judge import judge_identity
from safesteer.models.chat_model import ChatModel
from safesteer.models.hashing import weights_hash
from safesteer.recipes import Recipe
from safesteer.run_folder import SEARCH_FILE, Run
from safesteer.searching.space import Range, tried_value

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial
else:  # an extra, and slow to import
    FrozenTrial = Study = object

START_FILE, TRIALS_FILE, BASE = "start.toml", "trials.csv", "base"
DIRECTIONS = ("maximize", "minimize", "minimize")  # harmful refused, over-refusal, KL
COLUMNS = ("trial", "state", "reason", "harmful", "over_refusal", "kl", "n_pairs", "seconds", "layer")


@dataclass(frozen=True)
class TrialRecord:
    """What a model did with the val prompts, and for a trial the direction and S that it had.

    The base's record holds the prompts too, by label, and says whether prompt i of both kinds is one pair.
    """

    measured: Measured
    prompts: dict[str, tuple[str, ...]]
    twins: bool = False
    direction: str = ""
    tokens: tuple[str, ...] = ()


def import_optuna() -> Any:
    """Import Optuna, which is an extra of its own, and let it warn only.

    Raises:
        SafeSteerError: Where it is missing.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise SafeSteerError(f"A search needs {error.name}: pip install 'safesteer[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_folder(run: Run, base: ChatModel, space: Sequence[Range]) -> None:
    """Write what a new search is, or check that the folder holds the same one.

    Raises:
        SafeSteerError: If the folder holds another search, or something else.
    """
    path = run.path / SEARCH_FILE
    ours = {
        "model": run.model_name,
        "fingerprint": base.fingerprint,
        "weights": weights_hash(base.model),
        "prompts_hash": run.prompts.hash,
        "judge": judge_identity(run.judge),
        "space": json.loads(json.dumps([asdict(entry) for entry in space])),
    }
    if path.exists():
        theirs = read_json(path)
        different = [name for name, value in ours.items() if theirs.get(name) != value]
        if Recipe.load(run.path / START_FILE) != run.recipe:
            different.append("recipe")
        if different:
            raise SafeSteerError(
                f"{run.path} holds a search with another {', '.join(different)}: choose another folder, or"
                " delete it to start again."
            )
        return
    if any(p.name not in (".lock", START_FILE) for p in run.path.iterdir()):
        raise SafeSteerError(f"{run.path} is not empty and holds no search: choose another folder.")
    run.recipe.save(run.path / START_FILE)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # What "auto" was: a search that goes on elsewhere keeps it (`Run.settled`).
    precisions = {"dtype": run.settled.dtype, "distill": {"precision": run.settled.distill.precision}}
    facts = {"name": "safesteer search", **ours, "recipe": precisions}
    write_json(path, {**facts, "version": __version__, "created": created})


def open_study(folder: Path) -> Study:
    """Open or make the study of a folder; trials that a dead process left running are tried again.

    Raises:
        SafeSteerError: If `study.db` is damaged.
    """
    optuna = import_optuna()
    from sqlalchemy.exc import SQLAlchemyError  # Optuna's own storage needs it

    path = (folder / "study.db").resolve()
    try:
        study = optuna.create_study(
            study_name="search", storage=f"sqlite:///{path}", directions=DIRECTIONS, load_if_exists=True
        )
        left = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        for trial in left:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # no reason: it was interrupted
            study.enqueue_trial(trial.params)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ValueError, KeyError) as error:
        raise SafeSteerError(f"{path} is not a study that this version of Optuna can read.") from error
    return study


def finished_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that came to something: complete, ended at a look, or failed with a reason."""
    return [t for t in study.get_trials(deepcopy=False) if state_of(t) in ("complete", "ended", "failed")]


def state_of(trial: FrozenTrial) -> str:
    """Return a word for the state of a trial, as the table has it."""
    words = {"COMPLETE": "complete", "PRUNED": "ended", "RUNNING": "interrupted", "WAITING": "waiting"}
    return words.get(trial.state.name) or ("failed" if trial.user_attrs.get("reason") else "interrupted")


def trial_path(folder: Path, number: int | str) -> Path:
    """Return the file of a trial, or of the base."""
    return folder / "trials" / (f"{number:03d}.json" if isinstance(number, int) else f"{number}.json")


def read_record(folder: Path, number: int | str) -> TrialRecord:
    """Read the file of a trial, or of the base."""
    return read_value(TrialRecord, trial_path(folder, number), "a trial's file")


def trials_table(study: Study, space: Sequence[Range]) -> pd.DataFrame:
    """Return a row per trial: COLUMNS, then its settings.

    `n_pairs` says of how many val prompts of each kind the numbers are: fewer than all for a trial that was
    ended at a look.
    """
    rows = []
    for trial in study.get_trials(deepcopy=False):
        state, facts = state_of(trial), trial.user_attrs
        if state == "waiting":
            continue
        values = trial.values if state == "complete" else facts.get("values", [None] * 3)
        reason = facts.get("reason", "tried again in a later trial" if state == "interrupted" else "")
        numbers = (facts.get("n_pairs"), facts.get("seconds"), facts.get("layer"))
        row = dict(zip(COLUMNS, (trial.number, state, reason, *values, *numbers), strict=True))
        drawn = {e.name: tried_value(e, trial.params[e.name]) for e in space if e.name in trial.params}
        rows.append(row | drawn)
    table = pd.DataFrame(rows, columns=[*COLUMNS, *(entry.name for entry in space)])
    whole = dict.fromkeys(("n_pairs", "layer", *(e.name for e in space if e.whole)), "Int64")
    return table.astype(whole)


def write_trials(folder: Path, study: Study, space: Sequence[Range]) -> pd.DataFrame:
    """Write `trials.csv`, and return the table."""
    table = trials_table(study, space)
    write_text(folder / TRIALS_FILE, table.to_csv(index=False))
    return table
