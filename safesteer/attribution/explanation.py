"""Compute everything the report says about tokens: traces, stories, coverage, stability.

1. Sample the steered teacher on harmless prompts as selection did, with its seed: the same answers to the
   first prompts. Sample it on harmful ones, which selection has not read; read the base model's own answers
   to harmful prompts too.
2. Stability from step 1's answers to harmless prompts; it also gives the ranking that goes on after S.
3. The story of each token; coverage on the three kinds of text; shares of answers with a token of S.
4. Traces of a few answers, written by the student, the teacher and the base model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safesteer._errors import expect
from safesteer.attribution.coverage import (
    AnswerShare,
    Controls,
    Coverage,
    answer_share,
    matched_sets,
    read_answers,
    sum_by_step,
    text_coverage,
)
from safesteer.attribution.result import Attribution
from safesteer.attribution.stability import Reselection, measure_stability
from safesteer.attribution.stories import token_stories
from safesteer.attribution.tracing import Trace, trace
from safesteer.attribution.votes import allowed_ids
from safesteer.models.adapter import without_student
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.generation import generate
from safesteer.progress import Progress, no_progress
from safesteer.prompts.conversation import from_row
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.settings import ExplainConfig, TokenConfig
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.sampling import AnswerStates, sample_answers
from safesteer.tokens.selection import banned_ids
from safesteer.tokens.token_set import TokenSet


@dataclass(frozen=True, eq=False)
class _Subject:
    """What is explained, and from what: the arguments of `explain`, filled in."""

    chat: ChatModel
    direction: Direction
    tokens: TokenSet
    student: ChatModel | None
    prompts: PromptSet
    answers: Sequence[Mapping[str, Any]]
    config: ExplainConfig

    @property
    def sampling(self) -> TokenConfig:
        """The settings of the selection, with fewer samples."""
        chosen = TokenConfig(**self.tokens.settings)
        return replace(chosen, n_samples=min(chosen.n_samples, self.config.n_samples))


@torch.no_grad()
def explain(
    chat: ModelLike,
    direction: Direction,
    tokens: TokenSet,
    student: ModelLike | None = None,
    *,
    prompts: PromptSet | None = None,
    answers: Sequence[Mapping[str, Any]] = (),
    config: ExplainConfig | None = None,
    progress: Progress = no_progress,
) -> Attribution:
    """Explain the safety tokens: why each was selected, how much they cover, how stable they are.

    Args:
        chat: The base model.
        direction: The steering direction that makes the teacher. Where the prompt teacher selected S, sampled
            answers and what is counted on them are that teacher's, and all else is about steering.
        tokens: The safety tokens S.
        student: The distilled model, if there is one; it appears in traces.
        prompts: The prompts that S was selected on; by default the val split of our own.
        answers: Rows of answers.jsonl (prompt, label, the answer of each model, `base_refuses` ...; of a
            conversation its messages). Without them a few answers are generated.
        config: How much to compute.
        progress: Receives the share of the work that is done.

    Returns:
        A value that prints, renders in a notebook, gives a table and saves.

    Raises:
        SafeSteerError: For a direction or safety tokens of another model, or where no position counts.

    Example:
        >>> from safesteer.attribution.explanation import explain
        >>> from safesteer.settings import ExplainConfig
        >>> prompts = ss.load_prompts().split("val").first(4)
        >>> config = ExplainConfig(n_prompts=4, n_harmful=2, n_traces=1, max_tokens=8, n_sets=2, n_splits=2)
        >>> attribution = explain(chat, direction, tokens, prompts=prompts, config=config)
        >>> len(attribution.to_frame()) == len(tokens)
        True
    """
    prompts, config = prompts or load_prompts().split("val"), config or ExplainConfig()
    expect(Direction, direction)
    expect(TokenSet, tokens)
    expect(PromptSet, prompts)
    expect(ExplainConfig, config)
    subject = _Subject(
        chat=as_chat(chat),
        direction=direction,
        tokens=tokens,
        student=None if student is None else as_chat(student),
        prompts=prompts,
        answers=[{**row, "prompt": from_row(row)} for row in answers],
        config=config,
    )
    tokens.check(subject.chat)
    base, k_vote = subject.chat, subject.sampling.k_vote
    with without_student(base, subject.student):
        sampled = _sample(subject)
        progress(0.2)
        stable = _stability(subject, sampled)
        allowed = allowed_ids(base, stable.means, subject.sampling)
        allowed[tokens.ids] = True  # on fewer answers the mean of a rare one may fall below the threshold
        progress(0.4)
        stories = token_stories(base, direction, tokens, sampled, allowed, k_vote=k_vote)
    progress(0.5)
    if not answers:
        subject = replace(subject, answers=_generate_answers(subject))
    with without_student(base, subject.student):
        coverage = _coverage(subject, sampled, stable, allowed)
    progress(0.8)
    traces = _traces(subject)
    progress(1.0)
    return Attribution(traces, stories, coverage, stable.stability)


def _sample(subject: _Subject) -> AnswerStates:
    """Sample answers of the teacher to the prompts that S was selected on (step 1)."""
    sampling, prompts = subject.sampling, subject.prompts
    texts = prompts.harmless if sampling.prompts == "harmless" else prompts.harmful
    return sample_answers(subject.chat, subject.direction, texts[: subject.config.n_prompts], sampling)


def _stability(subject: _Subject, sampled: AnswerStates) -> Reselection:
    """Select S again from parts of the answers (step 2)."""
    config = subject.config
    return measure_stability(
        subject.chat, sampled, subject.sampling, n_splits=config.n_splits, seed=config.seed
    )


def _generate_answers(subject: _Subject) -> list[dict[str, Any]]:
    """Generate a few greedy answers of each model, in the form of answers.jsonl (without judgements)."""
    chat, config = subject.chat, subject.config
    prompts = subject.prompts.first(max(2, config.n_traces // 3))
    texts = [*prompts.harmful, *prompts.harmless]
    with without_student(chat, subject.student):
        answers = {"base": generate(chat, texts, max_new_tokens=config.max_tokens)}
        with steer(chat, subject.direction):
            answers["teacher"] = generate(chat, texts, max_new_tokens=config.max_tokens)
    if subject.student is not None:
        answers["student"] = generate(subject.student, texts, max_new_tokens=config.max_tokens)
    labels = ["harmful"] * len(prompts.harmful) + ["harmless"] * len(prompts.harmless)
    return [
        {"prompt": p, "label": label, **{author: rows[i] for author, rows in answers.items()}}
        for i, (p, label) in enumerate(zip(texts, labels, strict=True))
    ]


def _coverage(
    subject: _Subject, sampled: AnswerStates, stable: Reselection, allowed: Bool[Tensor, " d_vocab"]
) -> Coverage:
    """Measure coverage on sampled answers and on the base model's own (step 3)."""
    chat, tokens, config = subject.chat, subject.tokens, subject.config
    author = {"steered": "steered", "prompt": "prompted"}[subject.sampling.teacher]
    texts = [
        (f"{author} samples, {subject.sampling.prompts} prompts (as in selection)", sampled),
        (f"{author} samples, harmful prompts", _sample_harmful(subject)),
    ]
    complied = [r for r in subject.answers if r["label"] == "harmful" and _complied(r)]
    complied = complied[: config.n_harmful]
    if complied:
        pair = [r["prompt"] for r in complied], [r["base"] for r in complied]
        states = read_answers(chat, subject.direction, *pair, max_tokens=config.max_tokens)
        texts.append(("base model's answers to harmful prompts", states))
    ids, controls = tokens.ids.tolist(), Controls(allowed, ~banned_ids(chat), config.n_sets, config.seed)
    in_s = set(ids)
    ranking: Int[Tensor, " n"] = torch.tensor([*ids, *(v for v in stable.ranking if v not in in_s)])
    covered = tuple(
        text_coverage(name, sum_by_step(chat, states), ranking, len(ids), controls)
        for name, states in texts
        if bool(states.valid.any())
    )
    matched = matched_sets(tokens.ids, len(ids), stable.means.p_base, controls)
    return Coverage(len(ids), covered, _answer_shares(subject, matched))


