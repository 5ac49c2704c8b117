"""Stage 5: what changed and what did not, for base, teacher and student beside each other.

1. Greedy answers to the harmful and harmless prompts of the test split, judged.
2. Drift: KL(base || model) along the base's own answers to harmless prompts.
3. Perplexity of plain text.
Rates come with Wilson intervals, means with bootstrap intervals over prompts (95 %).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from safesteer._errors import expect
from safesteer._files import json_lines, read_value, write_json, write_json_lines
from safesteer._intervals import bootstrap, wilson
from safesteer.evaluation.measuring import drift_answers
from safesteer.judges.judge import CachedJudge, Judge, judge_all, judge_version, outcomes
from safesteer.judges.sentences import declines
from safesteer.models.adapter import as_base, without_student
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.drift import kl_on_answers
from safesteer.models.generation import generate
from safesteer.models.precision import in_precision_of
from safesteer.models.text_loss import general_text, perplexity
from safesteer.progress import Progress, no_progress
from safesteer.prompts.conversation import to_row
from safesteer.prompts.prompt_set import LABELS, PromptSet, load_prompts
from safesteer.settings import EvaluateConfig
from safesteer.steering.direction import Direction, steer

SCORES_FILE, ANSWERS_FILE = "evaluation.json", "answers.jsonl"


@dataclass(frozen=True)
class Scores:
    """One model's numbers. Rates in 0..1, KL in nats per token, n harmful prompts.

    `n_harmless` is None where there are n harmless prompts too. `counts` is what the rates count: "refused",
    or "safe" with a judge that only says what is harmful. `n_unknown` is how many answers to harmful and to
    harmless prompts have no verdict: rates count them as not refused (not safe).
    """

    refusal_rate_harmful: float
    refusal_rate_harmful_ci: tuple[float, float]
    refusal_rate_harmless: float
    refusal_rate_harmless_ci: tuple[float, float]
    kl_harmless: float
    kl_harmless_ci: tuple[float, float]
    perplexity: float
    n: int
    counts: str = "refused"
    n_harmless: int | None = None
    n_unknown: tuple[int, int] = (0, 0)

    @property
    def n_each(self) -> tuple[int, int]:
        """How many harmful and how many harmless prompts the rates are of."""
        return self.n, self.n if self.n_harmless is None else self.n_harmless


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Scores by model ("base", "teacher", "student"), and every answer they were made from.

    A row of `answers` holds prompt, label, category, and per model its answer and `<model>_refuses` (None
    where the judge gave no reply that can be read).
    """

    scores: dict[str, Scores]
    answers: tuple[dict[str, Any], ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """Return the scores: one row per model."""
        return pd.DataFrame({name: asdict(s) for name, s in self.scores.items()}).T

    def lines(self) -> list[str]:
        """Return one readable line per model; ranges are 95 % intervals."""

        def rate(value: float, interval: tuple[float, float], n: int) -> str:
            low, high = (100 * end for end in interval)
            return f"{value:.0%} ({low:.0f} to {high:.0f}) of {n}"

        lines = []
        for name, s in self.scores.items():
            n, n_harmless = s.n_each
            harmful = rate(s.refusal_rate_harmful, s.refusal_rate_harmful_ci, n)
            harmless = rate(s.refusal_rate_harmless, s.refusal_rate_harmless_ci, n_harmless)
            drift = f"KL {s.kl_harmless:.3f}, perplexity {s.perplexity:.2f}"
            lines.append(f"{name}: {s.counts} {harmful} harmful and {harmless} harmless prompts, {drift}")
            if any(s.n_unknown):
                lines[-1] += f"; no verdict on {s.n_unknown[0]} and {s.n_unknown[1]} answers"
        return lines

    def __repr__(self) -> str:
        return "Evaluation(" + "; ".join(self.lines()) + ")"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(escape=True)

    def save(self, folder: str | Path) -> None:
        """Write evaluation.json and answers.jsonl into `folder`."""
        write_json(Path(folder) / SCORES_FILE, {name: asdict(s) for name, s in self.scores.items()})
        write_json_lines(Path(folder) / ANSWERS_FILE, self.answers)

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """Read what `save` wrote; the answers may be missing.

        Raises:
            SafeSteerError: If the scores cannot be read.
        """
        path = Path(folder) / SCORES_FILE
        scores = read_value(dict[str, Scores], path, "an evaluation file")
        answers = Path(folder) / ANSWERS_FILE
        return cls(scores, tuple(json_lines(answers)) if answers.exists() else ())


def evaluate(
    chat: ModelLike,
    student: ModelLike | None = None,
    direction: Direction | None = None,
    prompts: PromptSet | None = None,
    config: EvaluateConfig | None = None,
    *,
    judge: Judge = declines,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure the base, with a direction its steered teacher, and with a student the student.

    Args:
        chat: The base: a ChatModel, a TransformerBridge, or (model, tokenizer).
        student: The trained model, measured in the precision of the base; None: left out.
        direction: Steers the base into the teacher; None: left out.
        prompts: Prompts with the split "test"; None: the project's own.
        config: How much is measured; None: the defaults.
        judge: Says which answers refuse; asked once per (prompt, answer).
        progress: Called with the share done.

    Returns:
        `scores` by model: rates from 0 to 1 with Wilson's 95 % intervals, KL from the base on harmless
        answers in nats per token with a bootstrap interval, perplexity; and `answers`, a row per prompt.

    Raises:
        SafeSteerError: For prompts without the split "test", or a direction of another model.

    Example:
        >>> config = ss.EvaluateConfig(n_prompts=2, max_new_tokens=3, perplexity_tokens=50)
        >>> list(ss.evaluate(chat, direction=direction, config=config).scores)
        ['base', 'teacher']
    """
    base, config, prompts = as_chat(chat), config or EvaluateConfig(), prompts or load_prompts()
    expect(EvaluateConfig, config)
    expect(PromptSet, prompts)
    if direction is not None:
        expect(Direction, direction)
    student = None if student is None else as_chat(student)
    test, cached = prompts.split("test").across(config.n_prompts), CachedJudge(judge)
    n_models = 1 + (direction is not None) + (student is not None)
    scores, answers = {}, {}
    with without_student(base, student):
        scores["base"], answers["base"] = score_model(base, base, test, config, judge=cached)
        along = drift_answers(base, test, config)
    progress(1 / n_models)
    if direction is not None:
        # Another value around the same weights: drift is measured against the base without the steering.
        teacher = replace(base)
        with without_student(base, student), steer(teacher, direction):
            scores["teacher"], answers["teacher"] = score_model(
                teacher, base, test, config, judge=cached, base_answers=along
            )
        progress(2 / n_models)
    if student is not None:
        with in_precision_of(base, student):
            scores["student"], answers["student"] = score_model(
                student, base, test, config, judge=cached, base_answers=along
            )
        progress(1.0)
    return Evaluation(scores, tuple(_rows(test, answers, cached)))


def _rows(test: PromptSet, answers: dict[str, dict[str, list[str]]], judge: Judge) -> list[dict[str, Any]]:
    """One row per prompt: every model's answer and verdict."""
    rows, version = [], judge_version(judge)
    for label in LABELS:
        prompts = [p for p in test.prompts if p.label == label]
        texts = [p.text for p in prompts]
        verdicts = {n: judge_all(judge, texts, by[label]) for n, by in answers.items()}
        for i, prompt in enumerate(prompts):
            row: dict[str, Any] = {**to_row(prompt.text), "label": label, "category": prompt.category}
            row["judge_version"] = version
            for name in answers:
                verdict = verdicts[name][i]
                row |= {name: answers[name][label][i], f"{name}_refuses": verdict.refuses}
                if verdict.harmful is not None:
                    row[f"{name}_harmful"] = verdict.harmful
            rows.append(row)
    return rows


def score_model(
    chat: ChatModel,
    base: ChatModel,
    prompts: PromptSet,
    config: EvaluateConfig | None = None,
    *,
    judge: Judge = declines,
    text: str | None = None,
    base_answers: Sequence[str | Sequence[int]] | None = None,
) -> tuple[Scores, dict[str, list[str]]]:
    """Score one model, possibly inside `steer(...)`; return its scores and greedy answers by label.

    Args:
        chat: The model.
        base: The base that drift is measured from; a model that is itself the base has no drift.
        prompts: Harmful and harmless prompts, of which the first `config.n_prompts` of each are used.
        config: How much is measured.
        judge: Says which answers refuse.
        text: Plain text for the perplexity; None: the project's own prose.
        base_answers: The base's greedy answers to the harmless prompts, as `kl_on_answers` takes them; None:
            the base is asked.
    """
    config = config or EvaluateConfig()
    prompts = prompts.first(config.n_prompts)
    greedy = partial(generate, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
    answers = {str(label): greedy(chat, prompts.texts(label)) for label in LABELS}
    verdicts = [v for label in LABELS for v in judge_all(judge, prompts.texts(label), answers[label])]
    counts, values = outcomes(verdicts)
    n = len(prompts.harmful)
    n_harmful, n_harmless = (sum(v is True for v in part) for part in (values[:n], values[n:]))
    unknown = (sum(v is None for v in values[:n]), sum(v is None for v in values[n:]))
    kls = [0.0] * len(prompts.harmless)
    if base_answers is None and chat is not base:
        with as_base(base, chat):
            base_answers = drift_answers(base, prompts, config)
    if base_answers is not None:
        kls = kl_on_answers(
            base,
            chat,
            prompts.harmless,
            base_answers,
            n_tokens=config.n_kl_tokens,
            batch_size=config.batch_size,
        )
    scores = Scores(
        refusal_rate_harmful=n_harmful / n,
        refusal_rate_harmful_ci=wilson(n_harmful, n),
        refusal_rate_harmless=n_harmless / len(prompts.harmless),
        refusal_rate_harmless_ci=wilson(n_harmless, len(prompts.harmless)),
        kl_harmless=float(np.mean(kls)),
        kl_harmless_ci=bootstrap(kls),
        perplexity=perplexity(
            chat,
            general_text() if text is None else text,
            max_tokens=config.perplexity_tokens,
            width=config.perplexity_width,
        ),
        n=n,
        counts=counts,
        n_harmless=None if len(prompts.harmless) == n else len(prompts.harmless),
        n_unknown=unknown,
    )
    return scores, answers
