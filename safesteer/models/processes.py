"""Work that several processes share: each does some of it, and all have every result.

1. Items (batches of prompts) are dealt out one after the other: of P processes each takes every P-th.
2. After each round the processes give each other what they made, so all see the same results in one order.
Batches are those of a single process, and so are their results. Every process has to ask for the same items:
`share_work` says that all are inside, and what decides on further items is shared too, so that rounding on
another device decides nothing. Outside of it, and in one process alone, nothing is shared.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device

from safesteer._errors import SafeSteerError

Item = TypeVar("Item")
Result = TypeVar("Result")
_SHARING: ContextVar[bool] = ContextVar("sharing", default=False)


@contextmanager
def share_work(shares: bool = True) -> Iterator[None]:
    """Let the processes share what `in_turns` does inside the block; all of them have to enter it."""
    token = _SHARING.set(shares)
    try:
        yield
    finally:
        _SHARING.reset(token)


def in_turns(
    items: Iterable[Item], work: Callable[[Item], Result], device: torch.device | str = "cpu"
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) in order; inside `share_work` each process works on some of the items.

    Args:
        items: The same in every process.
        work: Returns tensors, numbers or text, alone or in lists, tuples and dictionaries. Nothing that it
            does is shared once more.
        device: Where tensors are put that another process has made.

    Raises:
        SafeSteerError: In every process, where `work` raises it in one of them.

    Example:
        >>> from safesteer.models.processes import in_turns
        >>> list(in_turns([1, 2, 3], lambda n: n * n))
        [(1, 1), (2, 4), (3, 9)]
    """
    processes = PartialState() if _SHARING.get() else None
    if processes is None or processes.num_processes == 1:
        yield from ((item, work(item)) for item in items)
        return
    waiting, rank = iter(items), processes.process_index
    while turn := list(islice(waiting, processes.num_processes)):
        outcomes = gather_object([_outcome(work, item) for item in turn[rank : rank + 1]])
        for item, (result, error) in zip(turn, outcomes, strict=True):
            if error is not None:
                raise SafeSteerError(error)
            yield item, cast(Result, send_to_device(result, device))


def _outcome(work: Callable[[Item], Result], item: Item) -> tuple[Result | None, str | None]:
    """Return what the other processes get: the result, or the sentence that says why there is none."""
    try:
        with share_work(False):
            return cast(Result, send_to_device(work(item), "cpu")), None
    except SafeSteerError as error:
        return None, str(error)
