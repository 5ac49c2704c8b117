"""Forward passes over a batch, as it is laid out: shared columns once, then the others with their cache.

`forward` decides which layout and which cache a model may have; here nothing is decided. Steering needs to
know which prompts a pass continues and where their answers start: `reading` tells it, for the passes inside.
Steering that differs from row to row tells `forward` in its turn, by `rows_differ`. `bare` puts the hooks of
SafeSteer aside for a pass inside a pass.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import Cache, DynamicCache, GenerationConfig

from safesteer._clock import count_pass, timed
from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.parts import context_length, decoder, hf_model, text_config

P = ParamSpec("P")
T = TypeVar("T")
# The prompts that the passes now running read and continue: steering with a scope or a gate asks.
READ_NOW: ContextVar[PromptBatch | None] = ContextVar("read_now", default=None)
# Decoders whose rows are steered differently, so that none of their columns are the same in every row.
_DIFFERING: ContextVar[tuple[nn.Module, ...]] = ContextVar("differing", default=())
# Decoders under hooks that know a row by its place in the batch.
_STAYING: ContextVar[tuple[nn.Module, ...]] = ContextVar("staying", default=())
# Decoders that are steered by vectors of the rows, with the number of the vectors.
_BY_ROW: ContextVar[tuple[tuple[nn.Module, int], ...]] = ContextVar("by_row", default=())
# Marks hooks that belong to a block of SafeSteer.
_OURS = "_of_safesteer"
# How many blocks of `bare` are open: a hook acts in as many as were open when it was set.
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def bare() -> Iterator[None]:
    """Run passes inside the block as if no hook of SafeSteer had been set before it."""
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def unless_bare(hook: Callable[P, T]) -> Callable[P, T | None]:
    """Return the hook, silent in blocks of `bare` that are opened later."""
    depth = _DEPTH.get()

    def acting(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return hook(*args, **kwargs) if _DEPTH.get() == depth else None

    vars(acting)[_OURS] = True
    return acting


def take_hooks_off(model: nn.Module) -> None:
    """Take the hooks of SafeSteer off a copy of a model; those of others stay."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hasattr(hook, _OURS)]:
                del hooks[key]


@contextmanager
def reading(batch: PromptBatch) -> Iterator[None]:
    """Tell steering which prompts are read, for the passes inside the block."""
    token = READ_NOW.set(batch)
    try:
        yield
    finally:
        READ_NOW.reset(token)


def rows_differ(model: nn.Module) -> AbstractContextManager[None]:
    """Let no columns be shared by the rows of a batch, for passes of `model` inside the block."""
    return _marked(_DIFFERING, model)


def has_differing_rows(model: nn.Module) -> bool:
    """Return whether a block of `rows_differ` is open for the model."""
    return _is_marked(_DIFFERING, model)


def rows_stay(model: nn.Module) -> AbstractContextManager[None]:
    """Keep every row in its place until all answers have ended, for passes of `model` inside the block."""
    return _marked(_STAYING, model)


def rows_must_stay(model: nn.Module) -> bool:
    """Return whether a block of `rows_stay` is open for the model."""
    return _is_marked(_STAYING, model)


@contextmanager
def rows_in_order(model: nn.Module, n: int) -> Iterator[None]:
    """Let `ChatModel.batched` keep `n` prompts in one batch, as they are given, inside the block."""
    token = _BY_ROW.set((*_BY_ROW.get(), (decoder(model), n)))
    try:
        yield
    finally:
        _BY_ROW.reset(token)


def n_rows_in_order(model: nn.Module) -> int | None:
    """Return the number of prompts that have to stay as they are given; None where none have to."""
    return next((n for part, n in _BY_ROW.get() if part is decoder(model)), None)


def _is_marked(marked: ContextVar[tuple[nn.Module, ...]], model: nn.Module) -> bool:
    """Return whether a model's decoder is among the marked ones."""
    return any(part is decoder(model) for part in marked.get())


@contextmanager
def _marked(marked: ContextVar[tuple[nn.Module, ...]], model: nn.Module) -> Iterator[None]:
    """Put a model's decoder among the marked ones inside the block."""
    token = marked.set((*marked.get(), decoder(model)))
    try:
        yield
    finally:
        marked.reset(token)


@contextmanager
def plain_decoding(model: nn.Module) -> Iterator[None]:
    """Let `generate` decode by the model's probabilities alone: a checkpoint's rules are put aside.

    transformers fills what a call leaves out from the model's generation_config: bans, penalties, beams,
    caches. And Qwen's vision models keep by how much an image shifted the positions of the batch before.
    """
    inner = hf_model(model)
    before, inner.generation_config = inner.generation_config, GenerationConfig()
    for module in inner.modules():
        if getattr(module, "rope_deltas", None) is not None:
            cast(Any, module).rope_deltas = None
    try:
        yield
    finally:
        inner.generation_config = before


