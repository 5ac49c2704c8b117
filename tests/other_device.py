"""A second device without hardware: tensors that say device "other" and refuse to mix with those of the CPU.

torch lets Python stand for a device (privateuse1). A tensor of it here is a wrapper around a CPU tensor that
does the work, so values come back by `.cpu()`, `.item()` and `.tolist()` as from a GPU, and in no other way.
What CUDA allows is allowed: scalars of the CPU, indices of the CPU into a tensor of the device, and copies.
Every other operation that gets tensors of both raises. Autocast changes nothing on this device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default}
OF_PLAIN_TENSORS = {torch.Tensor.tolist, torch.Tensor.untyped_storage}  # torch refuses them to subclasses
LIBRARIES = []  # kernels live as long as these do
CAN_BE_EMULATED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # by this torch


class MixedDevices(RuntimeError):
    """An operation got tensors of both devices."""


class OtherTensor(torch.Tensor):
    """A tensor on the device "other"; `held` is the CPU tensor with its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OtherTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        device = torch.device("other", 0)
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=device, **layout)
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"other({self.held!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__:  # torch moves the metadata alone
            args[0].held = args[1].held
        if func in OF_PLAIN_TENSORS:
            return func(args[0].held)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Makes tensors where they are asked for; keeps what went wrong where torch cannot raise it."""

    refused: MixedDevices | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if OtherTensor not in types and not _names_other(kwargs):
            return func(*args, **kwargs)
        try:
            return _run(func, args, kwargs)
        except MixedDevices as error:
            if torch._C._current_graph_task_id() == -1:
                raise
            self.refused = error  # an error of Python's inside a backward pass would end the process
            return _run(func, args, kwargs, mixes=True)


def _names_other(kwargs: dict) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "other"


def _each(value, change):
    """Change the tensors in arguments or results."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_each(v, change) for v in value])
    return {k: _each(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, OtherTensor) else tensor


def _run(func, args, kwargs, mixes=False):
    """Do an operation on the CPU tensors inside, and wrap what comes out."""
    taken = []
    _each((args, kwargs), taken.append)
    if not mixes:
        _refuse_mixing(func, args, taken)
    options = _each(kwargs, _held)
    goes_to_cpu = options.get("device") is not None and not _names_other(kwargs)
    if options.get("device") is not None:
        options["device"] = torch.device("cpu")
    out = func(*_each(args, _held), **options)
    if any(t.shape != _held(t).shape for t in taken):
        raise NotImplementedError(f"{func} changes a shape in place, which is not emulated.")
    same = {id(_held(t)): t for t in taken}  # what an operation in place returns
    return out if goes_to_cpu else _each(out, lambda t: same[id(t)] if id(t) in same else OtherTensor(t))


def _refuse_mixing(func, args, taken) -> None:
    if func in COPIES:
        return
    if func in INDEXED:
        indices = []
        _each(args[1], indices.append)
        if args[0].device.type == "cpu" and any(t.device.type == "other" for t in indices):
            raise MixedDevices(f"{func}: a tensor of the CPU is indexed by one of another device.")
        taken = [t for t in taken if not any(t is i for i in indices)]
    devices = {t.device.type for t in taken if t.dim() > 0 or t.device.type == "other"}
    if len(devices) > 1:
        raise MixedDevices(f"{func}: expected all tensors on the same device, got {sorted(devices)}.")


def _register() -> None:
    """Tell torch of the device, once per process: nothing takes it back."""
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend("other", backend_module=module)
    kernels, anything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    LIBRARIES.extend((kernels, anything))

    def empty_strided(size, stride, **options):
        return _run(aten.empty_strided.default, (size, stride), options)

    def copy_from(source, target, non_blocking=False):
        return _run(aten.copy_.default, (target, source), {})

    # `torch.tensor(values, device=...)` asks for these two past every mode.
    kernels.impl("empty_strided", empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", copy_from, "PrivateUse1")
    anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@contextmanager
def other_device() -> Iterator[str]:
    """Have the device "other" inside the block."""
    if not LIBRARIES:
        _register()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that `module.to` keeps tied weights tied
    device = _Device()
    try:
        with device, torch.autograd.set_multithreading_enabled(False):  # modes belong to a thread
            yield "other"
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
    if device.refused is not None:
        raise device.refused
