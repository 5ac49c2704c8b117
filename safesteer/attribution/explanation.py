"""Everything the report says about tokens, computed once: traces, stories, coverage, stability.

1. Sample the steered teacher on harmless prompts again, as selection did (fewer prompts), and on
   harmful ones; read the base model's own answers to harmful prompts too.
2. Stability from step 1's harmless rollouts; it also gives the ranking that goes on after S.
3. The story of each token; coverage on the three kinds of text; fractions of answers with S.
4. Traces of a few answers, written by the student, the teacher and the base model.
`Attribution` is one value with one JSON file.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._files import read_json, write_json
from safesteer._progress import Progress, no_progress
from safesteer._settings import AT_LEAST_1, check_settings
from safesteer.attribution.coverage import (
    AnswerShare,
    Coverage,
    TextCoverage,
    containing,
    matched_sets,
    read_answers,
    source_coverage,
    totals,
)
from safesteer.attribution.stability import Stability, stability
from safesteer.attribution.stories import Why, why
from safesteer.attribution.tracing import Trace, trace
from safesteer.attribution.votes import Means, allowed_ids
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate
from safesteer.prompts.prompt_set import PromptSet
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.selection import AnswerStates, banned_ids, sample_answers
from safesteer.tokens.token_set import TokenConfig, TokenSet

KS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200)


@dataclass(frozen=True)
class ExplainConfig:
    """How much to compute. Prompts, samples and texts are what costs time."""

    n_prompts: int = 16  # harmless prompts that stability and stories are read from
    n_harmful: int = 8  # harmful prompts for coverage
    n_samples: int = 4
    n_traces: int = 6
    max_tokens: int = 32
    n_sets: int = 8  # random and matched sets
    n_splits: int = 8  # halvings of prompts and of samples
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_prompts", "n_harmful", "n_samples", "max_tokens", "n_sets", "n_splits")
        check_settings(self, "explain", dict.fromkeys(sizes, AT_LEAST_1))


@dataclass(frozen=True, repr=False)
class Attribution:
    """Which tokens, why, how much they cover, how stable they are. One JSON file."""

    traces: tuple[Trace, ...]
    why: dict[int, Why]
    coverage: Coverage
    stability: Stability

    def __repr__(self) -> str:
        parts = "; ".join(
            f"S carries {_at(s, 'S'):.0%} of KL on {s.name} (matched sets"
            f" {_at(s, 'matched in base probability'):.0%})"
            for s in self.coverage.sources
        )
        return f"Attribution({len(self.traces)} traces, {len(self.why)} tokens: {parts})"

    def save(self, path: str | Path) -> None:
        raw = asdict(self)
        raw["why"] = {str(k): v for k, v in raw["why"].items()}
        write_json(Path(path), raw)

    @classmethod
    def load(cls, path: str | Path) -> "Attribution":
        raw = read_json(Path(path))
        try:
            raw["why"] = {int(k): v for k, v in raw["why"].items()}
            return _revive(cls, raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SafeSteerError(f"{path} is not an attribution file of this version.") from error


def _at(source: TextCoverage, family: str) -> float:
    """The share of KL that a family carries at the size of S."""
    curve = next(c for c in source.curves if c.name == family)
    return curve.kl_share.mean[source.ks.index(source.k)]


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _revive(kind: Any, raw: Any) -> Any:
    """JSON back into nested frozen dataclasses, following the annotations."""
    if is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{f.name: _revive(hints[f.name], raw[f.name]) for f in fields(kind)})  # type: ignore[misc, operator]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        kinds = [args[0]] * len(raw) if args[1:] == (...,) else args
        return tuple(_revive(k, v) for k, v in zip(kinds, raw, strict=True))
    if origin is dict:
        return {k: _revive(args[1], v) for k, v in raw.items()}
    if origin in (UnionType, typing.Union):
        rest = [a for a in args if a is not type(None)]
        return None if raw is None else _revive(rest[0], raw)
    return raw


@torch.no_grad()
def explain(
    base: ChatModel,
    student: ChatModel | None,
    direction: Direction,
    tokens: TokenSet,
    prompts: PromptSet,
    answers: Sequence[Mapping[str, Any]] = (),
    config: ExplainConfig | None = None,
    *,
    sampled: AnswerStates | None = None,
    groups: Mapping[str | int, str] | None = None,
    progress: Progress = no_progress,
) -> Attribution:
    """Explain S. `prompts` are those it was selected on; `answers` are rows of answers.jsonl.

    Without answers a few are generated. `sampled` reuses the rollouts of the selection; otherwise
    the teacher is sampled again with the settings in `tokens`. `groups` overrides token groups.
    """
    config = config or ExplainConfig()
    chosen = TokenConfig(**tokens.settings)
    settings = replace(chosen, n_samples=min(chosen.n_samples, config.n_samples))
    selection = prompts.harmless if chosen.prompts == "harmless" else prompts.harmful
    sampled = sampled or sample_answers(base, direction, selection[: config.n_prompts], settings)
    progress(0.2)
    stable, ranking, means = stability(
        base, sampled, settings, ks=KS, n_splits=config.n_splits, seed=config.seed
    )
    allowed = allowed_ids(base, means, settings)
    progress(0.4)
    stories = why(base, direction, tokens, sampled, settings, allowed, groups=groups)
    progress(0.5)
    answers = list(answers) or _answers(base, student, direction, prompts, config)
    covered = _coverage(
        base, direction, tokens, prompts, answers, sampled, settings, config, allowed, ranking, means
    )
    progress(0.8)
    wanted = pick_traces(answers, config.n_traces, with_student=student is not None)
    traces = trace(
        base,
        student,
        direction,
        tokens,
        [row["prompt"] for row, _ in wanted],
        [row[author] for row, author in wanted],
        labels=[row["label"] for row, _ in wanted],
        authors=[author for _, author in wanted],
        max_tokens=config.max_tokens,
    )
    progress(1.0)
    return Attribution(tuple(t for t in traces if t.tokens), stories, covered, stable)


def _answers(
    base: ChatModel,
    student: ChatModel | None,
    direction: Direction,
    prompts: PromptSet,
    config: ExplainConfig,
) -> list[dict[str, Any]]:
    """A few greedy answers of each model, in the form of answers.jsonl (without judgements)."""
    few = prompts.first(max(2, config.n_traces // 3))
    texts = [*few.harmful, *few.harmless]
    said = {"base": generate(base, texts, max_new_tokens=config.max_tokens)}
    with steer(base, direction):
        said["teacher"] = generate(base, texts, max_new_tokens=config.max_tokens)
    if student is not None:
        said["student"] = generate(student, texts, max_new_tokens=config.max_tokens)
    labels = ["harmful"] * len(few.harmful) + ["harmless"] * len(few.harmless)
    return [
        {"prompt": p, "label": label, **{name: rows[i] for name, rows in said.items()}}
        for i, (p, label) in enumerate(zip(texts, labels, strict=True))
    ]


def pick_traces(
    answers: Sequence[Mapping[str, Any]], n: int, *, with_student: bool
) -> list[tuple[Mapping[str, Any], str]]:
    """(row, author) of the answers to trace: harmful ones before and after, then harmless ones.

    Prompts whose judgement changed come first.
    """
    after = "student" if with_student else "teacher"

    def changed(row: Mapping[str, Any]) -> bool:
        return row.get(f"{after}_refuses") != row.get("base_refuses")

    rows = sorted(answers, key=lambda row: not changed(row))
    harmful = [r for r in rows if r["label"] == "harmful" and r.get(after)]
    harmless = [r for r in rows if r["label"] == "harmless" and r.get(after)]
    n_pairs = max(1, n // 3)
    wanted = [(r, author) for r in harmful[:n_pairs] for author in (after, "base")]
    wanted += [(r, after) for r in harmless]
    return [(r, author) for r, author in wanted if r.get(author)][:n]


def _coverage(
    base: ChatModel,
    direction: Direction,
    tokens: TokenSet,
    prompts: PromptSet,
    answers: Sequence[Mapping[str, Any]],
    sampled: AnswerStates,
    settings: TokenConfig,
    config: ExplainConfig,
    allowed: Bool[Tensor, " d_vocab"],
    ranking: list[int],
    means: Means,
) -> Coverage:
    """Step 3: coverage on sampled and on given texts."""
    in_s = set(tokens.ids.tolist())
    ranked: Int[Tensor, " n"] = torch.tensor([*tokens.ids.tolist(), *(v for v in ranking if v not in in_s)])
    ordinary = ~banned_ids(base)
    few = prompts.harmful[: config.n_harmful]
    seeded = replace(settings, seed=settings.seed + 1, n_samples=config.n_samples)
    texts: list[tuple[str, AnswerStates]] = [
        (f"steered samples, {settings.prompts} prompts (as in selection)", sampled),
        ("steered samples, harmful prompts", sample_answers(base, direction, few, seeded)),
    ]
    harmful = [r for r in answers if r["label"] == "harmful"]
    given = [r for r in harmful if not r.get("base_refuses")][: config.n_harmful]
    if given:
        said = [r["prompt"] for r in given], [r["base"] for r in given]
        read = read_answers(base, direction, *said, max_tokens=config.max_tokens)
        texts.append(("base model's answers to harmful prompts", read))
    sources = tuple(
        source_coverage(
            name,
            totals(base, read),
            ranked,
            len(tokens),
            KS,
            allowed,
            ordinary,
            n_sets=config.n_sets,
            seed=config.seed,
        )
        for name, read in texts
        if bool(read.valid.any())
    )
    k, n_sets, seed = len(tokens), config.n_sets, config.seed
    matched = matched_sets(tokens.ids, k, means.p_base, ordinary, n_sets, seed)
    return Coverage(len(tokens), sources, _containing(base, tokens, answers, matched, config))


def _containing(
    base: ChatModel,
    tokens: TokenSet,
    answers: Sequence[Mapping[str, Any]],
    matched: list[Tensor],
    config: ExplainConfig,
) -> tuple[AnswerShare, ...]:
    kinds: dict[str, list[str]] = {}
    for row in answers:
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
        containing(base.tokenizer, kind, texts, tokens.ids, matched, max_tokens=config.max_tokens)
        for kind, texts in sorted(kinds.items())
    )
