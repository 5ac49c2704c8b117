"""What a model does right here, measured once on a few tokens and not guessed from its name.

Short cuts are earned. On prompts of unequal length a self-check compares final hidden states with those of
the single prompts:
1. padding        a left-padded batch;
2. shared prefix  the layout [shared | padding | others], which computes common columns once. A model that
                  attends in windows or chunks counts columns, padding too, and never earns it;
3. cache          keys and values of a prompt, repeated for two continuations;
4. decoding       the logits of two greedy tokens, decoded with the cache.
What fails is done in a slower way that is right. Logits have a check of their own (`head`), and what blocks
write (`writes`). Below float32 some models amplify rounding: `_rounding_limit` measures how far.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.head import FAILURES, deviation, logit_shape, once_per_model, probe_ids, tolerance
from safesteer.models.parts import blocks, context_length, hf_model, text_config
from safesteer.models.passes import plain_decoding, read_cache, read_states
from safesteer.models.placement import input_device
from safesteer.models.writes import writes_of

CHECKS = ("padding", "shared prefix", "repeated cache", "cached decoding")
LENGTHS = (5, 14)  # tokens of the prompts that are compared
N_COMMON = 3  # tokens that they begin with
N_DECODED = 2
# Of the root mean square, where rounding is coarse: that of Qwen2.5 is 0.005 to 0.016, and what a wrong
# layout moves in small models 0.05 and more.
HALF_TOLERANCE = 0.04
# A model that amplifies rounding may be off by this many times what rounding its blocks' outputs moves, but
# by no more than this share of what reading the padding as text moves.
ROUNDINGS, SHARE_OF_WRONG = 4, 0.25


@dataclass(frozen=True)
class Traits:
    """Which short cuts a model has earned, with the deviations that were measured (None: not tried)."""

    pads: bool = True
    shares_prefix: bool = True
    repeats_cache: bool = True
    decodes_cached: bool = True
    deviations: tuple[tuple[str, float | None, str], ...] = ()  # (check, deviation, remark)


def self_check(model: nn.Module) -> None:
    """Measure head and traits now, so that no later pass has to.

    Raises:
        SafeSteerError: If the model's logits are not a head on its final hidden states.
    """
    logit_shape(model)
    traits_of(model)


def check_table(model: nn.Module) -> pd.DataFrame:
    """Return the table of `ChatModel.check`: logits, short cuts, and what blocks write.

    Raises:
        SafeSteerError: If the model's logits are not a head on its final hidden states.
    """
    logits, traits = logit_shape(model), traits_of(model)
    remarks = [f"scaled by {logits.scale:g}"] if logits.scale != 1 else []
    remarks += [f"capped at {logits.softcap:g}"] if logits.softcap else []
    rows = [("logits", logits.deviation, True, ", ".join(remarks))]
    passed = (traits.pads, traits.shares_prefix, traits.repeats_cache, traits.decodes_cached)
    rows += [(*d[:2], right, d[2]) for d, right in zip(traits.deviations, passed, strict=True)]
    try:
        rows.append(("writes", writes_of(model).deviation, True, ""))
    except SafeSteerError as error:
        rows.append(("writes", None, False, str(error)))
    return pd.DataFrame(rows, columns=["check", "deviation", "right", "remark"])


@once_per_model
def traits_of(model: nn.Module) -> Traits:
    """Return the traits of a model: compare batches and caches with single prompts when first asked for."""
    ids = probe_ids(model, N_COMMON + sum(LENGTHS), seed=1)[0].tolist()
    common, others = ids[:N_COMMON], ids[N_COMMON:]
    rows = [[*common, *others[sum(LENGTHS[:i]) :][: n - N_COMMON]] for i, n in enumerate(LENGTHS)]
    device, empty = input_device(model), [[] for _ in rows]
    texts = [PromptBatch.from_ids([row], [[]], device=device) for row in rows]
    single = _ends(model, texts)
    want = single.double()
    if not bool(want.isfinite().all()):  # damaged weights: the passes that follow say where
        return Traits(deviations=tuple((name, None, "the model's states are not finite") for name in CHECKS))
    limit = tolerance(_coarsest(model, single), HALF_TOLERANCE)

    padded = plain = PromptBatch.from_ids(rows, empty, device=device, share=False)
    shared = PromptBatch.from_ids(rows, empty, device=device)
    window = _window(model)
    off = partial(_deviation, model)
    pads = off(lambda: _ends(model, [plain]), want)
    shares = None if window else off(lambda: _ends(model, [shared]), want)
    if pads is None or pads > limit:  # the longest row has no padding
        plain, want = plain.rows(torch.tensor([len(rows) - 1])), want[-1:]
    repeats = off(lambda: _from_repeated_cache(model, plain), want)
    decodes = _decoding_deviation(model, plain)
    deviations = (pads, shares, repeats, decodes)
    if limit == HALF_TOLERANCE and any(d is not None and d > limit for d in deviations):
        limit = max(limit, _rounding_limit(model, texts, padded, single))
    ok = [d is not None and d <= limit for d in deviations]
    remarks = (
        "" if ok[0] else "only texts of one length share a batch; sweep and training are refused",
        "" if ok[1] else f"common columns are computed in every row{window and f' ({window} is set)'}",
        "" if ok[2] else "prompts are read again for every sample",
        "" if ok[3] else "answers are decoded without a cache",
    )
    checks = zip(CHECKS, deviations, remarks, strict=True)
    return Traits(*ok, deviations=tuple(checks))


def _ends(model: nn.Module, texts: list[PromptBatch]) -> Float[Tensor, "rows 2 d_model"]:
    """Read the states of the last two columns of each batch."""
    return torch.cat([read_states(model, batch)[:, -2:] for batch in texts])


def _rounding_limit(
    model: nn.Module, texts: list[PromptBatch], padded: PromptBatch, want: Float[Tensor, "rows 2 d_model"]
) -> float:
    """Return how far this model's states may be off below float32 by rounding alone."""
    blind = replace(padded, attention_mask=torch.ones_like(padded.attention_mask))
    try:
        with _rounded_otherwise(model):
            rounded = _ends(model, texts)
    except SafeSteerError:  # no list of blocks
        return 0.0
    moved = _misfit(rounded, want, _coarsest(model, want))
    wrong = _deviation(model, lambda: _ends(model, [blind]), want) or 0.0
    return min(ROUNDINGS * moved, SHARE_OF_WRONG * wrong)


