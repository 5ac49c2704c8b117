"""A model's blocks spread over processes (torch's fully sharded data parallel), and passes in step.

Of every block each process keeps a share of the weights, gradients and Adam moments; a block is whole
only while it runs. Embedding, final norm and head stay whole, because the loss reads the head's rows.

A block is put together by all processes at once, so all must make the same number of passes; but
answers end at different lengths. `equal_passes` settles that: before each pass the processes tell each
other who still works, and one that has finished makes empty passes until all have.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from safesteer._errors import SafeSteerError
from safesteer.models.parts import blocks, decoder
from safesteer.models.traits import self_check


def require_processes() -> PartialState:
    """Return this process among the others; raises SafeSteerError where it is alone."""
    processes = PartialState(cpu=not torch.accelerator.is_available())
    if processes.num_processes == 1:
        raise SafeSteerError("distill.sharded needs several processes: use torchrun or accelerate launch.")
    return processes


def shard(model: nn.Module) -> None:
    """Spread the blocks of `model` over the processes, in place; once is enough.

    A model on the CPU is taken to the process's device block by block, so no device ever holds it whole.

    Raises:
        SafeSteerError: Where there is one process only.
    """
    processes = require_processes()
    self_check(model)  # while the model is in one piece
    for block in blocks(model):
        if not isinstance(block, FSDPModule):
            fully_shard(block, reshard_after_forward=True)
    model.to(processes.device)


@contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """Let the model wait on the CPU inside the block."""
    device = next(model.parameters()).device
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has spread the model."""
    return isinstance(blocks(model)[0], FSDPModule)


def gather(tensor: Tensor) -> Tensor:
    """Gather a tensor that is spread over processes (all must call this), or return a whole one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Spread `tensor` as `like` is and return this process's share; the tensor itself for a whole one."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def split_sharded(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Separate spread tensors from whole ones: no operation takes both."""
    kinds: list[list[Tensor]] = [[], []]
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return [kind for kind in kinds if kind]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the Euclidean norm of all of them together."""
    norms = [gather(nn.utils.get_total_norm(kind)) for kind in split_sharded(tensors)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


@contextmanager
def equal_passes(model: nn.Module, *, backward: bool = False) -> Iterator[None]:
    """Let processes make different numbers of passes of a sharded model inside; all leave together.

    With `backward` every pass is followed by its backward pass. Nothing happens for a model that is whole.
    """
    if not is_sharded(model):
        yield
        return
    inner = decoder(model)
    device = next(inner.parameters()).device
    handle = inner.register_forward_pre_hook(lambda module, args: _anyone(True, device) and None)
    try:
        yield
    finally:
        handle.remove()
    while _anyone(False, device):
        nothing = inner(torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
        if backward:
            (0.0 * nothing.last_hidden_state).sum().backward()


def _anyone(works: bool, device: torch.device) -> bool:
    flag = torch.tensor(int(works), device=device)
    all_reduce(flag)
    return bool(flag > 0)
