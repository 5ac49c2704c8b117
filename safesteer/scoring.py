"""The three scores of a sweep, for many candidates at once.

Naively every candidate costs three whole passes. Here:
- prompts go in small batches of like length, and candidates are packed beside each other into one
  pass, each with a vector of its own rows;
- the columns that all prompts share (the system turn) are read once a candidate, not once a prompt;
- addition starts at the steered layer, from residuals recorded in one pass of the base;
- the output head reads the last positions only.
Batches are the outer loop: memory does not grow with the number of prompts.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from safesteer import steering
from safesteer.divergence import kl_divergence, logits_of, refusal_score
from safesteer.extraction import Candidates
from safesteer.generation import generate_ids
from safesteer.hooks import record, starting_at
from safesteer.models import ChatModel, final_hidden, hf_model, output_head, prefill
from safesteer.prompts import PromptBatch, PromptSet, batches
from safesteer.refusal import last_logits

SCORES = ["ablation_refusal", "steering_refusal", "kl_harmless"]


def runnable(candidates: Candidates, max_layer_share: float) -> list[tuple[int, int]]:
    """(position, layer) of the candidates that can be selected, by layer."""
    n_pos, n_layers, _ = candidates.vectors.shape
    last = math.ceil(max_layer_share * n_layers)
    return [(i, layer) for layer in range(last) for i in range(n_pos)]


@torch.no_grad()
def score(
    chat: ChatModel,
    vectors: Float[Tensor, "n d_model"],
    layers: list[int],
    prompts: PromptSet,
    refusal_ids: Int[Tensor, " n_refusal"],
    *,
    placebo: bool = False,
    n_kl_tokens: int = 3,
    batch_size: int = 8,
    tokens_a_pass: int = 2048,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Float[Tensor, "n n_prompts"]]:
    """SCORES of each candidate on each prompt. `placebo` replaces every candidate by its control:
    a random direction of its length for addition, and for ablation a move of the same distance.
    """
    vectors, refusal_ids = vectors.to(chat.device), refusal_ids.to(chat.device)
    shape = {"ablation_refusal": len(prompts.harmful), "steering_refusal": len(prompts.harmless)}
    shape["kl_harmless"] = len(prompts.harmless)
    found = {k: torch.zeros((len(vectors), n), dtype=torch.float64) for k, n in shape.items()}
    work = [(True, r) for r in batches(chat.tokenizer, prompts.harmful, batch_size)]
    work += [(False, r) for r in batches(chat.tokenizer, prompts.harmless, batch_size)]
    total, done = sum(len(rows) for _, rows in work), 0
    ablate = _ablate_placebo(seed) if placebo else steering.ablate
    shifts = _random_like(vectors, seed) if placebo else vectors
    for is_harmful, rows in work:
        texts = [(prompts.harmful if is_harmful else prompts.harmless)[i] for i in rows]
        batch = PromptBatch.of(chat.tokenizer, texts, device=chat.device)
        if is_harmful:
            for at, logits in _ablated(chat, batch, vectors, ablate, 1, tokens_a_pass):
                values = refusal_score(logits[:, :, 0], refusal_ids)
                found["ablation_refusal"][at[:, None], rows] = values.cpu()
        else:
            for at, logits in _added(chat, batch, shifts, layers, tokens_a_pass):
                values = refusal_score(logits, refusal_ids)
                found["steering_refusal"][at[:, None], rows] = values.cpu()
            if n_kl_tokens > 1:  # the base's own first tokens: one token alone is often structural
                batch = batch.extended(generate_ids(chat, batch, max_new_tokens=n_kl_tokens - 1))
            base = last_logits(chat, batch, n_kl_tokens)
            for at, logits in _ablated(chat, batch, vectors, ablate, n_kl_tokens, tokens_a_pass):
                values = kl_divergence(base[None].expand_as(logits), logits).mean(-1)
                found["kl_harmless"][at[:, None], rows] = values.double().cpu()
        done += len(rows)
        progress(done / total)
    return found


def _ablate_placebo(seed: int):
    return lambda model, vector: steering.ablate_placebo(model, vector, seed)


def _random_like(vectors: Tensor, seed: int) -> Tensor:
    """A random direction for each candidate, of its length."""
    from transformer_lens.tools.analysis import random_basis  # slow to import

    axes = [random_basis(vectors.shape[1], 1, seed + 1 + i)[:, 0] for i in range(len(vectors))]
    return torch.stack(axes).to(vectors) * vectors.norm(dim=-1, keepdim=True)


def _chunks(items: list[int], batch: PromptBatch, tokens_a_pass: int) -> Iterator[Tensor]:
    """Candidates in groups whose rows fill a pass."""
    rest = batch.prompt_ids.shape[1] - batch.n_shared
    size = max(1, tokens_a_pass // (len(batch.prompt_ids) * rest))
    yield from torch.tensor(items).split(size)


def _repeated(batch: PromptBatch, times: int) -> PromptBatch:
    """All rows for the first candidate, then all for the next."""
    parts = (batch.prompt_ids, batch.attention_mask, batch.completion_mask)
    return PromptBatch(*(p.repeat(times, 1) for p in parts), batch.n_shared)


def _shared_cache(chat: ChatModel, batch: PromptBatch, vectors: Tensor, how) -> Cache | None:
    """Keys and values of the shared columns, one row a candidate, then repeated for its prompts."""
    if not batch.n_shared:
        return None
    ids = batch.prompt_ids[:1, : batch.n_shared].expand(len(vectors), -1)
    cache: Cache = DynamicCache(config=chat.config)
    with how(vectors):
        hf_model(chat.model).get_decoder()(ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch.prompt_ids))
    return cache


def _ablated(chat, batch, vectors, ablate, n_last, tokens_a_pass):
    """(candidates, logits [candidate, prompt, n_last, d_vocab]) with each projected out everywhere."""

    def how(vectors: Tensor):
        return ablate(chat.model, vectors)

    for at in _chunks(list(range(len(vectors))), batch, tokens_a_pass):
        chosen = vectors[at]
        cache = _shared_cache(chat, batch, chosen, how)
        with how(chosen.repeat_interleave(len(batch.prompt_ids), 0)):
            hidden = final_hidden(chat.model, _repeated(batch, len(at)), cache)[:, -n_last:]
        logits = logits_of(hidden, *output_head(chat.model))
        yield at, logits.unflatten(0, (len(at), -1))


def _added(chat, batch, vectors, layers, tokens_a_pass):
    """(candidates, logits [candidate, prompt, d_vocab]) with each added at its layer.

    Below the steered layer nothing changes: residuals, keys and values there are the base's.
    """
    todo = sorted(set(layers))
    n, base_cache, shared = batch.n_shared, None, {}
    if n:
        with record(chat.model, todo, lambda h: h) as shared:
            base_cache = prefill(chat.model, _repeated(batch.rows(torch.tensor([0])), 1), n)
    keep = copy.deepcopy(base_cache)  # reading on extends a cache in place
    if keep is not None:
        keep.batch_repeat_interleave(len(batch.prompt_ids))
    with record(chat.model, todo, lambda h: h) as rest:
        final_hidden(chat.model, batch, keep)
    for layer in todo:
        of_layer = [i for i, at in enumerate(layers) if at == layer]
        for at in _chunks(of_layer, batch, tokens_a_pass):
            chosen, size = vectors[at][:, None], len(batch.prompt_ids)
            cache = _steered_cache(chat, batch, base_cache, shared.get(layer), chosen, layer)
            resid = rest[layer].repeat(len(at), 1, 1) + chosen.repeat_interleave(size, 0)
            with starting_at(chat.model, layer, resid):
                hidden = final_hidden(chat.model, _repeated(batch, len(at)), cache)[:, -1]
            yield at, logits_of(hidden, *output_head(chat.model)).unflatten(0, (len(at), -1))


def _steered_cache(chat, batch, base_cache, shared, chosen, layer):
    """The shared columns' cache with each candidate added at `layer`; below it, the base's."""
    if base_cache is None:
        return None
    ids = batch.prompt_ids[:1, : batch.n_shared].expand(len(chosen), -1)
    cache: Cache = DynamicCache(config=chat.config)
    with starting_at(chat.model, layer, shared + chosen):
        hf_model(chat.model).get_decoder()(ids, past_key_values=cache, use_cache=True)
    for i in range(layer):
        below = base_cache.layers[i]
        keys, values = (t.expand(len(chosen), -1, -1, -1) for t in (below.keys, below.values))
        cache.update(keys, values, i)
    cache.batch_repeat_interleave(len(batch.prompt_ids))
    return cache