def _complied(row: Mapping[str, Any]) -> bool:
    """Say whether the base's answer counts as help: by the verdict that there is, else it does."""
    harmful = row.get("base_harmful")
    return not row.get("base_refuses") if harmful is None else bool(harmful)


def _sample_harmful(subject: _Subject) -> AnswerStates:
    config, sampling = subject.config, subject.sampling
    seeded = replace(sampling, seed=sampling.seed + 1, n_samples=config.n_samples)
    return sample_answers(
        subject.chat, subject.direction, subject.prompts.harmful[: config.n_harmful], seeded
    )


def _answer_shares(subject: _Subject, matched: list[Tensor]) -> tuple[AnswerShare, ...]:
    """Count judged answers with a token of S, by author and judgement (end of step 3)."""
    kinds: dict[str, list[str]] = {}
    for row in subject.answers:
        for author in ("base", "teacher", "student"):
            refuses = row.get(f"{author}_refuses")
            if author not in row or refuses is None:
                continue
            if refuses:
                kinds.setdefault(f"refusals by the {author}", []).append(row[author])
            elif author == "base":
                kind = f"base answers to {row['label']} prompts that do not refuse"
                kinds.setdefault(kind, []).append(row[author])
    return tuple(
        answer_share(
            subject.chat, kind, texts, subject.tokens.ids, matched, max_tokens=subject.config.max_tokens
        )
        for kind, texts in sorted(kinds.items())
    )


def _traces(subject: _Subject) -> tuple[Trace, ...]:
    """Trace a few answers (step 4)."""
    config, student = subject.config, subject.student
    picked = pick_traces(subject.answers, config.n_traces, with_student=student is not None)
    traces = trace(
        subject.chat,
        subject.direction,
        subject.tokens,
        [row["prompt"] for row, _ in picked],
        [row[author] for row, author in picked],
        student,
        authors=[author for _, author in picked],
        max_tokens=config.max_tokens,
    )
    labelled = [replace(t, label=row["label"]) for t, (row, _) in zip(traces, picked, strict=True)]
    return tuple(t for t in labelled if t.tokens)


def pick_traces(
    answers: Sequence[Mapping[str, Any]], n: int, *, with_student: bool
) -> list[tuple[Mapping[str, Any], str]]:
    """Pick (row, author) of the answers to trace: harmful ones before and after, then harmless ones.

    Prompts whose judgement changed come first.
    """
    after = "student" if with_student else "teacher"

    def changed(row: Mapping[str, Any]) -> bool:
        return row.get(f"{after}_refuses") != row.get("base_refuses")

    rows = sorted(answers, key=lambda row: not changed(row))
    harmful = [r for r in rows if r["label"] == "harmful" and r.get(after)]
    harmless = [r for r in rows if r["label"] == "harmless" and r.get(after)]
    n_pairs = max(1, n // 3)
    picked = [(r, author) for r in harmful[:n_pairs] for author in (after, "base")]
    picked += [(r, after) for r in harmless]
    return [(r, author) for r, author in picked if r.get(author)][:n]