def _check(model: nn.Module, batch: PromptBatch) -> None:
    """Refuse dropout, which makes every number another, and what is longer than the context.

    A model reads nonsense beyond its context, at quadratic cost.
    """
    if model.training and any(map(_drops_out, model.modules())):
        raise SafeSteerError("The model is in training mode, and its dropout is on: call model.eval() first.")
    limit, n = context_length(model), batch.prompt_ids.shape[1]
    if limit and n > limit:
        raise SafeSteerError(
            f"A prompt with its answer has {int(batch.attention_mask.sum(1).max()):,} tokens, and the model"
            f" reads {limit:,}: shorten it or leave it out."
        )


def _drops_out(module: nn.Module) -> bool:
    """Return whether a module leaves out a part of what goes through it."""
    if isinstance(module, _DropoutNd):
        return module.training and module.p > 0
    shares = (value for name, value in vars(module).items() if "dropout" in name or "pdrop" in name)
    return module.training and any(isinstance(share, float) and share > 0 for share in shares)


@timed("prompts")
def read_cache(model: nn.Module, batch: PromptBatch, upto: int, times: int = 1) -> Cache:
    """Compute the keys and values of the first `upto` columns.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        batch: The prompts. The columns that all rows share are computed once, in a pass of their own.
        upto: Number of columns to read.
        times: How often each row is repeated in the cache, for as many continuations.

    Raises:
        SafeSteerError: Where the batch is longer than the model's context.
    """
    _check(model, batch)
    read, n = decoder(model), batch.n_shared
    cache: Cache = DynamicCache(config=text_config(model))
    with reading(batch):
        if n > 0:
            cache = read(batch.prompt_ids[:1, :n], past_key_values=cache, use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch.prompt_ids))
        if upto > n:
            cache = read(
                batch.prompt_ids[:, n:upto],
                attention_mask=batch.attention_mask[:, :upto],
                position_ids=batch.position_ids[:, n:upto],
                past_key_values=cache,
                use_cache=True,
            ).past_key_values
    if n > 0:
        count_pass(text_config(model), 1, n, n)
    if upto > n:
        count_pass(text_config(model), 1, len(batch.prompt_ids) * (upto - n), upto)
    if times > 1:
        cache.batch_repeat_interleave(times)
    return cache


def select_rows(cache: Cache, at: Int[Tensor, " some"]) -> None:
    """Keep some rows of a cache, in place; each layer's part lies on the device of its block."""
    for layer in cache.layers:
        layer.batch_select_indices(at.to(getattr(layer, "device", at.device)))


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Compute attention inside the block by other kernels than cuDNN's, whose gradients can be NaN.

    torch 2.11 takes that kernel by default on an H100 or H200. With a mask of padding and 64, 192, 320 ...
    columns its backward pass is wrong (github.com/pytorch/pytorch/issues/196678): one training step in twelve
    ended in NaN there. A pass that is recomputed for its gradient must run in the block a second time.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@timed("prompts")
def read_states(
    model: nn.Module, batch: PromptBatch, cache: Cache | None = None
) -> Float[Tensor, "batch uncached d_model"]:
    """Compute the hidden states after the final norm: what the output head reads.

    Args:
        model: Plain, PEFT-wrapped or a bridge.
        batch: Prompts with their continuations.
        cache: Keys and values of the first columns, used up by this call (None: those of the shared
            columns are computed here).

    Returns:
        The columns that no cache holds, [batch, uncached, d_model]. Count them from the right.

    Raises:
        SafeSteerError: Where the batch is longer than the model's context.
    """
    _check(model, batch)
    with without_cudnn_attention() if torch.is_grad_enabled() else nullcontext():
        if cache is None and batch.n_shared > 0:
            cache = read_cache(model, batch, batch.n_shared)
        n = 0 if cache is None else cache.get_seq_length()
        with reading(batch):
            out = decoder(model)(
                batch.prompt_ids[:, n:],
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids[:, n:],
                past_key_values=cache,
                use_cache=cache is not None,
            )
    states = out.last_hidden_state.to(batch.prompt_ids.device)  # with a map the last block may lie elsewhere
    n_keys = batch.prompt_ids.shape[1]
    count_pass(text_config(model), 1, len(states) * (n_keys - n), n_keys, 2 * states.requires_grad)
    return states