@contextmanager
def _rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Move the elements of every block's output by up to half a unit of rounding inside the block."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: tuple, output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)
        by = torch.rand(states.shape, generator=generator).to(states.device) - 0.5
        moved = (states.float() * (1 + torch.finfo(states.dtype).eps * by)).to(states.dtype)
        return (moved, *others) if isinstance(output, tuple) else moved

    handles = [block.register_forward_hook(move) for block in blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _window(model: nn.Module) -> str:
    """Name the setting by which a model attends to a window or chunk of its context; empty if to all."""
    config, context = text_config(model).to_dict(), context_length(model)
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and set(kinds) == {"full_attention"}:
        return ""
    names = (
        "sliding_window",
        "attention_window_size",
        "local_attention",
        "window_size",
        "attention_chunk_size",
        "index_topk",
    )
    sizes = {name: config[name] for name in names if config.get(name)}
    inside = (n for n, size in sizes.items() if not (context and isinstance(size, int) and size >= context))
    return next(inside, "")


def _from_repeated_cache(model: nn.Module, batch: PromptBatch) -> Float[Tensor, "batch 2 d_model"]:
    """Read the last two columns after a cache that holds every prompt twice; take each prompt once."""
    n = batch.prompt_ids.shape[1] - 2
    start = replace(
        batch,
        prompt_ids=batch.prompt_ids[:, :n],
        attention_mask=batch.attention_mask[:, :n],
        completion_mask=batch.completion_mask[:, :n],
    )
    cache = read_cache(model, start, n, times=2)
    full = start.extended(batch.prompt_ids[:, n:].repeat_interleave(2, 0))
    return read_states(model, full, cache)[::2]


def _decoding_deviation(model: nn.Module, batch: PromptBatch) -> float | None:
    """Compare the logits of greedy decoding with those of the model's own passes over the single texts."""
    inner = hf_model(model)
    try:
        with plain_decoding(model):
            out = inner.generate(
                batch.prompt_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=N_DECODED,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        got = torch.stack(out.logits, 1).double()
    except FAILURES:
        return None
    read = batch.attention_mask.sum(1)
    texts = [row[-n - N_DECODED : -1] for row, n in zip(out.sequences, read.tolist(), strict=True)]
    singles = [inner(text[None], use_cache=False).logits[0, -N_DECODED:].double() for text in texts]
    want = torch.stack(singles)[..., : got.shape[-1]]
    return _misfit(got[..., : want.shape[-1]], want, _coarsest(model, want))


def _coarsest(model: nn.Module, states: Tensor) -> torch.dtype:
    """Return the coarser precision: Mamba keeps its residual stream in float32 and its weights below."""
    weights = next(model.parameters()).dtype
    return weights if torch.finfo(weights).eps > torch.finfo(states.dtype).eps else states.dtype


def _misfit(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Return how far states are off, in units of the spread of what is wanted.

    The largest difference, or below float32 the root mean square: rounding alone moves the few huge elements
    of some models (Qwen2) by a quarter of the spread, and all of them by one or two hundredths; a wrong mask
    moves all by a third.
    """
    if dtype in (torch.float32, torch.float64):
        return deviation(got, want)
    want = want.double()
    return float((got.double() - want).pow(2).mean().sqrt() / want.std().clamp(min=1e-12))


def _deviation(
    model: nn.Module, read: Callable[[], Tensor], want: Float[Tensor, "batch 2 d_model"]
) -> float | None:
    """Return the deviation of what is read; None where reading fails."""
    try:
        states = read()
    except FAILURES:
        return None
    return _misfit(states, want, _coarsest(model, states)) if states.shape == want.shape else None


def require_padding(model: nn.Module, mask: Int[Tensor, "batch pos"]) -> None:
    """Raise SafeSteerError for a padded batch that the model would read wrongly."""
    if not traits_of(model).pads and not bool(mask.all()):
        raise SafeSteerError(
            f"{type(hf_model(model)).__name__} reads a padded batch otherwise than single prompts, and the"
            " prompts here have different lengths."
        )
