"""What a search varies: one row per setting, with its range and the reason for it.

A range is absolute, or in units of the recipe's own value, because recipes differ by orders of magnitude
where the scale is that of the model or of what trains. A setting that is not listed stays the recipe's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from safesteer._errors import SafeSteerError
from safesteer._settings import LARGEST
from safesteer.recipes import Recipe

DIGITS = 3  # of a value: a recipe file holds exactly what was tried


@dataclass(frozen=True)
class Range:
    """One setting that is varied, from `low` to `high`.

    Attributes:
        name: The setting, as the command line names it.
        low: Its smallest value.
        high: Its largest value.
        reason: Why it is varied, and why so far.
        step: Distance of its values; None: any value.
        log: Drawn evenly in the logarithm.
        whole: A whole number.
        relative: `low` and `high` are multiples of the recipe's value.
    """

    name: str
    low: float | int
    high: float | int
    reason: str
    step: float | None = None
    log: bool = False
    whole: bool = False
    relative: bool = False


READ_ONCE = ("direction.native_share", "direction.n_train", "direction.seed")  # what candidates are read by
SPACE = (
    Range(
        "direction.coeff",
        0.8,
        2.4,
        "The teacher's strength: below it hardly refuses, above its answers break. In steps, so that"
        " candidates are scored once per value.",
        step=0.2,
    ),
    Range(
        "direction.max_layer_share",
        0.4,
        0.8,
        "The last layer that may be steered: earlier ones leave more blocks to answer, late ones only push"
        " logits; 0.8 is the paper's.",
        step=0.1,
    ),
    Range(
        "tokens.k",
        20,
        200,
        "Size of S: fewer tokens teach less of the refusal, more pull the student off its base; 50 is the"
        " paper's.",
        log=True,
        whole=True,
    ),
    Range(
        "tokens.min_steered_prob",
        1e-5,
        1e-2,
        "How likely a token must be to enter S: the paper's values for Qwen and Llama differ tenfold, and"
        " small models need a higher one.",
        log=True,
    ),
    Range(
        "distill.anchor_weight",
        0.5,
        8.0,
        "Weight of harmless answers: what holds over-refusal and drift down, at the price of refusals.",
        log=True,
    ),
    Range(
        "distill.late_anchor_weight",
        0.5,
        8.0,
        "The same in the last third of the steps, where it takes back over-refusals.",
        log=True,
    ),
    Range(
        "distill.n_steps",
        0.25,
        1.0,
        "How long is trained, which is what a trial costs: at most as long as the recipe's, whose time is"
        " yours to set.",
        log=True,
        whole=True,
        relative=True,
    ),
    Range(
        "distill.lr",
        0.25,
        4.0,
        "How far each step goes: it depends on what trains, so it is the recipe's up to a factor of four.",
        log=True,
        relative=True,
    ),
)


def resolve_space(space: Sequence[Range], recipe: Recipe) -> tuple[Range, ...]:
    """Return the space in absolute values, checked against the recipe.

    Args:
        space: What is varied.
        recipe: The recipe that is varied.

    Raises:
        SafeSteerError: For a setting that there is not, stands twice, or has no value to be a multiple of;
            a range that is empty, or that the setting does not take; for a setting of what is read once.

    Example:
        >>> from safesteer.searching.space import SPACE, resolve_space
        >>> lr = resolve_space(SPACE, ss.recipe("quick"))[-1]
        >>> (lr.name, lr.low, lr.high)
        ('distill.lr', 7.5e-05, 0.0012)
    """
    values, resolved = {name: value for name, value, *_ in recipe.rows()}, []
    for entry in space:
        if entry.name not in values or "." not in entry.name:
            raise SafeSteerError(f"Unknown setting '{entry.name}': `safesteer settings` lists what there is.")
        if entry.name in READ_ONCE:
            raise SafeSteerError(f"{entry.name} is read once per search: give it with --set, not as a range.")
        if [e.name for e in space].count(entry.name) > 1:
            raise SafeSteerError(f"The search varies {entry.name} twice: leave one of the two ranges out.")
        if entry.relative:
            centre = values[entry.name]
            if not isinstance(centre, int | float) or centre <= 0:
                raise SafeSteerError(
                    f"The recipe's {entry.name} is {centre}, so there are no multiples of it: give a range in"
                    " absolute values."
                )
            low, high = (centre * x for x in (entry.low, entry.high))
            if entry.whole:
                low, high = max(1, round(low)), min(LARGEST, round(high))
            entry = replace(entry, low=float(f"{low:.6g}"), high=float(f"{high:.6g}"), relative=False)
        if not entry.low <= entry.high or (entry.log and entry.low <= 0):
            raise SafeSteerError(f"The range of {entry.name} from {entry.low:g} to {entry.high:g} is empty.")
        for end in (entry.low, entry.high):  # the setting's own bounds
            with_settings(recipe, {entry.name: tried_value(entry, end)})
        resolved.append(entry)
    if not resolved:
        raise SafeSteerError("The search has no setting to vary: leave one of them free.")
    return tuple(resolved)


def tried_value(entry: Range, drawn: float | int) -> float | int:
    """Return a drawn value as it is tried and written: a whole number, or a few digits of it."""
    return int(drawn) if entry.whole else float(f"{drawn:.{DIGITS}g}")


def starting_point(space: Sequence[Range], recipe: Recipe) -> dict[str, float | int]:
    """Return the recipe's own values as far as they lie in the space: where a search starts."""
    values = {name: value for name, value, *_ in recipe.rows()}
    return {entry.name: values[entry.name] for entry in space if _holds(entry, values[entry.name])}


def _holds(entry: Range, value: Any) -> bool:
    if not isinstance(value, int | float) or not entry.low <= value <= entry.high:
        return False
    steps = (value - entry.low) / entry.step if entry.step else 0.0
    return abs(steps - round(steps)) < 1e-6


def with_settings(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some settings of its stages changed, by name.

    Example:
        >>> from safesteer.searching.space import with_settings
        >>> with_settings(ss.recipe(), {"distill.lr": 1e-4, "tokens.k": 20}).tokens.k
        20
    """
    stages: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        stage, _, key = name.rpartition(".")
        stages.setdefault(stage, {})[key] = value
    return replace(
        recipe, **{stage: replace(getattr(recipe, stage), **changed) for stage, changed in stages.items()}
    )
