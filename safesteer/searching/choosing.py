"""Choose a trial of a search: the knee of the front or one that you name, as a recipe and on a page.

The numbers of the choice are those of the luckiest of many trials, so beside them stands what they are
worth (`ranking.corrected`). Rerunning this changes the choice and no trial.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safesteer._errors import SafeSteerError
from safesteer._files import from_json, locked, read_json, write_text
from safesteer.prompts.prompt_set import LABELS
from safesteer.recipes import Recipe
from safesteer.report.search_page import write_search_page
from safesteer.run_folder import SEARCH_FILE
from safesteer.searching.ranking import Outcomes, corrected, front, knee
from safesteer.searching.records import (
    BASE,
    START_FILE,
    TrialRecord,
    open_study,
    read_record,
    write_trials,
)
from safesteer.searching.space import Range, with_settings

RECIPE_FILE, CORRECTED_FILE, PAGE = "recipe.toml", "corrected.csv", "search.html"
N_ANSWERS = 4  # of each kind that the page shows per trial


def pick_trial(folder: str | Path, number: int | None = None) -> Path:
    """Choose a trial of a search: write its recipe, and the page that shows it among the others.

    Args:
        folder: The folder of a search.
        number: The trial; None: the knee of the front.

    Returns:
        The path of `recipe.toml`, for `align --recipe`.

    Raises:
        SafeSteerError: If the folder holds no search, or the trial is not complete.
    """
    folder = Path(folder)
    if not (folder / SEARCH_FILE).is_file():
        raise SafeSteerError(f"{folder} holds no search: it has no {SEARCH_FILE}.")
    with locked(folder):
        return choose(folder, number)[0]


def choose(folder: Path, number: int | None) -> tuple[Path, list[str]]:
    """Do what `pick_trial` does in a folder that is locked; return the recipe's path and lines to print."""
    facts = read_json(folder / SEARCH_FILE)
    space = [from_json(Range, entry) for entry in facts["space"]]
    table = write_trials(folder, open_study(folder), space)
    complete = table.query("state == 'complete'").reset_index(drop=True)
    if complete.empty:
        raise SafeSteerError(
            f"None of the {len(table)} trials in {folder} is complete: trials.csv says why; search on with"
            " more trials, or other ranges."
        )
    base = read_record(folder, BASE)
    records = {int(n): read_record(folder, int(n)) for n in complete.trial}
    outcomes = _outcomes(list(records.values()), base.twins)
    losses = outcomes.losses()
    if number is None:
        number = int(complete.trial[knee(losses)])
    if number not in records:
        known = ", ".join(map(str, records))
        raise SafeSteerError(f"Trial {number} is not complete, so it cannot be picked: pick one of {known}.")
    luck = corrected(outcomes)
    luck["trial"] = complete.trial[luck.trial].to_numpy()
    write_text(folder / CORRECTED_FILE, luck.to_csv(index=False))
    on_front = set(complete.trial[front(losses)])
    settings = _settings(complete, number, space)
    recipe = with_settings(Recipe.load(folder / START_FILE), settings)
    recipe.save(folder / RECIPE_FILE)
    shown = table.assign(on_front=table.trial.isin(on_front), chosen=table.trial == number)
    page = {
        "model": facts["model"],
        "date": facts["created"][:10],
        "judge": facts["judge"],
        "base": dict(zip(("harmful", "over_refusal", "kl"), base.measured.objectives, strict=True)),
        "n_pairs": len(base.measured.harmful),
        "start": {name: value for name, value, *_ in Recipe.load(folder / START_FILE).rows()},
        "space": [asdict(entry) for entry in space],
        "answers": {n: _answers(base, record) for n, record in records.items()},
        "made": {n: {"direction": r.direction, "tokens": list(r.tokens)} for n, r in records.items()},
    }
    write_search_page(folder / PAGE, page, shown, luck)
    row = complete[complete.trial == number].iloc[0]
    return folder / RECIPE_FILE, _lines(
        row, luck, int((table.state != "interrupted").sum()), len(on_front), base
    )


def _outcomes(records: Sequence[TrialRecord], twins: bool) -> Outcomes:
    measured = [record.measured for record in records]
    return Outcomes(
        np.array([m.harmful for m in measured], float),
        np.array([m.harmless for m in measured], float),
        np.array([m.kls for m in measured], float),
        twins,
    )


def _settings(complete: pd.DataFrame, number: int, space: Sequence[Range]) -> dict[str, float | int]:
    row = complete[complete.trial == number].iloc[0]
    return {e.name: int(row[e.name]) if e.whole else float(row[e.name]) for e in space}


def _answers(base: TrialRecord, record: TrialRecord) -> list[dict[str, Any]]:
    """Return a few answers beside the base's: first those whose verdict changed."""
    rows = []
    for label in LABELS:
        before = _judged(base, label)
        both = zip(base.prompts[label], before, _judged(record, label), strict=True)
        ordered = sorted(both, key=lambda row: row[1][0] == row[2][0])[:N_ANSWERS]  # stable
        for prompt, (was, old), (now, new) in ordered:
            rows.append(
                {
                    "prompt": prompt,
                    "label": label,
                    "base": old,
                    "base_refuses": was,
                    "student": new,
                    "student_refuses": now,
                }
            )
    return rows


def _judged(record: TrialRecord, label: str) -> list[tuple[bool, str]]:
    """Return (refused, answer) for every prompt of a kind."""
    m = record.measured
    both = (m.harmful, m.harmful_answers) if label == "harmful" else (m.harmless, m.harmless_answers)
    return list(zip(*both, strict=True))


def _lines(row: pd.Series, luck: pd.DataFrame, n: int, n_front: int, base: TrialRecord) -> list[str]:
    """Say what was chosen, and what it is worth."""
    harmful, over_refusal, _ = base.measured.objectives
    worth = luck[luck.rule == "the knee"].set_index("objective").corrected
    return [
        f"{n} trials, {n_front} on the front; trial {row.trial} is chosen: refuses {row.harmful:.0%} of"
        f" harmful val prompts and {row.over_refusal:.0%} of their twins, KL {row.kl:.3f}"
        f" (base {harmful:.0%} and {over_refusal:.0%})",
        f"the knee corrected for the luck of the best of many: {worth['harmful']:.0%},"
        f" {worth['over_refusal']:.0%}, KL {worth['kl']:.3f}",
    ]
