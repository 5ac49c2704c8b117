"""Where in the text an intervention acts, through padding, shared columns and the KV cache.

Columns are counted from the start of the text. `columns_of` follows how many of them the cache holds, and
knows where each row's answer starts; `apply_in_scope` confines hooks to the columns of a scope.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from safesteer._errors import SafeSteerError
from safesteer.models.parts import decoder
from safesteer.models.passes import READ_NOW, rows_differ, unless_bare
from safesteer.steering.hooks import Edit, Point, apply_hooks

Scope = Literal["all", "prompt", "answer", "last"]
# What an intervention does, by (point, layer) as in `hooks.Edits`; each returns a tensor of the same shape.
Moves = Mapping[tuple[Point, int], Callable[[Tensor], Tensor]]

CACHES = ("past_key_values", "cache_params", "state")  # the names under which decoders take a cache


def attends(cache: Cache) -> bool:
    """Say whether some layer of a cache holds keys, so that the cache knows its length."""
    return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


class Columns:
    """Which columns of the text the running pass holds, and where each row's answer starts."""

    def __init__(self, prompt_width: int | None) -> None:
        self.past, self.prompt_width = 0, prompt_width
        self.read, self.cache = 0, None  # columns after the last pass, and the cache that holds them

    def read_cache(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count the cached columns, as a forward pre-hook of the decoder.

        The states of Mamba and its like do not say how many columns they have read: those are added up.
        """
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        if cache is None:
            self.past = 0
        elif isinstance(cache, Cache) and attends(cache):  # also after reset() or crop()
            self.past = int(cache.get_seq_length())
        elif cache is self.cache or not isinstance(cache, Cache):
            self.past = self.read
        else:
            self.past = 0
        ids = args[0] if args else kwargs.get("input_ids")
        self.read = self.past + (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        self.cache = cache

    def start(self, h: Tensor) -> Int[Tensor, "rows 1"]:
        """Return the column of each row's first answer token; one row where all rows share it."""
        batch = READ_NOW.get()
        start = None if batch is None else batch.answer_start
        if self.prompt_width is not None:
            start = torch.tensor([self.prompt_width])
        if start is None:
            raise SafeSteerError(
                "This intervention needs to know where the prompt ends: use safesteer.generate, or pass"
                " prompt_width=ids.shape[1]."
            )
        if len(h) % len(start) == 0:  # several samples per prompt: neighbours share one
            start = start.repeat_interleave(len(h) // len(start))
        elif len(h) > 1:
            raise SafeSteerError(f"A batch of {len(h)} rows does not continue {len(start)} prompts.")
        return start[:, None].to(h.device)

    def columns(self, h: Tensor) -> Int[Tensor, "1 pos"]:
        """Return the columns that the running pass holds."""
        return self.past + torch.arange(h.shape[1], device=h.device)[None]


@contextmanager
def columns_of(model: nn.Module, prompt_width: int | None) -> Iterator[Columns]:
    """Follow the columns of the passes that run inside the block."""
    at = Columns(prompt_width)
    handle = decoder(model).register_forward_pre_hook(unless_bare(at.read_cache), with_kwargs=True)
    try:
        yield at
    finally:
        handle.remove()


def _inside(scope: Scope, n_last: int, at: Columns, h: Tensor) -> Bool[Tensor, "rows pos 1"]:
    """Mark the positions of the running pass that lie in the scope."""
    column, start = at.columns(h), at.start(h)
    if scope == "prompt":
        inside = column < start
    elif scope == "answer":
        inside = column >= start
    else:
        inside = (column < start) & (column >= start - n_last)
    if len(inside) > len(h):  # columns that all rows share are read once
        inside = inside[:1]
    return inside[..., None]


@contextmanager
def apply_in_scope(
    model: nn.Module,
    edits: Moves,
    scope: Scope,
    n_last: int,
    prompt_width: int | None,
    *,
    rows_may_leave: bool = False,
) -> Iterator[None]:
    """Apply `edits` as `apply_hooks` does, confined to the columns of `scope`."""
    if scope not in ("all", "prompt", "answer", "last"):
        raise SafeSteerError(f"scope must be all, prompt, answer or last, not '{scope}'.")
    if scope == "all":
        with apply_hooks(model, edits, rows_may_leave=rows_may_leave):
            yield
        return
    # The last positions of a short prompt may lie in what all rows share, before its padding.
    alone = rows_differ(model) if scope == "last" else nullcontext()
    with alone, columns_of(model, prompt_width) as at:

        def confined(edit: Callable[[Tensor], Tensor]) -> Edit:
            return lambda h: torch.where(_inside(scope, n_last, at, h), edit(h), h)

        moves = {point: confined(edit) for point, edit in edits.items()}
        with apply_hooks(model, moves, rows_may_leave=rows_may_leave):
            yield
