"""Score every candidate direction and say why each was kept or dropped (paper section 3.2).

Per candidate d at (position i, layer l), on validation prompts:
    ablation_refusal   refusal score on harmful prompts with d projected out everywhere
    steering_refusal   refusal score on harmless prompts with d added at layer l
    kl_harmless        KL(base || ablated) on harmless prompts, over the first answer tokens
ranked by "ablation" they are selected as published: drop l >= 0.8 n_layers, KL > 0.1 and steering
score < 0; of the rest take the lowest ablation score. A model that does not refuse has nothing to
ablate: there ("steering", the default for prefill contrasts) candidates are ranked by how far
steering moves harmless prompts to refusal.

Beside every score stand its 95 % bootstrap interval over prompts and two controls: "random", a
random direction that moves the model as far, and "shuffled", what the extraction finds when labels
are shuffled. `scoring` says how a pass is shared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._files import write_text
from safesteer._intervals import bootstrap_means
from safesteer._progress import Progress, no_progress
from safesteer._settings import AT_LEAST_1, SHARE, check_settings
from safesteer.directions.extraction import Candidates
from safesteer.directions.scoring import SCORES, runnable, score
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate
from safesteer.prompts.prompt_set import PromptSet
from safesteer.steering.direction import steer

ZERO = 1e-5  # length below which a vector is rounding, in lengths of the longest
COLUMNS = ["extraction", "position", "layer", *SCORES, "kept", "reason"]


@dataclass(frozen=True)
class SweepConfig:
    """Thresholds of the selection (Arditi et al. 2024, appendix C; paper section 3.2)."""

    rank_by: Literal["auto", "ablation", "steering"] = "auto"
    max_layer_share: float = 0.8
    max_kl: float = 0.1
    min_steering: float = 0.0
    n_kl_tokens: int = 3
    n_prompts: int | None = None
    controls: tuple[str, ...] = ("random", "shuffled")
    n_controls: int | None = None  # best candidates that get controls; None: all
    n_held_out: int = 5  # best candidates that are scored again on the held-out prompts
    n_answer_tokens: int = 0  # above 0: refusal rate of real steered answers, for kept candidates
    n_answered: int = 3  # prefill candidates that are calibrated, after a first look at all answers
    n_answer_prompts: int = 16  # harmful prompts whose answers are looked at for that
    batch_size: int = 8
    tokens_per_pass: int = 1536  # candidates are packed into one pass up to this many tokens
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (
            "n_kl_tokens",
            "n_prompts",
            "n_answered",
            "n_answer_prompts",
            "batch_size",
            "tokens_per_pass",
        )
        bounds = dict.fromkeys(sizes, AT_LEAST_1)
        check_settings(self, "sweep", {**bounds, "max_layer_share": SHARE})
        for name in self.controls:
            if name not in ("random", "shuffled"):
                raise SafeSteerError(f"sweep.controls may hold random and shuffled, not '{name}'.")


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """The table of scores with its candidates: a row for each position and layer.

    Columns beside those of the run folder's contract: `<score>_low`, `<score>_high` (95 %),
    `<score>_random`, `<score>_shuffled` (controls), `<score>_held_out` (best candidates, other
    prompts) and `refusal_rate` (steered answers to harmless prompts), where they were asked for.
    """

    candidates: Candidates
    table: pd.DataFrame
    rank_by: Literal["ablation", "steering"] = "ablation"

    def to_frame(self) -> pd.DataFrame:
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.table.to_csv(index=False))

    @property
    def nearest_miss(self) -> pd.Series:
        """The candidate that steers most of those that were scored, kept or not."""
        return self.table.sort_values("steering_refusal", ascending=False).iloc[0]

    @property
    def ranking(self) -> pd.DataFrame:
        """Candidates that passed, best first. Raises SafeSteerError with the nearest miss if none."""
        kept = self.table[self.table.kept]
        if kept.empty:
            miss = self.nearest_miss
            raise SafeSteerError(
                f"No candidate passed the selection. The nearest miss is position {miss.position},"
                f" layer {miss.layer}: {miss.reason}. Try extraction='prefill', or relax the"
                " thresholds in SweepConfig."
            )
        if self.rank_by == "ablation":
            return kept.sort_values(["ablation_refusal", "layer"])
        return kept.sort_values(["steering_refusal", "layer"], ascending=[False, True])

    @property
    def best(self) -> pd.Series:
        """The first row of the ranking."""
        return self.ranking.iloc[0]

    def vector(self, row: pd.Series) -> Float[Tensor, " d_model"]:
        return self.candidates.vectors[self.candidates.positions.index(row.position), int(row.layer)]

    def __repr__(self) -> str:
        n_kept = int(self.table.kept.sum())
        return f"Sweep({self.candidates!r}: {n_kept} of {len(self.table)} candidates kept)"

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True, index=False, float_format="{:.3f}".format)


def sweep(
    chat: ChatModel,
    candidates: Candidates,
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    config: SweepConfig | None = None,
    *,
    held_out: PromptSet | None = None,
    judge: Callable[[str, str], bool] | None = None,
    progress: Progress = no_progress,
) -> Sweep:
    """Score all candidates on `prompts` (validation). Layers that can't be selected are not run.

    `held_out` prompts score the best few once more, for a number that selection did not choose;
    `judge` is needed where `n_answer_tokens` asks for real answers.
    """
    config = config or SweepConfig()
    prompts = prompts.first(config.n_prompts)
    todo = runnable(candidates, config.max_layer_share)
    limits: dict[str, Any] = {"n_kl_tokens": config.n_kl_tokens, "tokens_per_pass": config.tokens_per_pass}
    limits |= {"batch_size": config.batch_size, "seed": config.seed}
    n_controls = config.n_controls
    whole = n_controls is None
    kinds = [k for k in config.controls if k == "random" or candidates.shuffled is not None]
    share = 1 / (1 + len(kinds)) if whole else 1.0

    real = torch.stack([candidates.vectors[at] for at in todo])
    layers = [layer for _, layer in todo]
    scores = score(
        chat, real, layers, prompts, refusal_ids, progress=lambda done: progress(share * done), **limits
    )
    found: dict[str, Tensor] = {}
    for name, per_prompt in scores.items():
        low, high = bootstrap_means(per_prompt.numpy(), config.seed)
        found[name] = per_prompt.mean(1)
        found[f"{name}_low"], found[f"{name}_high"] = torch.from_numpy(low), torch.from_numpy(high)
    rank_by = config.rank_by
    if rank_by == "auto":
        rank_by = "steering" if candidates.extraction in ("prefill", "given") else "ablation"
    table = _table(candidates, todo, found, rank_by, config)
    result = Sweep(candidates, table, rank_by)

    scored = table.dropna(subset=["steering_refusal"])
    if n_controls is not None:
        by_steering = scored.sort_values("steering_refusal", ascending=False)
        scored = (result.ranking if table.kept.any() else by_steering).head(n_controls)
    where = [(candidates.positions.index(r.position), int(r.layer)) for r in scored.itertuples()]
    for n, kind in enumerate(kinds):
        source = candidates.vectors if kind == "random" else candidates.shuffled
        assert source is not None
        vectors = torch.stack([source[at] for at in where])
        control = score(
            chat,
            vectors,
            [layer for _, layer in where],
            prompts,
            refusal_ids,
            placebo=kind == "random",
            progress=lambda done, n=n: progress(share * (1 + n + done) if whole else 1.0),
            **limits,
        )
        for name, per_prompt in control.items():
            table.loc[scored.index, f"{name}_{kind}"] = per_prompt.mean(1).numpy()
    if not table.kept.any():
        return result
    if held_out is not None and config.n_held_out:
        best = result.ranking.head(config.n_held_out)
        vectors = torch.stack([result.vector(row) for _, row in best.iterrows()])
        again = score(chat, vectors, best.layer.tolist(), held_out, refusal_ids, **limits)
        for name, per_prompt in again.items():
            table.loc[best.index, f"{name}_held_out"] = per_prompt.mean(1).numpy()
    if config.n_answer_tokens:
        if judge is None:
            raise SafeSteerError("Refusal rates of answers need a judge: pass judge=safesteer.refuses.")
        for at, row in result.ranking.iterrows():
            direction = candidates.direction(chat, row.position, int(row.layer))
            with steer(chat, direction):
                answers = generate(chat, prompts.harmless, max_new_tokens=config.n_answer_tokens)
            table.loc[at, "refusal_rate"] = float(np.mean([*map(judge, prompts.harmless, answers)]))
    return result


def _table(candidates, todo, found, rank_by, config) -> pd.DataFrame:
    n_pos, n_layers, _ = candidates.vectors.shape
    place = {at: n for n, at in enumerate(todo)}
    rows, longest = [], float(candidates.vectors.norm(dim=-1).nan_to_num().max())
    for i in range(n_pos):
        for layer in range(n_layers):
            at = place.get((i, layer))
            scores = {name: float("nan" if at is None else v[at]) for name, v in found.items()}
            reason = _reason(scores, at is not None, rank_by, config)
            if float(candidates.vectors[i, layer].norm()) < ZERO * longest:
                reason = "no direction here: the two means agree"
            name = {
                "extraction": candidates.extraction,
                "position": candidates.positions[i],
                "layer": layer,
            }
            rows.append(name | scores | {"kept": reason.startswith("passes"), "reason": reason})
    rest = [c for c in found if c not in SCORES]
    return pd.DataFrame(rows, columns=[*COLUMNS, *rest])


def _reason(scores: dict[str, float], run: bool, rank_by: str, config: SweepConfig) -> str:
    kl, steered = scores["kl_harmless"], scores["steering_refusal"]
    if not run:
        return f"layer in the last {1 - config.max_layer_share:.0%} of the model (not run)"
    if not all(np.isfinite(scores[name]) for name in SCORES):
        return "a score is not finite"
    if rank_by == "ablation" and kl > config.max_kl:
        return f"KL {kl:.3f} > {config.max_kl:g}: ablation damages harmless prompts"
    if rank_by == "ablation" and steered < config.min_steering:
        return f"steering score {steered:.2f} < {config.min_steering:g}: does not induce refusal"
    return "passes every threshold"
