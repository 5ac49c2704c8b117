"""One trial: a student with the trial's settings, looked at while it trains, measured on val at the end.

1. Direction and S are those that `align` would make (`shared`).
2. The student trains as in `align`: what its watch sees fall ends the trial too.
3. After a third and two thirds of the steps it answers the first val prompts, and whoever runs the trial
   may leave it there (successive halving: steps and prompts grow together).
4. At the end it answers all of val.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial

from safesteer.distillation.loop import Training, follow_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.measuring import Measured, measure
from safesteer.models.adapter import without_adapter
from safesteer.progress import Progress, no_progress
from safesteer.recipes import Recipe
from safesteer.run_folder import Run
from safesteer.searching.shared import Shared, shared_direction, shared_tokens
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import TokenSet

LOOKS = ((1 / 3, 8), (2 / 3, 16))  # share of the steps, and val prompts of each kind
TRAINING = 0.7  # share of a trial's time, about


@dataclass(frozen=True, eq=False)
class Tried:
    """What a trial has come to: at look number `look` (from 0), on its prompts; None: at the end, on all."""

    direction: Direction
    tokens: TokenSet
    measured: Measured
    look: int | None = None


def try_settings(
    run: Run, shared: Shared, recipe: Recipe, why: str, progress: Progress = no_progress
) -> Generator[Tried, None, None]:
    """Train a student by `recipe`; yield what it does at each look, and at the end.

    Stop whenever you like: the student goes, and an adapter leaves the base, when the iterator is closed.

    Args:
        run: Loads models, and has the judges.
        shared: What trials share.
        recipe: The trial's recipe, with a precision for "auto".
        why: What the ledger says of each look at val.
        progress: Is told the share done.

    Raises:
        SafeSteerError: Where no direction or no token passes, or training cannot go on.
    """
    direction = shared_direction(shared, recipe.direction)
    tokens = shared_tokens(shared, direction, recipe.tokens)
    config, base, val = recipe.distill, shared.base, shared.val
    # As in `align`: an adapter sits on the base itself, other weights that train are a copy.
    student = base if config.lora_rank else run.load_base(dtype="float32")
    state = prepare_student(student, direction, config)
    look = partial(measure, base=base, config=recipe.evaluate, judge=run.judge)
    training = Training(judge=run.chooser, progress=lambda share: progress(TRAINING * share))
    at = {max(1, round(share * config.n_steps)): n for n, (share, _) in enumerate(LOOKS)}
    try:
        for record in follow_steps(state, Teacher(base, direction, tokens), shared.prompts, training):
            number = at.get(record.step)
            if number is not None and record.step < config.n_steps:
                first = val.first(LOOKS[number][1])
                seen = look(state.student, prompts=first, base_answers=shared.along[: len(first.harmless)])
                log_look(run.path, state.student, "val", len(first.harmless), why)
                yield Tried(direction, tokens, seen, number)
        measured = look(state.student, prompts=val, base_answers=shared.along)
        log_look(run.path, state.student, "val", len(val.harmless), why)
        progress(1.0)
        yield Tried(direction, tokens, measured)
    finally:
        if config.lora_rank:
            without_adapter(state.student)  # the base is shared
