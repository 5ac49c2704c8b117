"""The three scores of a sweep, for many candidates at once.

Naively every candidate costs three whole passes. Here:
- candidates are packed beside each other into one pass, each with a vector of its own rows;
- the columns that all prompts share (the system turn) are read once a candidate, not once a prompt,
  and their keys and values kept while its group is scored;
- addition starts at the steered layer, from residuals recorded in one pass of the base;
- the output head reads the last positions only.
Memory holds one group of candidates and one batch of prompts: it does not grow with either's number.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from safesteer._progress import Progress, no_progress
from safesteer.directions.extraction import Candidates
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel, hf_model, output_head
from safesteer.models.forward import final_hidden, last_logits
from safesteer.models.generation import with_greedy_tokens
from safesteer.models.logits import kl_divergence, logits_of, refusal_score
from safesteer.prompts.prompt_set import PromptSet
from safesteer.settings import DirectionConfig
from safesteer.steering import interventions
from safesteer.steering.hooks import record_resid_pre, run_from_layer

SCORES = ["ablation_refusal", "steering_refusal", "kl_harmless"]


def runnable(candidates: Candidates, max_layer_share: float) -> list[tuple[int, int]]:
    """(position, layer) of the candidates that can be selected, by layer."""
    n_pos, n_layers, _ = candidates.vectors.shape
    last = math.ceil(max_layer_share * n_layers)
    return [(i, layer) for layer in range(last) for i in range(n_pos)]


@dataclass(frozen=True)
class PassLimits:
    """How much one forward pass holds, how many answer tokens KL covers, and the seed of the controls."""

    n_kl_tokens: int = 3
    batch_size: int = 8
    tokens_per_pass: int = 1536
    candidates_per_group: int = 32
    seed: int = 0

    @classmethod
    def of(cls, config: DirectionConfig) -> "PassLimits":
        """Read the limits from the settings of stage 1."""
        return cls(config.n_kl_tokens, config.batch_size, config.tokens_per_pass, seed=config.seed)


@torch.no_grad()
def score(
    chat: ChatModel,
    vectors: Float[Tensor, "n d_model"],
    layers: list[int],
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    limits: PassLimits | None = None,
    *,
    placebo: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Float[Tensor, "n n_prompts"]]:
    """SCORES of each candidate on each prompt. `placebo` replaces every candidate by its control:
    a random direction of its length for addition, and for ablation a move of the same distance.
    """
    limits = limits or PassLimits()
    vectors, refusal_ids = vectors.to(chat.device), refusal_ids.to(chat.device)
    shape = {"ablation_refusal": len(prompts.harmful), "steering_refusal": len(prompts.harmless)}
    shape["kl_harmless"] = len(prompts.harmless)
    found = {k: torch.zeros((len(vectors), n), dtype=torch.float64) for k, n in shape.items()}
    ablate = _ablate_placebo(limits.seed) if placebo else interventions.ablate
    shifts = _random_like(vectors, limits.seed) if placebo else vectors

    # One layout for all prompts, so that the columns that they share are the same in every batch.
    whole = PromptBatch.of(chat.tokenizer, [*prompts.harmful, *prompts.harmless], device=chat.device)
    harmful, harmless = (
        batches(chat.tokenizer, p, limits.batch_size) for p in (prompts.harmful, prompts.harmless)
    )
    asked = [whole.rows(len(prompts.harmful) + torch.tensor(rows)) for rows in harmless]
    # KL over the base's own first tokens: one token alone is often structural.
    answered = [with_greedy_tokens(chat, batch, limits.n_kl_tokens - 1) for batch in asked]

    by_layer = torch.tensor(sorted(range(len(layers)), key=layers.__getitem__))
    total, done = len(vectors) * (len(prompts.harmful) + len(prompts.harmless)), 0
    for group in by_layer.split(limits.candidates_per_group):
        ablated = _ablation(chat, whole, vectors[group], ablate, limits.tokens_per_pass)
        added = _addition(chat, whole, shifts[group], [layers[i] for i in group], limits.tokens_per_pass)
        for rows in harmful:
            for at, logits in ablated(whole.rows(torch.tensor(rows)), 1):
                values = refusal_score(logits[:, :, 0], refusal_ids)
                found["ablation_refusal"][group[at][:, None], rows] = values.cpu()
            done += len(group) * len(rows)
            progress(done / total)
        for rows, prompt, answer in zip(harmless, asked, answered, strict=True):
            for at, logits in added(prompt):
                values = refusal_score(logits, refusal_ids)
                found["steering_refusal"][group[at][:, None], rows] = values.cpu()
            base = last_logits(chat, answer, limits.n_kl_tokens)
            for at, logits in ablated(answer, limits.n_kl_tokens):
                values = kl_divergence(base[None].expand_as(logits), logits).mean(-1)
                found["kl_harmless"][group[at][:, None], rows] = values.double().cpu()
            done += len(group) * len(rows)
            progress(done / total)
    return found


def _ablate_placebo(seed: int):
    return lambda model, vector: interventions.ablate_placebo(model, vector, seed)


def _random_like(vectors: Tensor, seed: int) -> Tensor:
    """A random direction for each candidate, of its length."""
    from transformer_lens.tools.analysis import random_basis  # slow to import

    axes = [random_basis(vectors.shape[1], 1, seed + 1 + i)[:, 0] for i in range(len(vectors))]
    return torch.stack(axes).to(vectors) * vectors.norm(dim=-1, keepdim=True)


def _chunks(n: int, batch: PromptBatch, tokens_per_pass: int) -> tuple[Tensor, ...]:
    """Candidates 0 to n - 1 in even groups whose rows fill a pass."""
    rest = batch.prompt_ids.shape[1] - batch.n_shared
    n_passes = math.ceil(n * len(batch.prompt_ids) * rest / tokens_per_pass)
    return torch.arange(n).tensor_split(max(1, min(n_passes, n)))


def _repeated(batch: PromptBatch, times: int) -> PromptBatch:
    """All rows for the first candidate, then all for the next."""
    parts = (batch.prompt_ids, batch.attention_mask, batch.completion_mask)
    return PromptBatch(*(p.repeat(times, 1) for p in parts), batch.n_shared)


def _rows_of(cache: Cache | None, at: Tensor, times: int) -> Cache | None:
    """Some rows of a cache, each `times` times; the cache itself stays as it was."""
    if cache is None:
        return None
    taken, device = copy.copy(cache), cache.layers[0].keys.device  # type: ignore[union-attr]
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    taken.batch_select_indices(at.repeat_interleave(times).to(device))
    return taken


def _shared_cache(chat: ChatModel, whole: PromptBatch, n_rows: int) -> Cache:
    """Keys and values of the shared columns, under whatever hooks are set; one row a candidate."""
    cache: Cache = DynamicCache(config=chat.config)
    ids = whole.prompt_ids[:1, : whole.n_shared].expand(n_rows, -1)
    hf_model(chat.model).get_decoder()(ids, past_key_values=cache, use_cache=True)
    return cache


def _ablation(chat, whole, vectors, ablate, tokens_per_pass):
    """A pass over a batch with each candidate projected out of all that is written.

    The pass yields (candidates, logits [candidate, prompt, n_last, d_vocab]).
    """
    shared = None
    if whole.n_shared:
        with ablate(chat.model, vectors):
            shared = _shared_cache(chat, whole, len(vectors))

    def run(batch: PromptBatch, n_last: int):
        size = len(batch.prompt_ids)
        for at in _chunks(len(vectors), batch, tokens_per_pass):
            cache = _rows_of(shared, at, size)
            with ablate(chat.model, vectors[at].repeat_interleave(size, 0)):
                hidden = final_hidden(chat.model, _repeated(batch, len(at)), cache)[:, -n_last:]
            yield at, logits_of(hidden, *output_head(chat.model)).unflatten(0, (len(at), -1))

    return run


def _addition(chat, whole, vectors, layers, tokens_per_pass):
    """A pass over a batch with each candidate added at its layer.

    The pass yields (candidates, logits [candidate, prompt, d_vocab]). Below the steered layer nothing
    changes: residuals, keys and values there are the base's.
    """
    of_layer = {at: [i for i, layer in enumerate(layers) if layer == at] for at in sorted(set(layers))}
    base, shared = None, dict.fromkeys(of_layer)
    if whole.n_shared:
        with record_resid_pre(chat.model, list(of_layer), lambda h: h) as resid:
            base = _shared_cache(chat, whole, 1)
        for layer, items in of_layer.items():
            steered = resid[layer] + vectors[items][:, None]
            shared[layer] = _steered_cache(chat, whole, base, steered, layer)

    def run(batch: PromptBatch):
        size = len(batch.prompt_ids)
        with record_resid_pre(chat.model, list(of_layer), lambda h: h) as resid:
            final_hidden(chat.model, batch, _rows_of(base, torch.tensor([0]), size))
        for layer, items in of_layer.items():
            for part in _chunks(len(items), batch, tokens_per_pass):
                at, cache = torch.tensor(items)[part], _rows_of(shared[layer], part, size)
                steered = resid[layer] + vectors[at][:, None, None]
                with run_from_layer(chat.model, layer, steered.flatten(0, 1)):
                    hidden = final_hidden(chat.model, _repeated(batch, len(at)), cache)[:, -1]
                yield at, logits_of(hidden, *output_head(chat.model)).unflatten(0, (len(at), -1))

    return run


def _steered_cache(chat: ChatModel, whole: PromptBatch, base: Cache, resid: Tensor, layer: int) -> Cache:
    """The shared columns' cache with `resid` at the input of `layer`; below it, the base's."""
    with run_from_layer(chat.model, layer, resid):
        cache = _shared_cache(chat, whole, len(resid))
    for i, below in enumerate(base.layers[:layer]):
        parts: Any = (below.keys, below.values)
        cache.update(*(part.expand(len(resid), -1, -1, -1) for part in parts), i)
    return cache
