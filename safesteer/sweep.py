"""Score every candidate direction and say why each was kept or dropped (paper section 3.2).

Per candidate d at (position i, layer l), on validation prompts:
    ablation_refusal   refusal score on harmful prompts with d projected out everywhere
    steering_refusal   refusal score on harmless prompts with d added at layer l
    kl_harmless        KL(base || ablated) on harmless prompts, over the first answer tokens
"instruction" candidates are selected as published: drop l >= 0.8 n_layers, KL > 0.1 and steering
score < 0; of the rest take the lowest ablation score. A model that does not refuse has nothing to
ablate, so "prefill" candidates are ranked by how far steering moves harmless prompts to refusal, and
the answers of all of them decide (`by_answers`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from safesteer import steering
from safesteer.directions import (
    Candidates,
    Direction,
    last_logits,
    steer,
)
from safesteer.divergence import kl_divergence, refusal_score
from safesteer.errors import SafeSteerError
from safesteer.files import write_text
from safesteer.models import ChatModel, generate, generate_ids
from safesteer.prompts import PromptBatch, PromptSet, batches

LOOK_COEFF = 1.5  # the middle of the coefficients that `calibrate` tries
COLUMNS = [
    "extraction",
    "position",
    "layer",
    "ablation_refusal",
    "steering_refusal",
    "kl_harmless",
    "kept",
    "reason",
]


@dataclass(frozen=True)
class SweepConfig:
    """Thresholds of the selection (Arditi et al. 2024, appendix C; paper section 3.2)."""

    max_layer_share: float = 0.8
    max_kl: float = 0.1
    min_steering: float = 0.0
    n_kl_tokens: int = 3
    n_prompts: int | None = None
    n_answered: int = 3  # prefill candidates that are calibrated, after a first look at all answers
    batch_size: int = 32


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """The table of scores with its candidates: a row for each position and layer."""

    candidates: Candidates
    table: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.table.to_csv(index=False))

    @property
    def ranking(self) -> pd.DataFrame:
        """Candidates that passed, best first. Raises SafeSteerError with the nearest miss if none."""
        kept = self.table[self.table.kept]
        if kept.empty:
            # Rows without a score come last.
            miss = self.table.sort_values("steering_refusal", ascending=False).iloc[0]
            raise SafeSteerError(
                f"No candidate passed the selection. The nearest miss is position {miss.position},"
                f" layer {miss.layer}: {miss.reason}. Try extraction='prefill', or relax the"
                " thresholds in SweepConfig."
            )
        if self.candidates.extraction == "instruction":
            return kept.sort_values(["ablation_refusal", "layer"])
        return kept.sort_values(["steering_refusal", "layer"], ascending=[False, True])

    @property
    def best(self) -> pd.Series:
        """The first row of the ranking."""
        return self.ranking.iloc[0]

    def __repr__(self) -> str:
        n_kept = int(self.table.kept.sum())
        return f"Sweep({self.candidates!r}: {n_kept} of {len(self.table)} candidates kept)"

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True, index=False, float_format="{:.3f}".format)


@torch.no_grad()
def sweep(
    chat: ChatModel,
    candidates: Candidates,
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    config: SweepConfig | None = None,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> Sweep:
    """Score all candidates on `prompts` (validation). Layers that can't be selected are not run.

    Batches are the outer loop, so memory does not grow with the number of prompts.
    """
    config = config or SweepConfig()
    prompts = prompts.head(config.n_prompts)
    refusal_ids = refusal_ids.to(chat.device)
    n_pos, n_layers, _ = candidates.vectors.shape
    last = math.ceil(config.max_layer_share * n_layers)
    todo = [(i, layer) for layer in range(last) for i in range(n_pos)]
    scores = torch.zeros((3, n_pos, n_layers), dtype=torch.float64)
    harmful, harmless = prompts.harmful, prompts.harmless
    work = [(True, rows) for rows in batches(chat.tokenizer, harmful, config.batch_size)]
    work += [(False, rows) for rows in batches(chat.tokenizer, harmless, config.batch_size)]
    for done, (is_harmful, rows) in enumerate(work):
        texts = [(harmful if is_harmful else harmless)[i] for i in rows]
        score = _score_harmful if is_harmful else _score_harmless
        for at, found in score(chat, candidates, todo, texts, refusal_ids, config.n_kl_tokens):
            scores[(slice(None), *todo[at])] += found
            progress((done + (at + 1) / len(todo)) / len(work))
    scores[0] /= len(harmful)
    scores[1:] /= len(harmless)
    rows = [
        _row(candidates, i, layer, scores[:, i, layer].tolist(), n_layers, config)
        for i in range(n_pos)
        for layer in range(n_layers)
    ]
    return Sweep(candidates, pd.DataFrame(rows, columns=COLUMNS))


def _score_harmful(chat, candidates, todo, texts, refusal_ids, n_kl_tokens):
    batch = PromptBatch.of(chat.tokenizer, texts, device=chat.device)
    for at, (i, layer) in enumerate(todo):
        with steering.ablate(chat.model, candidates.vectors[i, layer].to(chat.device)):
            ablated = refusal_score(last_logits(chat, batch)[:, 0], refusal_ids).sum()
        yield at, torch.tensor([float(ablated), 0.0, 0.0], dtype=torch.float64)


def _score_harmless(chat, candidates, todo, texts, refusal_ids, n_kl_tokens):
    batch = PromptBatch.of(chat.tokenizer, texts, device=chat.device)
    answered = batch
    if n_kl_tokens > 1:  # the base's own first tokens: one token alone is often structural
        first = generate_ids(chat, batch, max_new_tokens=n_kl_tokens - 1)
        answered = batch.extended(first)
    base = last_logits(chat, answered, n_kl_tokens)
    for at, (i, layer) in enumerate(todo):
        vector = candidates.vectors[i, layer].to(chat.device)
        with steering.add(chat.model, vector, layer):
            steered = refusal_score(last_logits(chat, batch)[:, 0], refusal_ids).sum()
        with steering.ablate(chat.model, vector):
            kl = kl_divergence(base, last_logits(chat, answered, n_kl_tokens)).mean(-1).sum()
        yield at, torch.tensor([0.0, float(steered), float(kl)], dtype=torch.float64)


def _row(candidates, i, layer, scores, n_layers, config) -> dict:
    ablation, steered, kl = scores
    run = layer < config.max_layer_share * n_layers
    if not run:
        ablation = steered = kl = math.nan
        reason = f"layer in the last {1 - config.max_layer_share:.0%} of the model (not run)"
    elif not all(math.isfinite(s) for s in scores):
        reason = "a score is not finite"
    elif candidates.extraction == "instruction" and kl > config.max_kl:
        reason = f"KL {kl:.3f} > {config.max_kl:g}: ablation damages harmless prompts"
    elif candidates.extraction == "instruction" and steered < config.min_steering:
        reason = f"steering score {steered:.2f} < {config.min_steering:g}: does not induce refusal"
    else:
        reason = "passes every threshold"
    return {
        "extraction": candidates.extraction,
        "position": candidates.positions[i],
        "layer": layer,
        "ablation_refusal": ablation,
        "steering_refusal": steered,
        "kl_harmless": kl,
        "kept": reason.startswith("passes"),
        "reason": reason,
    }


def calibrate(
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
            rate = sum(map(refuses, prompts, answers)) / len(prompts)
            rows.append({"layer": direction.layer, "coeff": coeff, "refusal_rate": rate})
            if rate > best[0]:
                best = (rate, direction.with_coeff(coeff))
        if best[0] >= target:
            break
    return best[1], pd.DataFrame(rows)


def by_answers(
    chat: ChatModel,
    directions: Sequence[Direction],
    prompts: list[str],
    refuses: Callable[[str, str], bool],
    *,
    n_best: int = 3,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Direction, pd.DataFrame]:
    """Choose among many directions: a short look at each, then `calibrate` for the best few.

    The look is one middling coefficient, half the prompts and few tokens; directions that refuse
    alike keep the order they came in. Returns what `calibrate` returns.
    """
    few = prompts[: max(1, len(prompts) // 2)]
    rates = []
    for done, direction in enumerate(directions):
        _, table = calibrate(chat, [direction], few, refuses, coeffs=(LOOK_COEFF,), max_new_tokens=12)
        rates.append(float(table.refusal_rate[0]))
        progress(0.5 * (done + 1) / len(directions))
    best = sorted(range(len(directions)), key=lambda i: -rates[i])[:n_best]
    found = calibrate(chat, [directions[i] for i in best], prompts, refuses)
    progress(1.0)
    return found
