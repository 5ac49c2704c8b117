"""The three scores of a sweep, for many candidates at once.

Naively every candidate costs three whole passes. Here:
- candidates are packed beside each other into one pass, each with a vector of its own rows;
- the columns that all prompts share (the system turn) are read once per candidate, not once per prompt,
  and their keys and values kept while its group is scored;
- addition starts at the steered layer, from residuals recorded in one pass of the base;
- the output head reads the last positions only.
Memory holds one group of candidates and one batch of prompts: it is independent of the number of
candidates and of prompts.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from safesteer._clock import count_pass, timed
from safesteer.directions.candidates import Candidates
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import earned, final_hidden, last_logits
from safesteer.models.generation import with_greedy_tokens
from safesteer.models.head import output_head
from safesteer.models.logits import kl_divergence, logits_of, mean_over, refusal_score
from safesteer.models.parts import decoder
from safesteer.models.pass_sizes import sizes_on
from safesteer.models.passes import select_rows
from safesteer.models.processes import in_turns
from safesteer.progress import Progress, no_progress
from safesteer.prompts.prompt_set import PromptSet
from safesteer.settings import DirectionConfig
from safesteer.steering import interventions
from safesteer.steering.hooks import record_resid_pre, resumption, run_from_layer

SCORES = ["ablation_refusal", "steering_refusal", "kl_harmless"]
CANDIDATES_PER_GROUP = 32

# Projects one vector per row out of the model, inside the block.
Ablate: TypeAlias = Callable[[nn.Module, Tensor], AbstractContextManager[None]]
# Runs a batch with each candidate applied, and yields a few candidates at a time with their logits at
# the last positions: (candidates, [candidate, prompt, n_last, d_vocab]).
Pass: TypeAlias = Callable[
    [PromptBatch, int], Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some prompt n_last d_vocab"]]]
]


def layer_limit(candidates: Candidates, max_layer_share: float) -> int:
    """Return the first layer that cannot be selected."""
    return math.ceil(max_layer_share * candidates.vectors.shape[1])


def runnable(candidates: Candidates, max_layer_share: float) -> list[tuple[int, int]]:
    """Return (position, layer) of the candidates that can be selected, by layer."""
    last = layer_limit(candidates, max_layer_share)
    layers = (layer for layer in range(last) if candidates.has(layer))
    return [(i, layer) for layer in layers for i in range(len(candidates.positions))]


@torch.no_grad()
def score(
    chat: ModelLike,
    vectors: Float[Tensor, "n d_model"],
    layers: list[int],
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    config: DirectionConfig | None = None,
    *,
    placebo: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Float[Tensor, "n n_prompts"]]:
    """Score each candidate on each prompt.

    Args:
        chat: The base model.
        vectors: The candidates.
        layers: Where each of them is added.
        prompts: Harmful and harmless prompts.
        refusal_ids: First tokens of a refusal.
        config: Sizes of passes, tokens of KL and the seed of the placebo; None: the defaults.
        placebo: Replace every candidate by its control: for addition a random direction of its length,
            for ablation a move of the same distance.
        progress: Called with the share done.

    Returns:
        The three SCORES by name: ablation on harmful prompts, the others on harmless ones.
    """
    chat, config = as_chat(chat), config or DirectionConfig()
    vectors, refusal_ids = vectors.to(chat.device), refusal_ids.to(chat.device)
    texts = _Texts.of(chat, prompts, config)
    n_tokens = config.tokens_per_pass or sizes_on(chat.device).tokens
    n_harmful, n_harmless = len(prompts.harmful), len(prompts.harmless)
    scores = {
        name: torch.zeros((len(vectors), n), dtype=torch.float64)
        for name, n in zip(SCORES, (n_harmful, n_harmless, n_harmless), strict=True)
    }
    ablate: Ablate = interventions.ablate
    shifts, total, done = vectors, len(vectors) * (n_harmful + n_harmless), 0
    if placebo:
        ablate = partial(interventions.ablate_placebo, seed=config.seed)
        shifts = _random_like(vectors, config.seed)
    by_layer = torch.tensor(sorted(range(len(layers)), key=layers.__getitem__))

    def score_group(group: Int[Tensor, " group"]) -> list[tuple[str, Tensor, list[int], Tensor]]:
        parts, inside = [], 0
        ablated = _ablation(chat, texts.joined, vectors[group], ablate, n_tokens)
        added = _addition(chat, texts.joined, shifts[group], [layers[i] for i in group], n_tokens)
        for name, at, rows, values in _group_scores(chat, texts, ablated, added, refusal_ids):
            parts.append((name, at, rows, values.double().cpu()))
            inside += 0 if name == "steering_refusal" else len(at) * len(rows)
            progress((done + inside) / total)
        return parts

    for group, parts in in_turns(by_layer.split(CANDIDATES_PER_GROUP), score_group):
        for name, at, rows, values in parts:
            scores[name][group[at][:, None], rows] = values
        done += len(group) * (n_harmful + n_harmless)
    return scores


class _Batch(NamedTuple):
    """Some prompts of one kind, with their indices."""

    rows: list[int]
    prompts: PromptBatch
    answered: PromptBatch  # with the base's own first tokens


@dataclass(frozen=True, eq=False)
class _Texts:
    """All prompts in one layout, so that the columns that they share are the same in every batch."""

    joined: PromptBatch
    harmful: list[_Batch]
    harmless: list[_Batch]
    n_kl_tokens: int

    @classmethod
    def of(cls, chat: ChatModel, prompts: PromptSet, config: DirectionConfig) -> "_Texts":
        """Split the prompts into batches; harmless ones get the base's own first greedy tokens."""
        joined = [*prompts.harmful, *prompts.harmless]
        texts = PromptBatch.of(chat.tokenizer, joined, device=chat.device, keep_shared=True)
        texts = earned(chat.model, texts)
        harmful, harmless, n_prompts = [], [], config.batch_size or sizes_on(chat.device).prompts
        for rows in batches(chat.tokenizer, prompts.harmful, n_prompts):
            batch = texts.rows(torch.tensor(rows))
            harmful.append(_Batch(rows, batch, batch))
        for rows in batches(chat.tokenizer, prompts.harmless, n_prompts):
            batch = texts.rows(len(prompts.harmful) + torch.tensor(rows))
            # KL over the base's own first tokens: one token alone is often structural.
            harmless.append(_Batch(rows, batch, with_greedy_tokens(chat, batch, config.n_kl_tokens - 1)))
        return cls(texts, harmful, harmless, config.n_kl_tokens)


