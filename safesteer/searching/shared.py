"""What trials share: everything that their settings do not change is made once.

    once                       refusal tokens, activations, candidates; the base's answers to val
    per setting of the sweep   the scores of all candidates (a range of layers only leaves some of them out)
    per setting of stage 1     the direction
    per direction and horizon  the answers that S is voted on (and per other settings of sampling)
    per direction and setting  S

What is made is what `find_direction` and `select_tokens` make with the trial's recipe, so `align` with that
recipe repeats the trial. It is kept in memory: a search that goes on makes it again where it is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from safesteer.directions.finding import CandidateReading, choose_candidate
from safesteer.directions.sweeping import Sweep, sweep
from safesteer.evaluation.measuring import Measured
from safesteer.judges.judge import Judge
from safesteer.models.chat_model import ChatModel
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.settings import DirectionConfig, TokenConfig
from safesteer.steering.direction import Direction
from safesteer.tokens.sampling import AnswerStates, sample_answers
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenSet

Place = tuple[str, int, float]  # position, layer and coefficient of a direction
N_SAMPLED = 4  # directions whose sampled answers stay in memory


@dataclass(frozen=True, eq=False)
class Shared:
    """What the trials of a search share, filled as they need it.

    `val` holds the val prompts in a drawn order, so that its first few are of all kinds. `measured` is what
    the base does with them, `along` the ids of its answers along which drift is measured. Candidates are
    scored up to `max_layer_share` of the depth; `chooser` judges answers where a direction is chosen by them.
    """

    base: ChatModel
    prompts: PromptSet
    val: PromptSet
    reading: CandidateReading
    measured: Measured
    along: Sequence[Sequence[int]]
    max_layer_share: float
    chooser: Judge
    sweeps: dict[DirectionConfig, Sweep] = field(default_factory=dict)
    directions: dict[DirectionConfig, Direction] = field(default_factory=dict)
    sampled: dict[tuple[Place, TokenConfig], AnswerStates] = field(default_factory=dict)
    tokens: dict[tuple[Place, TokenConfig], TokenSet] = field(default_factory=dict)


def drawn_val(prompts: PromptSet, seed: int) -> PromptSet:
    """Return val in a drawn order, as many of each kind, harmful ones first; twins stay at one place."""
    val = prompts.split("val")
    kinds = [[p for p in val.prompts if p.label == label] for label in LABELS]
    orders = [np.random.default_rng(seed).permutation(len(kind)) for kind in kinds]
    drawn = (kind[i] for kind, order in zip(kinds, orders, strict=True) for i in order)
    return PromptSet(tuple(drawn), val.name).first(min(map(len, kinds)))


def are_twins(val: PromptSet) -> bool:
    """Return whether harmful and harmless prompt i are the same pair, for every i."""
    harmful, harmless = ([p.pair for p in val.prompts if p.label == label] for label in LABELS)
    return harmful == harmless and all(harmful)


def shared_direction(shared: Shared, config: DirectionConfig) -> Direction:
    """Choose the direction as `find_direction` does.

    Raises:
        SafeSteerError: Where no candidate passes the thresholds.
    """
    if config in shared.directions:
        return shared.directions[config]
    base, reading = shared.base, shared.reading
    # Controls and held-out scores choose nothing.
    wide = replace(config, max_layer_share=shared.max_layer_share, n_controls=0, n_held_out=0)
    if wide not in shared.sweeps:
        scored = reading.suited.first(config.n_val)
        shared.sweeps[wide] = sweep(base, reading.candidates, scored, reading.refusal.ids, wide)
    ranked = shared.sweeps[wide].up_to(config.max_layer_share)
    val = shared.prompts.split("val")
    direction, _ = choose_candidate(base, ranked, reading.read, val, shared.chooser, config)
    shared.directions[config] = direction
    return direction


def shared_tokens(shared: Shared, direction: Direction, config: TokenConfig) -> TokenSet:
    """Select S as `select_tokens` does on the val prompts.

    Raises:
        SafeSteerError: Where no token may be selected.
    """
    place = direction.position, direction.layer, direction.coeff
    if (place, config) not in shared.tokens:
        texts = shared.prompts.split("val").texts(config.prompts)
        key = place, replace(config, k=1, k_vote=1, min_steered_prob=0.0, method="vote")  # what samples
        if key not in shared.sampled:
            while len(shared.sampled) >= N_SAMPLED:
                shared.sampled.pop(next(iter(shared.sampled)))
            shared.sampled[key] = sample_answers(shared.base, direction, texts, config)
        made = select_tokens(shared.base, direction, texts, config, sampled=shared.sampled[key])
        shared.tokens[place, config] = made
    return shared.tokens[place, config]
