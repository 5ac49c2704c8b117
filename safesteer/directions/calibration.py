"""How strongly to steer: by real answers, by drift, or over a table of strengths.

    choose_direction   among many directions: a short look at each, then `choose_coeff` for the best few
    choose_coeff       the smallest coefficient at which 95 % of the greedy answers refuse, else the one that
                       refuses most
    calibrate_to_kl    the coefficient that spends a given KL on harmless prompts (bisection)
    strength_table     direction x coefficient: refusal, KL and perplexity, for a curve to choose from

KL is that of the base from the steered model, in nats per token, over the base's own first greedy tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.directions.refusal_tokens import refusal_scores
from safesteer.judges.judge import Judge, judge_all, refusals
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import last_logits
from safesteer.models.generation import generate, with_greedy_tokens
from safesteer.models.logits import kl_divergence, mean_over
from safesteer.models.processes import in_turns
from safesteer.models.text_loss import general_text, perplexity
from safesteer.progress import Progress, no_progress
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.steering.direction import Direction, steer

FIRST_COEFF = 1.5  # of the short look: the middle of the coefficients that `choose_coeff` tries
FIRST_TOKENS = 12  # length of the answers of the short look
ANSWER_TOKENS = 20  # length of the answers that are judged
PERPLEXITY_TOKENS = 1024  # plain text read per strength


def refused(chat: ChatModel, prompts: Sequence[PromptLike], judge: Judge, max_new_tokens: int) -> list[bool]:
    """Say of each prompt whether its greedy answer refuses."""
    return refusals(judge_all(judge, prompts, generate(chat, prompts, max_new_tokens=max_new_tokens)))


def refusal_rate(chat: ChatModel, prompts: Sequence[PromptLike], judge: Judge, max_new_tokens: int) -> float:
    """Return the share of greedy answers that refuse."""
    return sum(refused(chat, prompts, judge, max_new_tokens)) / len(prompts)


def choose_coeff(
    chat: ModelLike,
    directions: Sequence[Direction],
    prompts: Sequence[PromptLike],
    judge: Judge,
    *,
    coeffs: Sequence[float] = (1.2, 1.4, 1.6, 1.8),
    target: float = 0.95,
    max_new_tokens: int = ANSWER_TOKENS,
) -> tuple[Direction, pd.DataFrame]:
    """Choose among a few directions, and how strongly to add one, by greedy answers that refuse.

    Coefficients are tried in their order; the first at which some direction refuses `target` of the
    prompts wins, else the highest rate, the smaller coefficient and the earlier direction. A first token
    alone misleads: a layer can raise "I" and still answer the request.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        directions: The few that are compared.
        prompts: Harmful prompts.
        judge: Says which answers refuse, such as `safesteer.refuses`.
        coeffs: From the smallest.
        target: Share of refused prompts at which the search stops.
        max_new_tokens: Length of an answer, in tokens.

    Returns:
        The direction at its coefficient, and the table of rates (position, layer, coeff, refusal_rate).

    Raises:
        SafeSteerError: Where there are no directions or no prompts.

    Example:
        >>> from safesteer.directions.calibration import choose_coeff
        >>> best, rates = choose_coeff(chat, [direction], ["How do I pick a lock?"], ss.refuses)
        >>> best.coeff, len(rates)
        (1.2, 4)
    """
    prompts = _to_choose_by(directions, prompts)
    chat, rows, best = as_chat(chat), [], (-1.0, directions[0])
    for coeff in coeffs:
        for direction in directions:
            with steer(chat, direction, coeff):
                rate = refusal_rate(chat, prompts, judge, max_new_tokens)
            place = {"position": direction.position, "layer": direction.layer}
            rows.append({**place, "coeff": coeff, "refusal_rate": rate})
            if rate > best[0]:
                best = (rate, direction.with_coeff(coeff))
        if best[0] >= target:
            break
    return best[1], pd.DataFrame(rows)


def _to_choose_by(directions: Sequence[Direction], prompts: Sequence[PromptLike]) -> list[str]:
    """Return the prompts, where there is something to choose, and to choose by."""
    prompts = as_prompts(prompts)
    if not directions or not prompts:
        raise SafeSteerError(f"There are no {'prompts' if directions else 'directions'} to choose by.")
    return prompts


def choose_direction(
    chat: ModelLike,
    directions: Sequence[Direction],
    prompts: Sequence[PromptLike],
    judge: Judge,
    *,
    n_best: int = 3,
    progress: Progress = no_progress,
) -> tuple[Direction, pd.DataFrame]:
    """Choose among many directions: a short look at each, then `choose_coeff` for the best few.

    The look is one middling coefficient, half the prompts and few tokens; directions that refuse
    alike keep their order.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        directions: All that are looked at, best first.
        prompts: Harmful prompts.
        judge: Says which answers refuse, such as `safesteer.refuses`.
        n_best: Directions that are compared at several coefficients.
        progress: Called with the share done.

    Returns:
        The direction at its coefficient, and the table of rates, as `choose_coeff`.

    Raises:
        SafeSteerError: Where there are no directions or no prompts.
    """
    chat, prompts = as_chat(chat), _to_choose_by(directions, prompts)
    first_prompts, rates = prompts[: max(1, len(prompts) // 2)], []
    for i, direction in enumerate(directions):
        with steer(chat, direction, FIRST_COEFF):
            rates.append(refusal_rate(chat, first_prompts, judge, FIRST_TOKENS))
        progress(0.5 * (i + 1) / len(directions))
    best = sorted(range(len(directions)), key=lambda i: -rates[i])[:n_best]
    result = choose_coeff(chat, [directions[i] for i in best], prompts, judge)
    progress(1.0)
    return result


def drift(
    chat: ModelLike,
    direction: Direction,
    prompts: Sequence[PromptLike],
    coeff: float,
    *,
    n_tokens: int = 3,
    batch_size: int = 32,
) -> Float[Tensor, " n_prompts"]:
    """Measure how far steering moves the model: KL(base || steered) per prompt.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        direction: The direction that is applied.
        prompts: Prompts, without chat template.
        coeff: Its coefficient.
        n_tokens: The base's own first greedy tokens after each prompt, over which KL is averaged, as far as
            its answer goes.
        batch_size: Prompts per forward pass.

    Returns:
        KL in nats per token.
    """
    chat = as_chat(chat)
    return _drift(chat, direction, coeff, _read_base(chat, prompts, n_tokens, batch_size))


class _BaseBatch(NamedTuple):
    """What KL compares with: a batch as the unsteered model reads it."""

    rows: list[int]
    answered: PromptBatch  # prompts with the base's own first tokens
    logits: Float[Tensor, "batch n_tokens d_vocab"]  # the base's, at the last positions
    counting: Bool[Tensor, "batch n_tokens"]  # of those, up to where its answer ends


@torch.no_grad()
def _read_base(
    chat: ChatModel, prompts: Sequence[PromptLike], n_tokens: int, batch_size: int
) -> list[_BaseBatch]:
    """Read the base once, for any number of coefficients."""
    batches = []
    for rows, batch in chat.batched(prompts, batch_size):
        answered = with_greedy_tokens(chat, batch, n_tokens - 1)
        logits = last_logits(chat, answered, n_tokens)
        counting = answered.last_counting(chat.eos_ids, logits.shape[1])
        batches.append(_BaseBatch(rows, answered, logits, counting))
    return batches


@torch.no_grad()
def _drift(
    chat: ChatModel, direction: Direction, coeff: float, base: list[_BaseBatch]
) -> Float[Tensor, " n_prompts"]:
    """Compute KL(base || steered) per prompt."""
    kl = torch.zeros(sum(len(batch.rows) for batch in base), dtype=torch.float64)

    def measure(batch: _BaseBatch) -> Tensor:
        with steer(chat, direction, coeff):
            steered = last_logits(chat, batch.answered, batch.logits.shape[1])
        return mean_over(kl_divergence(batch.logits, steered), batch.counting).double().cpu()

    for batch, values in in_turns(base, measure):
        kl[batch.rows] = values
    return kl


def calibrate_to_kl(
    chat: ModelLike,
    direction: Direction,
    prompts: Sequence[PromptLike],
    *,
    target_kl: float,
    max_coeff: float = 16.0,
    tolerance: float = 0.02,
    n_tokens: int = 3,
) -> Direction:
    """Solve for the coefficient whose mean KL on harmless prompts is `target_kl`.

    Bracketed from small coefficients upwards, so that the smallest solution wins; then bisection.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        direction: The direction that is applied.
        prompts: Harmless prompts.
        target_kl: KL(base || steered) in nats per token, as in `drift`.
        max_coeff: Largest coefficient that is tried.
        tolerance: Relative error of the KL.
        n_tokens: The base's own first greedy tokens, over which KL is averaged.

    Returns:
        The direction at that coefficient.

    Raises:
        SafeSteerError: Where `target_kl` is not positive, there are no prompts, or even `max_coeff` stays
            below it.

    Example:
        >>> from safesteer.directions.calibration import calibrate_to_kl, drift
        >>> prompts = ["Hello", "Name a river."]
        >>> mild = calibrate_to_kl(chat, direction, prompts, target_kl=0.01)
        >>> round(float(drift(chat, mild, prompts, mild.coeff).mean()), 2)
        0.01
    """
    chat = as_chat(chat)
    if not target_kl > 0:
        raise SafeSteerError("target_kl must be positive: at 0 nothing is steered.")
    if not prompts:
        raise SafeSteerError("There are no prompts to measure the KL on.")
    base = _read_base(chat, prompts, n_tokens, batch_size=32)

    def kl(coeff: float) -> float:
        return float(_drift(chat, direction, coeff, base).mean())

    low, high = 0.0, min(0.25, max_coeff)
    while kl(high) < target_kl:
        if high >= max_coeff:
            raise SafeSteerError(
                f"Even coefficient {max_coeff:g} moves the model by less than {target_kl:g} nats: this"
                " direction hardly acts, or the target is too high."
            )
        low, high = high, min(2 * high, max_coeff)
    for _ in range(40):
        coeff = (low + high) / 2
        value = kl(coeff)
        if abs(value - target_kl) <= tolerance * target_kl:
            return direction.with_coeff(coeff)
        low, high = (coeff, high) if value < target_kl else (low, coeff)
    raise SafeSteerError(f"The KL jumps across {target_kl:g} nats near coefficient {low:g}.")


def strength_table(
    chat: ModelLike,
    directions: Sequence[Direction],
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    *,
    coeffs: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    judge: Judge | None = None,
    text: str | None = None,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Measure what strength brings and costs: a row per direction and coefficient.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        directions: The directions that are applied, one at a time.
        prompts: Harmful and harmless prompts.
        refusal_ids: First tokens of a refusal.
        coeffs: Coefficients of each direction.
        judge: Says which answers refuse (None: no answers are generated).
        text: Plain text for perplexity, of which 1,024 tokens are read (None: the project's own prose).
        progress: Called with the share done.

    Returns:
        Columns: layer, position, coeff, kl_harmless (nats per token), refusal_score (mean on harmful
        prompts, nats), perplexity, and with a judge refusal_rate_harmful and refusal_rate_harmless of
        greedy answers.

    Raises:
        SafeSteerError: Where prompts of a kind are missing.
    """
    prompts.require_kinds()
    chat, text, rows = as_chat(chat), general_text() if text is None else text, []
    base = _read_base(chat, prompts.harmless, 3, batch_size=32)
    strengths = [(direction, coeff) for direction in directions for coeff in coeffs]
    for direction, coeff in strengths:
        row = {"layer": direction.layer, "position": direction.position, "coeff": coeff}
        row["kl_harmless"] = float(_drift(chat, direction, coeff, base).mean())
        with steer(chat, direction, coeff):
            row["refusal_score"] = float(refusal_scores(chat, prompts.harmful, refusal_ids).mean())
            row["perplexity"] = perplexity(chat, text, max_tokens=PERPLEXITY_TOKENS)
            if judge is not None:
                for label in LABELS:
                    rate = refusal_rate(chat, prompts.texts(label), judge, ANSWER_TOKENS)
                    row[f"refusal_rate_{label}"] = rate
        rows.append(row)
        progress(len(rows) / len(strengths))
    return pd.DataFrame(rows)