def _group_scores(
    chat: ChatModel, texts: _Texts, ablated: Pass, added: Pass, refusal_ids: Int[Tensor, " n_refusal"]
) -> Iterator[tuple[str, Int[Tensor, " some"], list[int], Float[Tensor, "some prompt"]]]:
    """Yield (name of the score, candidates of the group, prompts, values)."""
    for rows, prompts, _ in texts.harmful:
        for at, logits in ablated(prompts, 1):
            yield "ablation_refusal", at, rows, refusal_score(logits[:, :, 0], refusal_ids)
    for rows, prompts, answered in texts.harmless:
        for at, logits in added(prompts, 1):
            yield "steering_refusal", at, rows, refusal_score(logits[:, :, 0], refusal_ids)
        base = last_logits(chat, answered, texts.n_kl_tokens)
        counting = answered.last_counting(chat.eos_ids, base.shape[1])
        for at, logits in ablated(answered, texts.n_kl_tokens):
            kls = kl_divergence(base[None].expand_as(logits), logits)
            yield "kl_harmless", at, rows, mean_over(kls, counting[None].expand_as(kls))


def _random_like(vectors: Float[Tensor, "n d_model"], seed: int) -> Float[Tensor, "n d_model"]:
    """Draw a random direction for each candidate, of its length."""
    from transformer_lens.tools.analysis import random_basis  # slow to import

    axes = [random_basis(vectors.shape[1], 1, seed + 1 + i)[:, 0] for i in range(len(vectors))]
    return torch.stack(axes).to(vectors) * vectors.norm(dim=-1, keepdim=True)


def _chunks(n: int, batch: PromptBatch, tokens_per_pass: int) -> tuple[Int[Tensor, " some"], ...]:
    """Split candidates 0 to n - 1 into even groups whose rows fill a pass."""
    width = batch.prompt_ids.shape[1] - batch.n_shared
    n_passes = math.ceil(n * len(batch.prompt_ids) * width / tokens_per_pass)
    return torch.arange(n).tensor_split(max(1, min(n_passes, n)))


def _repeated(batch: PromptBatch, times: int) -> PromptBatch:
    """Repeat the rows: all for the first candidate, then all for the next."""
    parts = (batch.prompt_ids, batch.attention_mask, batch.completion_mask)
    return PromptBatch(*(p.repeat(times, 1) for p in parts), batch.n_shared)


def _rows_of(cache: Cache | None, at: Int[Tensor, " some"], times: int) -> Cache | None:
    """Take some rows of a cache, each `times` times; the cache itself stays as it was."""
    if cache is None:
        return None
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    select_rows(taken, at.repeat_interleave(times))
    return taken


