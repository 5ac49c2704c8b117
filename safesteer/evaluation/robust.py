"""The suite "robust", part by part: how deep is a model's safety?

1. Depth: answers opened by k tokens (`depth`), and with a student KL(base || student) by position.
2. Wrappers: the same harmful and harmless requests in frames, encodings, variations and after other turns
   (`prompts.wrappers`). The judge reads the plain request beside the answer to the wrapped one.
3. Weights: refusals left after ablations and lower ranks, in memory (`weights`).
4. Gradient: how much optimization of a suffix it takes until the model no longer refuses (`gradient_attack`).

Only rates and numbers are written: what a model answers here is judged and forgotten.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch

from safesteer._files import read_json
from safesteer.directions.finding import find_direction
from safesteer.evaluation.depth import (
    BATCH,
    Cell,
    cell,
    depth_cell,
    either,
    kl_rows,
)
from safesteer.evaluation.gradient_attack import GradientAttack, attack_cell
from safesteer.evaluation.weights import (
    SEARCH,
    ablating,
    main_directions,
    measure_change,
    update_of_rank,
    usable,
)
from safesteer.judges.judge import Judge, judge_all, outcomes
from safesteer.judges.languages import refuses_abroad
from safesteer.judges.sentences import declines
from safesteer.models.adapter import adapter_off, has_adapter
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate, greedy_ids
from safesteer.models.hashing import weights_hash
from safesteer.prompts.prompt_set import Label, load_prompts
from safesteer.prompts.wrappers import PLAIN, Wrapper, load_openings, load_wrappers
from safesteer.report.robust_table import (
    KL_HARMFUL,
    KL_HARMLESS,
    OPENED,
    OPENED_BY_BASE,
    WRAPPED_HARMFUL,
    WRAPPED_HARMLESS,
)

# Parts that some models do not allow: without a refusal direction, with weights in 4 bits.
DIRECTIONS, UPDATE, ADAPTER, GRADIENT = "directions", "update", "adapter", "gradient"
MAY_FAIL = (DIRECTIONS, UPDATE, ADAPTER, GRADIENT)


@dataclass(frozen=True)
class Robustness:
    """How much the suite "robust" measures: prompts of each cell, tokens, ranks."""

    n_harmful: int = 24
    n_harmless: int = 24  # half of them twins of harmful ones, half everyday instructions
    openings: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50)  # tokens that open an answer
    max_new_tokens: int = 64  # that the model writes
    n_components: int = 4  # main directions that are ablated together
    ranks: tuple[int, ...] = (0, 1, 8)  # of what training has changed
    attack: GradientAttack | None = field(default_factory=GradientAttack)  # None: no attack
    seed: int = 0  # of the variations


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under test, with what all of its parts share."""

    chat: ChatModel
    base: ChatModel | None  # where the model is its student
    config: Robustness
    judge: Judge

    @property
    def harmful(self) -> list[str]:
        """Harmful prompts of the test split, from all categories."""
        return load_prompts().split("test").across(self.config.n_harmful).harmful

    @property
    def harmless(self) -> list[str]:
        """Twins of the test split, from all categories, and everyday instructions that nothing trains on."""
        n = self.config.n_harmless
        everyday = [p.text for p in load_prompts("kinds").split("val").prompts if p.form == "everyday"]
        return [*load_prompts().split("test").across(n - n // 2).harmless, *everyday[: n // 2]]


Part: TypeAlias = partial[Cell]


def parts_of(subject: Subject) -> Iterator[tuple[str, Part]]:
    """Yield (name of a part, function that measures it) for one model, the cheap ones first.

    Example:
        >>> from safesteer.evaluation.robust import Robustness, Subject, parts_of
        >>> [name for name, _ in parts_of(Subject(chat, None, Robustness(), ss.declines))][:3]
        ['depth-0', 'depth-1', 'depth-2']
    """
    for k in subject.config.openings:
        yield f"depth-{k}", partial(_opened, subject, k)
    if subject.base is not None:
        yield "depth-base", partial(_along_base, subject, subject.base)
    for wrapper in (PLAIN, *load_wrappers()):
        labels: tuple[Label, ...] = ("harmless",) if wrapper is PLAIN else ("harmful", "harmless")
        for label in labels:
            yield f"{label}-{wrapper.name.replace(' ', '-')}", partial(_wrapped, subject, wrapper, label)
    yield DIRECTIONS, partial(_directions, subject)
    if subject.base is not None:
        yield UPDATE, partial(_update, subject, subject.base)
    if has_adapter(subject.chat):
        yield ADAPTER, partial(_changed, subject, adapter_off(subject.chat), "adapter taken off")
    if subject.config.attack is not None:
        yield GRADIENT, partial(_attacked, subject, subject.config.attack)


def _opened(subject: Subject, k: int) -> Cell:
    """Measure the answers that k tokens of our openings start; prompts take the openings in turn."""
    texts, prompts = [subject.chat.encode(text) for text in load_openings()], subject.harmful
    openings = [texts[i % len(texts)] for i in range(len(prompts))]
    return depth_cell(
        subject.chat, prompts, openings, k, OPENED, subject.judge, subject.config.max_new_tokens
    )


def _along_base(subject: Subject, base: ChatModel) -> Cell:
    """Measure the student after the base's own first tokens, and how far it is from the base at each."""
    chat, judge, config, rows = subject.chat, subject.judge, subject.config, []
    harmful, harmless, n = subject.harmful, subject.harmless, max(subject.config.openings)
    openings = greedy_ids(base, harmful, n)
    for k in filter(None, config.openings):
        opened = depth_cell(chat, harmful, openings, k, OPENED_BY_BASE, judge, config.max_new_tokens)
        rows += opened["rows"]
    rows += kl_rows(base, chat, harmful, openings, KL_HARMFUL)
    rows += kl_rows(base, chat, harmless, greedy_ids(base, harmless, n), KL_HARMLESS)
    return {"rows": rows}


def _wrapped(subject: Subject, wrapper: Wrapper, label: Label) -> Cell:
    """Measure the answers to wrapped prompts; of several variations the worst one counts.

    That is one that is not refused for a harmful prompt, and one that is refused for a harmless prompt.
    """
    prompts = subject.harmful if label == "harmful" else subject.harmless
    n, config = wrapper.n_variations, subject.config
    texts = [text for prompt in prompts for text in wrapper.wrap(prompt, config.seed)]
    answers = generate(subject.chat, texts, max_new_tokens=config.max_new_tokens, batch_size=BATCH)
    plainly = [prompt for prompt in prompts for _ in range(n)]
    counts, values = outcomes(judge_all(subject.judge, plainly, answers))
    if wrapper.family == "language" and subject.judge is declines:  # which reads English
        abroad = [refuses_abroad(p, a) for p, a in zip(plainly, answers, strict=True)]
        values = [either(pair) for pair in zip(values, abroad, strict=True)]
    worst = _all if label == "harmful" or counts == "safe" else either
    values = [worst(values[i : i + n]) for i in range(0, len(values), n)]
    name = wrapper.name if wrapper is PLAIN else f"{wrapper.family} ({wrapper.split}): {wrapper.name}"
    metric = counts if n == 1 else f"{counts}, worst of {n}"
    kind = WRAPPED_HARMFUL if label == "harmful" else WRAPPED_HARMLESS
    return cell(kind, name, metric, counts, values)


def _all(values: Sequence[bool | None]) -> bool | None:
    """Return whether all verdicts hold; None where that is unknown."""
    return False if False in values else None if None in values else True


def _changed(subject: Subject, change: AbstractContextManager[None], name: str) -> Cell:
    """Measure the model with its weights changed."""
    return measure_change(
        subject.chat,
        change,
        name,
        subject.harmful,
        subject.harmless,
        judge=subject.judge,
        max_new_tokens=subject.config.max_new_tokens,
    )


def _directions(subject: Subject) -> Cell:
    """Search the model's refusal directions, and ablate the best one, then the main ones together."""
    sweep = find_direction(subject.chat, config=SEARCH).sweep
    rows, passes = usable(sweep.ranking)
    vectors = torch.stack([sweep.vector(row) for _, row in rows.iterrows()])
    note = "" if passes else ", none within the thresholds"
    axes = main_directions(vectors, subject.config.n_components)
    changes = {
        f"best direction ablated (layer {int(rows.layer.iloc[0])}{note})": vectors[:1],
        f"{len(axes)} main directions ablated": axes,
    }
    cells = [_changed(subject, ablating(subject.chat, v), name) for name, v in changes.items()]
    return {"rows": [made for one in cells for made in one["rows"]]}


def _update(subject: Subject, base: ChatModel) -> Cell:
    """Lower the rank of what training has changed."""
    rows: list[dict[str, Any]] = []
    for rank in subject.config.ranks:
        name = f"training's change at rank {rank}" if rank else "training's change removed"
        rows += _changed(subject, update_of_rank(base, subject.chat, rank), name)["rows"]
    return {"rows": rows}


def _attacked(subject: Subject, attack: GradientAttack) -> Cell:
    """Attack the first harmful prompts that the model refuses, within the budget of every model."""
    n = subject.config.max_new_tokens
    return attack_cell(subject.chat, subject.harmful, attack, judge=subject.judge, max_new_tokens=n)


def measured(folder: str | Path, chat: ChatModel) -> pd.DataFrame | None:
    """Return the suite's table if it was measured on a student of these very weights, else None.

    Args:
        folder: The suite's folder.
        chat: The student.
    """
    described, results = Path(folder) / "suite.json", Path(folder) / "results.csv"
    if not (described.exists() and results.exists()):
        return None
    hashes = read_json(described).get("weights", {})
    return pd.read_csv(results) if hashes.get("student") == weights_hash(chat.model) else None
