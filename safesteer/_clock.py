"""Seconds and work of a run, by stage and part, while a clock runs; nothing is measured while none does.

Code marks its parts with `timed` and stages with `staged`, and counts what it computes. A part inside
another part belongs to the outer one: the passes of a judge are the judge's. `profiling.profiled` starts a
clock.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # not needed by who only asks for --help
    import torch
    from transformers import PretrainedConfig

START, OTHER, STUDENT, BACKWARD = "start", "other", "student", "backward"
Place: TypeAlias = tuple[str, str]  # stage and part
Kind: TypeAlias = tuple[str, str]  # device and precision that a matrix product is made in


@dataclass
class Work:
    """What one part of one stage took and did. Operations are those of matrix products."""

    seconds: float = 0.0
    passes: int = 0
    tokens: int = 0
    operations: Counter[Kind] = field(default_factory=Counter)


@dataclass
class Clock:
    """The work of a run so far, and where it is now.

    `wait` returns when the device has done what it was told. `shapes` are those of the weights that matrix
    products were made with, by their operations.
    """

    wait: Callable[[], None]
    place: Place = (START, OTHER)
    since: float = field(default_factory=time.perf_counter)
    work: defaultdict[Place, Work] = field(default_factory=lambda: defaultdict(Work))
    shapes: defaultdict[Kind, Counter[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(Counter))
    kind: Kind = ("", "")  # of the last product


_RUNNING: list[Clock] = []


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    """Let the clock run inside the block; its seconds add up to those of the block."""
    clock.since = time.perf_counter()
    _RUNNING.append(clock)
    try:
        yield
    finally:
        _RUNNING.remove(clock)
        _go_to(clock, (START, OTHER))


def _go_to(clock: Clock, place: Place) -> None:
    clock.wait()
    now = time.perf_counter()
    clock.work[clock.place].seconds += now - clock.since
    clock.place, clock.since = place, now


@contextmanager
def staged(stage: str) -> Iterator[None]:
    """Count what the block takes as that stage's."""
    clock = _RUNNING[-1] if _RUNNING else None
    if clock is None:
        yield
        return
    _go_to(clock, (stage, OTHER))
    try:
        yield
    finally:
        _go_to(clock, (START, OTHER))


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Count what the block takes as that part's, unless it is inside of another part."""
    clock = _RUNNING[-1] if _RUNNING else None
    if clock is None or clock.place[1] != OTHER:
        yield
        return
    stage = clock.place[0]
    _go_to(clock, (stage, part))
    try:
        yield
    finally:
        _go_to(clock, (stage, OTHER))


def count_product(
    n: int, weight: "torch.Tensor", dtype: "torch.dtype", device: "torch.device", n_backward: int = 0
) -> None:
    """Count the product of `n` rows with a matrix, and as many times its operations in the backward pass."""
    if not _RUNNING:
        return
    clock, shape = _RUNNING[-1], tuple(weight.shape[-2:])
    clock.kind = device.type, str(dtype).removeprefix("torch.")
    operations = 2 * n * shape[0] * shape[1]
    clock.shapes[clock.kind][shape] += operations
    _count(clock, operations, n_backward)


def count_pass(config: "PretrainedConfig", n: int, n_tokens: int, n_keys: int, n_backward: int = 0) -> None:
    """Count `n` passes that read `n_tokens` positions, each attending to `n_keys` others on average.

    Attention's two products have 4 x width operations per layer, position and key. They count as of the
    precision of the product before them.
    """
    if not _RUNNING:
        return
    clock = _RUNNING[-1]
    work = clock.work[clock.place]
    work.passes, work.tokens = work.passes + n, work.tokens + n_tokens
    per_key = 4 * config.hidden_size * config.num_hidden_layers
    _count(clock, per_key * n_tokens * n_keys, n_backward)


def _count(clock: Clock, operations: int, n_backward: int) -> None:
    """Add operations where the clock is; those of a backward pass follow for the student alone."""
    stage, part = clock.place
    clock.work[clock.place].operations[clock.kind] += operations
    if part == STUDENT and n_backward:
        clock.work[stage, BACKWARD].operations[clock.kind] += n_backward * operations