def _shared_cache(chat: ChatModel, texts: PromptBatch, n_rows: int) -> Cache:
    """Compute keys and values of the shared columns under the hooks that are set; one row per candidate."""
    cache: Cache = DynamicCache(config=chat.config)
    ids = texts.prompt_ids[:1, : texts.n_shared].expand(n_rows, -1)
    with timed("prompts"):
        decoder(chat.model)(ids, past_key_values=cache, use_cache=True)
        count_pass(chat.config, 1, ids.numel(), texts.n_shared)
    return cache


def _ablation(
    chat: ChatModel,
    texts: PromptBatch,
    vectors: Float[Tensor, "group d_model"],
    ablate: Ablate,
    tokens_per_pass: int,
) -> Pass:
    """Prepare passes with each candidate projected out of all that is written."""
    shared = None
    if texts.n_shared:
        with ablate(chat.model, vectors):
            shared = _shared_cache(chat, texts, len(vectors))

    def run(batch: PromptBatch, n_last: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(batch.prompt_ids)
        for at in _chunks(len(vectors), batch, tokens_per_pass):
            cache = _rows_of(shared, at, size)
            with ablate(chat.model, vectors[at].repeat_interleave(size, 0)):
                hidden = final_hidden(chat.model, _repeated(batch, len(at)), cache)[:, -n_last:]
            yield at, logits_of(hidden, *output_head(chat.model)).unflatten(0, (len(at), -1))

    return run


def _addition(
    chat: ChatModel,
    texts: PromptBatch,
    vectors: Float[Tensor, "group d_model"],
    layers: list[int],
    tokens_per_pass: int,
) -> Pass:
    """Prepare passes with each candidate added at its layer.

    Below the steered layer nothing changes: residuals, keys and values there are the base's.
    """
    of_layer = {at: [i for i, layer in enumerate(layers) if layer == at] for at in sorted(set(layers))}
    if not resumption(chat.model).works:
        return _whole_addition(chat, vectors, of_layer, tokens_per_pass)
    base, shared = None, dict.fromkeys(of_layer)
    if texts.n_shared:
        with record_resid_pre(chat.model, list(of_layer), lambda h: h) as resid_pre:
            base = _shared_cache(chat, texts, 1)
        for layer, members in of_layer.items():
            steered = resid_pre[layer] + vectors[members][:, None].to(resid_pre[layer])
            shared[layer] = _steered_cache(chat, texts, base, steered, layer)

    def run(batch: PromptBatch, n_last: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(batch.prompt_ids)
        with record_resid_pre(chat.model, list(of_layer), lambda h: h) as resid_pre:
            final_hidden(chat.model, batch, _rows_of(base, torch.tensor([0]), size))
        for layer, members in of_layer.items():
            for part in _chunks(len(members), batch, tokens_per_pass):
                at, cache = torch.tensor(members)[part], _rows_of(shared[layer], part, size)
                steered = resid_pre[layer] + vectors[at][:, None, None].to(resid_pre[layer])
                with run_from_layer(chat.model, layer, steered.flatten(0, 1)):
                    hidden = final_hidden(chat.model, _repeated(batch, len(at)), cache)[:, -n_last:]
                yield at, logits_of(hidden, *output_head(chat.model)).unflatten(0, (len(at), -1))

    return run


def _whole_addition(
    chat: ChatModel,
    vectors: Float[Tensor, "group d_model"],
    of_layer: dict[int, list[int]],
    tokens_per_pass: int,
) -> Pass:
    """Prepare the passes of `_addition` from the first block on, for models that cannot start later."""

    def run(batch: PromptBatch, n_last: int) -> Iterator[tuple[Tensor, Tensor]]:
        batch = batch.plain()
        for layer, members in of_layer.items():
            for part in _chunks(len(members), batch, tokens_per_pass):
                at = torch.tensor(members)[part]
                rows = vectors[at].repeat_interleave(len(batch.prompt_ids), 0)
                with interventions.add(chat.model, rows, layer):
                    hidden = final_hidden(chat.model, _repeated(batch, len(at)))[:, -n_last:]
                yield at, logits_of(hidden, *output_head(chat.model)).unflatten(0, (len(at), -1))

    return run


def _steered_cache(
    chat: ChatModel,
    texts: PromptBatch,
    base: Cache,
    resid_pre: Float[Tensor, "rows pos d_model"],
    layer: int,
) -> Cache:
    """Compute the shared columns' cache with `resid_pre` at `layer`; below it stands the base's."""
    with run_from_layer(chat.model, layer, resid_pre):
        cache = _shared_cache(chat, texts, len(resid_pre))
    for i, below in enumerate(base.layers[:layer]):
        keys, values = (
            cast(Tensor, part).expand(len(resid_pre), -1, -1, -1) for part in (below.keys, below.values)
        )
        cache.update(keys, values, i)
    return cache
