"""How strongly to steer: by real answers, by drift, or over a whole grid.

`choose_direction`    among many directions: a short look at each, then `choose_coeff` for the best few
`choose_coeff`   the gentlest coefficient at which greedy answers refuse
`calibrate`     the coefficient that spends a given KL on harmless prompts (bisection)
`grid`          layer x coefficient: refusal, KL and perplexity, for a curve to choose from
"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._progress import Progress, no_progress
from safesteer.directions.refusal_tokens import refusal_scores
from safesteer.judges.judge import judge_all, refusals
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import last_logits
from safesteer.models.generation import generate, with_greedy_tokens
from safesteer.models.logits import kl_divergence
from safesteer.models.text_loss import general_text, perplexity
from safesteer.steering.direction import Direction, steer

LOOK_COEFF = 1.5  # the middle of the coefficients that `choose_coeff` tries


def choose_coeff(
    chat: ChatModel,
    directions: Sequence[Direction],
    prompts: list[str],
    refuses: Callable[[str, str], bool],
    *,
    coeffs: tuple[float, ...] = (1.2, 1.4, 1.6, 1.8),
    target: float = 0.95,
    max_new_tokens: int = 20,
) -> tuple[Direction, pd.DataFrame]:
    """Choose among a few directions by what counts: greedy answers that refuse.

    Coefficients are tried from the smallest; the first at which some direction refuses `target` of
    `prompts` wins, else the highest rate, the gentler coefficient and the earlier direction. A first
    token alone misleads: a layer can raise "I" and still answer the request. Returns the direction
    at that strength and the table of rates (layer, coeff, refusal_rate).
    """
    rows, best = [], (-1.0, directions[0])
    for coeff in coeffs:
        for direction in directions:
            with steer(chat, direction, coeff):
                answers = generate(chat, prompts, max_new_tokens=max_new_tokens)
            rate = sum(refusals(judge_all(refuses, prompts, answers))) / len(prompts)
            rows.append({"layer": direction.layer, "coeff": coeff, "refusal_rate": rate})
            if rate > best[0]:
                best = (rate, direction.with_coeff(coeff))
        if best[0] >= target:
            break
    return best[1], pd.DataFrame(rows)


def choose_direction(
    chat: ChatModel,
    directions: Sequence[Direction],
    prompts: list[str],
    refuses: Callable[[str, str], bool],
    *,
    n_best: int = 3,
    progress: Progress = no_progress,
) -> tuple[Direction, pd.DataFrame]:
    """Choose among many directions: a short look at each, then `choose_coeff` for the best few.

    The look is one middling coefficient, half the prompts and few tokens; directions that refuse
    alike keep the order they came in. Returns what `choose_coeff` returns.
    """
    few = prompts[: max(1, len(prompts) // 2)]
    rates = []
    for done, direction in enumerate(directions):
        _, table = choose_coeff(chat, [direction], few, refuses, coeffs=(LOOK_COEFF,), max_new_tokens=12)
        rates.append(float(table.refusal_rate[0]))
        progress(0.5 * (done + 1) / len(directions))
    best = sorted(range(len(directions)), key=lambda i: -rates[i])[:n_best]
    found = choose_coeff(chat, [directions[i] for i in best], prompts, refuses)
    progress(1.0)
    return found


def drift(
    chat: ChatModel,
    direction: Direction,
    prompts: Sequence[str],
    coeff: float,
    *,
    n_tokens: int = 3,
    batch_size: int = 32,
) -> Float[Tensor, " n_prompts"]:
    """KL(base || steered) in nats a token, over the base's first greedy tokens after each prompt."""
    return _drift(chat, direction, coeff, _read_base(chat, prompts, n_tokens, batch_size))


@torch.no_grad()
def _read_base(
    chat: ChatModel, prompts: Sequence[str], n_tokens: int, batch_size: int
) -> list[tuple[list[int], PromptBatch, Tensor]]:
    """(rows, prompts with the base's first tokens, its last logits), a batch each."""
    found = []
    for rows, batch in chat.batched(prompts, batch_size):
        batch = with_greedy_tokens(chat, batch, n_tokens - 1)
        found.append((rows, batch, last_logits(chat, batch, n_tokens)))
    return found


@torch.no_grad()
def _drift(chat: ChatModel, direction: Direction, coeff: float, read: list) -> Float[Tensor, " n_prompts"]:
    found = torch.zeros(sum(len(rows) for rows, _, _ in read), dtype=torch.float64)
    for rows, batch, base in read:
        with steer(chat, direction, coeff):
            steered = last_logits(chat, batch, base.shape[1])
        found[rows] = kl_divergence(base, steered).mean(-1).double().cpu()
    return found


def calibrate_to_kl(
    chat: ChatModel,
    direction: Direction,
    prompts: Sequence[str],
    *,
    target_kl: float,
    max_coeff: float = 16.0,
    tolerance: float = 0.02,
    n_tokens: int = 3,
) -> Direction:
    """The direction at the coefficient whose mean KL on `prompts` (harmless ones) is `target_kl`.

    KL is in nats a token, as in `drift`; it is met within `tolerance`, relative. Bracketed from
    small coefficients upwards, so the gentlest solution is found; then bisection. Raises
    SafeSteerError if even `max_coeff` stays below the target.
    """
    if not target_kl > 0:
        raise SafeSteerError("target_kl must be positive: at 0 nothing is steered.")

    read = _read_base(chat, prompts, n_tokens, batch_size=32)

    def kl(coeff: float) -> float:
        return float(_drift(chat, direction, coeff, read).mean())

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
        found = kl(coeff)
        if abs(found - target_kl) <= tolerance * target_kl:
            return direction.with_coeff(coeff)
        low, high = (coeff, high) if found < target_kl else (low, coeff)
    raise SafeSteerError(f"The KL jumps across {target_kl:g} nats near coefficient {low:g}.")


def strength_table(
    chat: ChatModel,
    directions: Sequence[Direction],
    harmful: Sequence[str],
    harmless: Sequence[str],
    refusal_ids: Int[Tensor, " n_refusal"],
    *,
    coeffs: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    refuses: Callable[[str, str], bool] | None = None,
    text: str | None = None,
    perplexity_tokens: int = 1024,
    max_new_tokens: int = 20,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """A row for each direction and coefficient, to see what strength costs.

    Columns: layer, position, coeff, refusal_score (mean on harmful prompts, nats), kl_harmless
    (nats a token), perplexity (of `text`, by default the project's own prose), and with a judge
    refusal_rate_harmful and refusal_rate_harmless of greedy answers.
    """
    rows, text = [], general_text() if text is None else text
    for done, (direction, coeff) in enumerate((d, c) for d in directions for c in coeffs):
        row = {"layer": direction.layer, "position": direction.position, "coeff": coeff}
        row["kl_harmless"] = float(drift(chat, direction, harmless, coeff).mean())
        with steer(chat, direction, coeff):
            row["refusal_score"] = float(refusal_scores(chat, list(harmful), refusal_ids).mean())
            row["perplexity"] = perplexity(chat, text, max_tokens=perplexity_tokens)
            for name, prompts in (("harmful", harmful), ("harmless", harmless)) if refuses else ():
                answers = generate(chat, prompts, max_new_tokens=max_new_tokens)
                row[f"refusal_rate_{name}"] = sum(refusals(judge_all(refuses, prompts, answers))) / len(
                    prompts
                )
        rows.append(row)
        progress((done + 1) / (len(directions) * len(coeffs)))
    return pd.DataFrame(rows)
