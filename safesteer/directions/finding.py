"""Stage 1 as one call: find the direction that turns the model into a teacher (paper section 3.2).

1. Learn which first tokens start a refusal in this model, and how often its own answers refuse.
2. Read one candidate direction per position and layer from the train split, through a TransformerBridge.
3. Score the candidates on the val split and rank them.
4. Take the best one; where candidates are ranked by steering, compare the answers of the best few.

A direction of your own (the setting `file`) is the one candidate: it is scored, and taken as it is.
"""

import html
from dataclasses import dataclass, field, replace

import pandas as pd

from safesteer._errors import SafeSteerError, expect
from safesteer.directions.calibration import ANSWER_TOKENS, choose_direction, refusal_rate
from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import (
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.directions.refusal_tokens import (
    RefusalTokens,
    filter_by_refusal,
    learn_refusal_tokens,
)
from safesteer.directions.sweeping import Sweep, ranked_by, sweep
from safesteer.judges.judge import Judge
from safesteer.judges.wording import refuses
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.progress import Progress, no_progress
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.settings import DirectionConfig
from safesteer.steering.direction import Direction

EXTRACTIONS = {
    "instruction": mean_difference,
    "prefill": prefill_contrast,
    "system": system_contrast,
    "pca": pca_difference,
    "probe": logistic_probe,
}


MIN_PASSING = 8  # prompts of each kind, for the extraction "auto"


@dataclass(frozen=True, eq=False, repr=False)
class ChosenDirection(Direction):
    """A direction with what it was chosen from; saving it saves the direction alone.

    `sweep` holds every candidate with its scores, `refusal_tokens` the tokens that the scores are about,
    `native_share` the share of harmful val prompts whose greedy answers refuse without steering, `n_harmful`
    the harmful prompts that it was read from (0 for one of your own) and scored on, and `rates` the refusal
    rates by layer and coefficient (None where candidates were ranked by ablation).
    """

    sweep: Sweep = field(kw_only=True)
    refusal_tokens: RefusalTokens = field(kw_only=True)
    native_share: float = field(kw_only=True)
    n_harmful: tuple[int, int] = field(kw_only=True)
    rates: pd.DataFrame | None = field(default=None, kw_only=True)

    def story(self) -> list[str]:
        """Return a few lines that say how the direction was chosen."""
        names = {"instruction": "difference of means", "prefill": "prefill contrast"}
        n_read, n_scored = self.n_harmful
        origin = (
            f"direction read by {names.get(self.extraction, self.extraction)}, from {n_read} harmful prompts"
            if n_read
            else "a direction of your own"
        )
        lines = [
            f"{self.refusal_tokens}",
            f"the model refuses {self.native_share:.0%} of harmful val prompts by itself; {origin},"
            f" scored on {n_scored}",
        ]
        if self.rates is not None:
            lines.append(f"compared by its answers, it refuses {self.rates.refusal_rate.max():.0%}")
        return [*lines, repr(self)]

    def _repr_html_(self) -> str:
        return f"<p>{'<br>'.join(map(html.escape, self.story()))}</p>{self.sweep._repr_html_()}"


@dataclass(frozen=True, eq=False)
class CandidateReading:
    """What stage 1 reads before it scores: nothing of it depends on a coefficient or on a range of layers.

    `native_share` is the share of harmful val prompts that the model refuses by itself; the candidates come
    from the prompts `read`, and may be scored on those in `suited`. `provided` is a direction of the setting
    `file`, of which the candidates consist.
    """

    refusal: RefusalTokens
    native_share: float
    candidates: Candidates
    read: PromptSet
    suited: PromptSet
    provided: Direction | None = None


def _bridged(chat: ChatModel) -> ModelLike:
    """Return the TransformerLens bridge of a model, or the model where there is none: both read alike."""
    try:
        return to_bridge(chat)
    except SafeSteerError:
        return chat


def find_direction(
    chat: ModelLike,
    prompts: PromptSet | None = None,
    config: DirectionConfig | None = None,
    *,
    judge: Judge = refuses,
    progress: Progress = no_progress,
) -> ChosenDirection:
    """Find the direction that makes `chat` refuse, and how strongly to add it.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful and harmless prompts with the splits "train" and "val"; None: the project's own.
        config: Settings of stage 1; None: the defaults.
        judge: Says which answers refuse.
        progress: Called with the share done, from 0 to 1.

    Returns:
        A Direction that carries the sweep it was chosen from.

    Raises:
        SafeSteerError: If no candidate passes the thresholds; the sentence names the nearest miss. For a
            `file` that holds no direction of this model, or one that is not added.

    Example:
        >>> config = ss.DirectionConfig(n_train=4, n_val=2, n_compare_prompts=2, extraction="prefill")
        >>> ss.find_direction(chat, config=config).extraction
        'prefill'
    """
    chat, prompts, config = as_chat(chat), prompts or load_prompts(), config or DirectionConfig()
    expect(PromptSet, prompts)
    expect(DirectionConfig, config)
    val = prompts.split("val")
    # 1. and 2. Refusals and candidates
    reading = read_candidates(chat, prompts, config, judge)
    provided = reading.provided
    if provided is not None:
        config = _settled_for(provided, config)
    # 3. Scores
    scored = reading.suited.first(config.n_val)
    by_answers = config.coeff is None and ranked_by(reading.candidates, config) == "steering"
    share = 0.5 if by_answers else 1.0  # comparing answers costs about as much
    result = sweep(
        chat,
        reading.candidates,
        scored,
        reading.refusal.ids,
        config,
        held_out=reading.suited.after(config.n_val),
        progress=lambda done: progress(share * done),
    )
    # 4. The direction and its coefficient
    direction, rates = choose_candidate(
        chat, result, reading.read, val, judge, config, lambda done: progress(share + (1 - share) * done)
    )
    if provided is not None:
        direction = provided.with_coeff(direction.coeff)
    return ChosenDirection(
        vector=direction.vector,
        **direction.metadata,
        sweep=result,
        refusal_tokens=reading.refusal,
        native_share=reading.native_share,
        n_harmful=(0 if provided else len(reading.read.harmful), len(scored.harmful)),
        rates=rates,
    )


def read_candidates(
    chat: ChatModel, prompts: PromptSet, config: DirectionConfig, judge: Judge = refuses
) -> CandidateReading:
    """Take steps 1 and 2: learn the model's refusals, and read a candidate per position and layer.

    Args:
        chat: The model.
        prompts: Prompts with the splits "train" and "val".
        config: Settings of stage 1; those of scores and coefficients are not read.
        judge: Says which answers refuse.
    """
    provided = None if config.file is None else _own_direction(chat, config)
    train, val = prompts.split("train").across(config.n_train), prompts.split("val").across(None)
    refusal = learn_refusal_tokens(chat, val.harmful, val.harmless, judge)
    native = refusal_rate(chat, val.harmful, judge, ANSWER_TOKENS)
    if provided is not None:
        only = Candidates.only(provided, chat.n_layers)
        return CandidateReading(refusal, native, only, train, val, provided)
    extraction, read, suited = _readable(chat, train, val, refusal, native, config)
    batch_size = config.batch_size or 32
    candidates = EXTRACTIONS[extraction](_bridged(chat), read, batch_size=batch_size, seed=config.seed)
    return CandidateReading(refusal, native, candidates, read, suited)


def _own_direction(chat: ChatModel, config: DirectionConfig) -> Direction:
    """Load the direction that stands in place of candidates.

    Raises:
        SafeSteerError: For a file that holds none of this model, or one that is not added.
    """
    provided = Direction.load(str(config.file), chat)
    if provided.operation != "add":
        raise SafeSteerError(
            f"{config.file} holds a direction of operation '{provided.operation}', and a teacher adds its"
            " direction: save one of operation 'add'."
        )
    if config.coeff is None and not provided.coeff > 0:
        raise SafeSteerError(
            f"{config.file} holds the coefficient {provided.coeff:g}, and a teacher adds its direction: save"
            " it with one above 0, and the vector negated where it points away from refusing."
        )
    return provided


def _settled_for(provided: Direction, config: DirectionConfig) -> DirectionConfig:
    """Keep what came with a direction: its coefficient and layer; thresholds act only where asked for."""
    coeff = provided.coeff if config.coeff is None else config.coeff
    rank_by = "steering" if config.rank_by == "auto" else config.rank_by
    return replace(config, coeff=coeff, rank_by=rank_by, max_layer_share=1.0)


def _readable(
    chat: ChatModel,
    train: PromptSet,
    val: PromptSet,
    refusal: RefusalTokens,
    native: float,
    config: DirectionConfig,
) -> tuple[str, PromptSet, PromptSet]:
    """Choose the extraction; return it with the prompts that it reads and those that it may be scored on."""
    extraction = config.extraction
    if extraction == "auto":
        extraction = "instruction" if native >= config.native_share else "prefill"
    if extraction != "instruction":
        return extraction, train, val
    strict = config.extraction == "instruction"
    read, suited = (_filtered(chat, split, refusal, strict) for split in (train, val))
    return extraction, read, suited


def _filtered(chat: ChatModel, split: PromptSet, refusal: RefusalTokens, strict: bool) -> PromptSet:
    """Filter prompts as published; if not `strict`, only where enough of them pass.

    A model can refuse many prompts with first tokens that are no likelier than all others together: then the
    filter would leave a direction, or its choice, to a prompt or two.
    """
    try:
        passing = filter_by_refusal(chat, split, refusal.ids)
    except SafeSteerError:  # none pass
        if strict:
            raise
        return split
    enough = min(len(passing.harmful), len(passing.harmless)) >= MIN_PASSING
    return passing if strict or enough else split


def choose_candidate(
    chat: ChatModel,
    result: Sweep,
    train: PromptSet,
    val: PromptSet,
    judge: Judge,
    config: DirectionConfig,
    progress: Progress = no_progress,
) -> tuple[Direction, pd.DataFrame | None]:
    """Take step 4: the best candidate; where they are ranked by steering, the one whose answers refuse.

    Args:
        chat: The model.
        result: The scores of all candidates.
        train: The prompts that the candidates were read from.
        val: Prompts of which harmful ones are answered.
        judge: Says which answers refuse.
        config: Settings of stage 1.
        progress: Called with the share done.

    Returns:
        The direction with its coefficient, and the refusal rates where answers were compared.
    """
    directions = result.directions(chat, train)
    if config.coeff is None and result.rank_by == "steering":
        prompts = val.harmful[: config.n_compare_prompts]
        return choose_direction(chat, directions, prompts, judge, n_best=config.n_compared, progress=progress)
    progress(1.0)
    return directions[0].with_coeff(1.0 if config.coeff is None else config.coeff), None
