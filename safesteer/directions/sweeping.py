"""Score every candidate direction and say why each was kept or dropped (paper section 3.2).

Per candidate d at (position i, layer l), on validation prompts:
    ablation_refusal   refusal score on harmful prompts with d projected out everywhere
    steering_refusal   refusal score on harmless prompts with d added at layer l
    kl_harmless        KL(base || ablated) on harmless prompts, over the first answer tokens
Ranked by "ablation", candidates are selected as published: drop l >= 0.8 n_layers, KL > 0.1 and steering
score < 0; of those that remain take the lowest ablation score. A model that does not refuse has nothing
to ablate: ranked by "steering" (the default for prefill contrasts) comes first what moves harmless
prompts furthest towards refusal.

Beside every score stand its 95 % bootstrap interval over prompts and two controls: "random", a
random direction that moves the model as far, and "shuffled", what the extraction reads when labels
are shuffled. `scoring` says how a pass is shared, `halving` how most candidates see fewer prompts.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._files import write_text
from safesteer._intervals import bootstrap_means
from safesteer.directions.candidates import Candidates
from safesteer.directions.halving import Scored, Scores, score_by_halving
from safesteer.directions.scoring import SCORES, layer_limit, runnable, score
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.progress import Progress, no_progress
from safesteer.prompts.prompt_set import PromptSet
from safesteer.settings import DirectionConfig
from safesteer.steering.direction import Direction

ZERO = 1e-5  # length below which a vector is rounding, in lengths of the longest
PASSES = "passes every threshold"
RANKED_BY_ABLATION = ("instruction", "system", "pca", "probe")  # where rank_by is "auto"; others by steering
COLUMNS = ["extraction", "position", "layer", *SCORES, "kept", "reason", "n_pairs"]


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """The scores of all candidates: a table with a row per position and layer.

    Columns: COLUMNS (`n_pairs`: pairs of prompts that the candidate was scored on, 0 for not run), then
    `<score>_low`, `<score>_high` (95 % interval), `<score>_random`, `<score>_shuffled` (controls),
    `<score>_held_out` (best candidates, other prompts). Scores are in nats, KL in nats per token.
    """

    candidates: Candidates
    table: pd.DataFrame
    rank_by: Literal["ablation", "steering"] = "ablation"

    def to_frame(self) -> pd.DataFrame:
        """Return a copy of the table."""
        return self.table.copy()

    def save(self, path: str | Path) -> None:
        """Write the table as CSV."""
        write_text(Path(path), self.table.to_csv(index=False))

    @property
    def nearest_miss(self) -> pd.Series:
        """The candidate with the highest steering score, kept or not."""
        return self.table.sort_values("steering_refusal", ascending=False).iloc[0]

    @property
    def ranking(self) -> pd.DataFrame:
        """The rows of the candidates that passed, best first.

        Raises:
            SafeSteerError: Where none passed; the sentence names the nearest miss.
        """
        passed = self.table[self.table.kept]
        if passed.empty:
            miss = self.nearest_miss
            raise SafeSteerError(
                f"No candidate passed the selection. The nearest miss is position {miss.position},"
                f" layer {miss.layer}: {miss.reason}. Try extraction='prefill' (with a vector of your own"
                " another coeff), or relax the thresholds in DirectionConfig."
            )
        if self.rank_by == "ablation":
            return passed.sort_values(["ablation_refusal", "layer"])
        return passed.sort_values(["steering_refusal", "layer"], ascending=[False, True])

    @property
    def best(self) -> pd.Series:
        """The first row of the ranking."""
        return self.ranking.iloc[0]

    def up_to(self, max_layer_share: float) -> "Sweep":
        """Return the sweep with fewer layers to choose from, as one that does not run the later ones.

        Args:
            max_layer_share: Layers from this share of the depth on are dropped.
        """
        late = self.table.layer >= layer_limit(self.candidates, max_layer_share)
        table = self.table.assign(kept=self.table.kept & ~late)
        table.loc[late, "reason"] = _too_late(max_layer_share)
        return Sweep(self.candidates, table, self.rank_by)

    def directions(self, chat: ModelLike, prompts: PromptSet | None = None) -> list[Direction]:
        """Return the candidates of the ranking as directions, best first.

        Args:
            chat: The model that the candidates were read from.
            prompts: The prompts that they were read from; their hash is kept.

        Raises:
            SafeSteerError: Where no candidate passed.
        """
        chat = as_chat(chat)
        return [
            self.candidates.direction(chat, str(row.position), int(row.layer), prompts=prompts)
            for _, row in self.ranking.iterrows()
        ]

    def vector(self, row: pd.Series) -> Float[Tensor, " d_model"]:
        """Return the vector of a row of the table."""
        return self.candidates.vectors[self.candidates.index(str(row.position), int(row.layer))]

    def __repr__(self) -> str:
        n_kept = int(self.table.kept.sum())
        return f"Sweep({self.candidates!r}: {n_kept} of {len(self.table)} candidates kept)"

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True, index=False, float_format="{:.3f}".format)


def sweep(
    chat: ModelLike,
    candidates: Candidates,
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    config: DirectionConfig | None = None,
    *,
    held_out: PromptSet | None = None,
    progress: Progress = no_progress,
) -> Sweep:
    """Score all candidates on validation prompts; layers that cannot be selected are not run.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        candidates: One vector per position and layer.
        prompts: Validation prompts, of which the first `config.n_val` of each kind are used.
        refusal_ids: First tokens of a refusal.
        config: Thresholds, controls and batch sizes.
        held_out: Prompts on which the best few are scored again: numbers that selection did not choose.
        progress: Called with the share done.

    Raises:
        SafeSteerError: Where no candidate lies below `config.max_layer_share`, or prompts of a kind are
            missing.

    Example:
        >>> from safesteer.directions.extraction import prefill_contrast
        >>> from safesteer.directions.refusal_tokens import refusal_token_ids
        >>> from safesteer.directions.sweeping import sweep
        >>> prompts, refusal_ids = ss.load_prompts().split("val").first(2), refusal_token_ids(chat.tokenizer)
        >>> result = sweep(chat, prefill_contrast(chat, prompts), prompts, refusal_ids)
        >>> len(result.table) == chat.n_layers
        True
    """
    chat, config = as_chat(chat), config or DirectionConfig()
    prompts.require_kinds()
    prompts = prompts.first(config.n_val)
    kinds = [k for k in config.controls if k == "random" or candidates.shuffled is not None]
    # Controls of all candidates cost as much as their scores; controls of a few cost next to nothing.
    share = 1 / (1 + len(kinds)) if config.n_controls is None else 1.0

    def part(n: int, done: float) -> None:
        progress(share * (n + done))

    rank_by, places = ranked_by(candidates, config), runnable(candidates, config.max_layer_share)
    if not places:
        raise SafeSteerError(
            f"No candidate lies below {config.max_layer_share:g} of the depth: raise"
            " direction.max_layer_share."
        )
    strength = _strength(config)
    vectors = strength * torch.stack([candidates.vectors[at] for at in places])

    def score_some(at: Int[Tensor, " some"], some: PromptSet, progress: Progress) -> Scores:
        layers = [places[i][1] for i in at.tolist()]
        return score(chat, vectors[at], layers, some, refusal_ids, config, progress=progress)

    scored = score_by_halving(
        score_some,
        len(places),
        prompts,
        config.n_val_first,
        partial(_order, rank_by=rank_by, config=config),
        partial(part, 0),
    )
    table = _table(candidates, places, scored, rank_by, config)
    result = Sweep(candidates, table, rank_by)
    for n, kind in enumerate(kinds):
        control_progress = partial(part, 1 + n) if config.n_controls is None else no_progress
        _add_controls(chat, result, kind, prompts, refusal_ids, config, control_progress)
    progress(1.0)
    if table.kept.any() and held_out is not None and config.n_held_out:
        best = result.ranking.head(config.n_held_out)
        vectors = strength * torch.stack([result.vector(row) for _, row in best.iterrows()])
        again = score(chat, vectors, best.layer.tolist(), held_out, refusal_ids, config)
        for name, values in again.items():
            table.loc[best.index, f"{name}_held_out"] = values.mean(1).numpy()
    return result


def ranked_by(candidates: Candidates, config: DirectionConfig) -> Literal["ablation", "steering"]:
    """Return what ranks candidates: `rank_by`, and for "auto" what suits their extraction."""
    if config.rank_by != "auto":
        return config.rank_by
    return "ablation" if candidates.extraction in RANKED_BY_ABLATION else "steering"


def _strength(config: DirectionConfig) -> float:
    """Return the multiple of a candidate that is added; ablation does not see its length."""
    return 1.0 if config.coeff is None else config.coeff


def _with_intervals(scored: Scored, seed: int) -> dict[str, Float[Tensor, " n"]]:
    """Return the mean of each score over prompts, with its 95 % bootstrap interval."""
    columns: dict[str, Tensor] = {}
    for name in SCORES:
        mean, low, high = torch.empty((3, len(scored.n_pairs)), dtype=torch.float64)
        for at, values in scored.groups(name):
            mean[at] = values.mean(1)
            low[at], high[at] = (torch.from_numpy(end) for end in bootstrap_means(values.numpy(), seed))
        columns |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return columns


def _order(scores: Scores, rank_by: str, config: DirectionConfig) -> Int[Tensor, " some"]:
    """Order candidates as the selection does: those within the thresholds first, then by rank."""
    columns = (scores[name].mean(1).tolist() for name in SCORES)
    means = [dict(zip(SCORES, values, strict=True)) for values in zip(*columns, strict=True)]

    def place(i: int) -> tuple[bool, bool, float]:
        finite = all(map(math.isfinite, means[i].values()))
        passes = _reason(means[i], True, rank_by, config) == PASSES
        best_first = means[i]["ablation_refusal"] if rank_by == "ablation" else -means[i]["steering_refusal"]
        return not finite, not passes, best_first

    return torch.tensor(sorted(range(len(means)), key=place))


def _add_controls(
    chat: ChatModel,
    result: Sweep,
    kind: str,
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    config: DirectionConfig,
    progress: Progress,
) -> None:
    """Score one control of the best candidates, or of all: columns `<score>_<kind>` of the table."""
    table, candidates = result.table, result.candidates
    scored = table.dropna(subset=["steering_refusal"])
    if config.n_controls is not None:
        by_steering = scored.sort_values("steering_refusal", ascending=False)
        scored = (result.ranking if table.kept.any() else by_steering).head(config.n_controls)
    if scored.empty:
        return
    source = candidates.vectors if kind == "random" else candidates.shuffled
    assert source is not None
    places = [candidates.index(str(row.position), int(row.layer)) for _, row in scored.iterrows()]
    control = score(
        chat,
        _strength(config) * torch.stack([source[at] for at in places]),
        [layer for _, layer in places],
        prompts,
        refusal_ids,
        config,
        placebo=kind == "random",
        progress=progress,
    )
    for name, values in control.items():
        table.loc[scored.index, f"{name}_{kind}"] = values.mean(1).numpy()


def _table(
    candidates: Candidates,
    places: list[tuple[int, int]],
    scored: Scored,
    rank_by: str,
    config: DirectionConfig,
) -> pd.DataFrame:
    """Write one row per position and layer: scores, and why the candidate was kept or dropped."""
    n_pos, n_layers, _ = candidates.vectors.shape
    columns, n_all = _with_intervals(scored, config.seed), int(scored.n_pairs.max())
    order = {place: n for n, place in enumerate(places)}
    rows, longest = [], float(candidates.vectors.norm(dim=-1).nan_to_num().max())
    for i in range(n_pos):
        for layer in range(n_layers):
            n = order.get((i, layer))
            scores = {name: float("nan" if n is None else values[n]) for name, values in columns.items()}
            n_pairs = 0 if n is None else int(scored.n_pairs[n])
            reason = _reason(scores, n is not None, rank_by, config)
            if 0 < n_pairs < n_all:
                reason = "others rank before it" if reason == PASSES else reason
                reason += f" (on the first {n_pairs} of {n_all} pairs)"
            if float(candidates.vectors[i, layer].norm()) < ZERO * longest:
                reason = "no direction here: the two means agree"
            if not candidates.has(layer):
                reason = "no candidate at this layer"
            place = {
                "extraction": candidates.extraction,
                "position": candidates.positions[i],
                "layer": layer,
            }
            rows.append(place | scores | {"kept": reason == PASSES, "reason": reason, "n_pairs": n_pairs})
    intervals = [c for c in columns if c not in SCORES]
    return pd.DataFrame(rows, columns=[*COLUMNS, *intervals])


def _too_late(max_layer_share: float) -> str:
    return f"layer in the last {1 - max_layer_share:.0%} of the model"


def _reason(scores: dict[str, float], was_run: bool, rank_by: str, config: DirectionConfig) -> str:
    """Say which threshold drops a candidate, or that it passes."""
    kl, steered = scores["kl_harmless"], scores["steering_refusal"]
    if not was_run:
        return f"{_too_late(config.max_layer_share)} (not run)"
    if not all(math.isfinite(scores[name]) for name in SCORES):
        return "a score is not finite"
    if rank_by == "ablation" and kl > config.max_kl:
        return f"KL {kl:.3f} > {config.max_kl:g}: ablation damages harmless prompts"
    if rank_by == "ablation" and steered < config.min_steering:
        return f"steering score {steered:.2f} < {config.min_steering:g}: does not induce refusal"
    return PASSES
