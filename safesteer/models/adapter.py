"""Low-rank adapters (peft): teacher and student in one copy of the weights.

The student is the base with an adapter on, the teacher the same weights with it off. Only matrices
inside the blocks get adapters, from `first_layer` up; embedding and head stay as they are.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safesteer._errors import SafeSteerError
from safesteer._files import whole_folder
from safesteer.models.chat_model import ChatModel
from safesteer.models.parts import blocks, hf_model, is_bridge, modes_put_back
from safesteer.models.passes import bare
from safesteer.models.placement import weights_in

MOST = 0.9  # of the weights of its blocks: an adapter that reaches less says so

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def with_adapter(chat: ChatModel, rank: int, alpha: int, first_layer: int = 0, seed: int = 0) -> ChatModel:
    """Put a fresh adapter on every linear map of the blocks from `first_layer` up.

    The modules of `chat.model` are wrapped in place: it answers as before inside `as_base` only, and
    for good after `without_adapter`. A mixture of experts keeps those as plain parameters, which get none: a
    warning says how much of the blocks the adapter reaches.

    Raises:
        SafeSteerError: Where peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SafeSteerError("lora_rank needs the peft package: pip install 'safesteer[lora]'.") from error
    names = {module: name for name, module in chat.model.named_modules()}
    targets = [
        module
        for block in blocks(chat.model)[first_layer:]
        for module in block.modules()
        if isinstance(module, nn.Linear | Conv1D)  # GPT-2 has linear maps of the second kind
    ]
    reached = sum(cast(Tensor, module.weight).numel() for module in targets)
    there = sum(p.numel() for block in blocks(chat.model)[first_layer:] for p in block.parameters())
    if reached < MOST * there:
        warnings.warn(
            f"The adapter reaches {reached / there:.0%} of the weights of its blocks: the others, such as"
            " those of experts, are no linear maps of torch and stay as they are.",
            stacklevel=2,
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM")
    config.target_modules = [names[module] for module in targets]
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in names)
    devices = [chat.device] if chat.device.type == "cuda" else []
    with _placed(targets), torch.random.fork_rng(devices):
        torch.manual_seed(seed)  # the adapter's own start
        return replace(chat, model=get_peft_model(cast(PreTrainedModel, chat.model), config))


@contextmanager
def _placed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let offloaded weights seem to be on their device: peft puts an adapter where its weight is."""
    offloaded = [(cast(Any, m), cast(nn.Parameter, m.weight)) for m in modules if m.weight.is_meta]
    for module, weight in offloaded:
        nothing = torch.empty((), dtype=weight.dtype, device=module._hf_hook.execution_device)
        module.weight = nn.Parameter(nothing.expand(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in offloaded:
            module.weight = weight


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Let every parameter and module be as it was after the block: what trains, and the mode."""
    needs = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with modes_put_back(model):
            yield
    finally:
        for p, needed in needs:
            p.requires_grad = needed


def shares_weights(base: ChatModel, student: ChatModel) -> bool:
    """Return whether the student is the base with an adapter."""
    return student.model is not base.model and hf_model(student.model) is base.model


@contextmanager
def without_student(base: ChatModel, student: ChatModel | None) -> Iterator[None]:
    """Take the student's adapter off the base inside the block, where it is one; steering stays on."""
    if student is None or not shares_weights(base, student):
        yield
        return
    with _adapted(student).disable_adapter():
        yield


@contextmanager
def as_base(base: ChatModel, student: ChatModel) -> Iterator[None]:
    """Let `base` be the base inside: an adapter or steering of `student` on the same weights is off."""
    same = student is not base and student.model is base.model
    with without_student(base, student), bare() if same else nullcontext():
        yield


def has_adapter(chat: ChatModel) -> bool:
    """Return whether the model carries an adapter."""
    return not is_bridge(chat.model) and hf_model(chat.model) is not chat.model


@contextmanager
def adapter_off(student: ChatModel) -> Iterator[None]:
    """Take the adapter of a model off inside the block."""
    with _adapted(student).disable_adapter():
        yield


def merged(student: ChatModel) -> ChatModel:
    """Add the adapter to the weights of a plain model, summed in float32; uses the student up.

    To weights that are offloaded it is added whenever they are loaded, and nothing more is held.
    """
    return replace(student, model=_unwrapped(student, _add_to_base))


def trained_weights(student: ChatModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that training changes, by the plain model's names; an adapter is merged in.

    No weight is changed by this: merged ones are new, in float32, and made when they are asked for.
    """
    model = hf_model(student.model)
    if student.model is model:
        yield from ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
        return
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            with weights_in(module.get_base_layer()) as weights:
                yield f"{name}.weight", (weights["weight"].float() + delta).detach()


def without_adapter(student: ChatModel) -> ChatModel:
    """Take the adapter out of the modules: the base again."""
    return replace(student, model=_unwrapped(student, lambda layer: None))


def _unwrapped(student: ChatModel, leave: "Callable[[LoraLayer], None]") -> nn.Module:
    """Call `leave` on each layer that holds an adapter, and put the module that it wraps in its place.

    peft's own `unload` writes a copy of weights that lie on the disk beside their files.
    """
    from peft.tuners.lora import LoraLayer

    model = hf_model(student.model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoraLayer):
                leave(child)
                setattr(parent, name, child.get_base_layer())
    del cast(Any, model).peft_config
    return model


def _add_to_base(layer: "LoraLayer") -> None:
    """Add an adapter to the weight that it belongs to."""
    (name,) = layer.lora_A.keys()
    inner: Any = layer.get_base_layer()

    def added(weight: Tensor) -> Tensor:
        change = cast(Any, layer).get_delta_weight(name).to(weight.device)
        return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + change).to(weight.dtype)

    if inner.weight.is_meta:
        inner._hf_hook.weights_map = _Changed(inner._hf_hook.weights_map, added)
    else:
        inner.weight.data = added(inner.weight.data)


class _Changed(Mapping[str, Tensor]):
    """The offloaded tensors of a module, as accelerate reads them; "weight" is changed when it is loaded."""

    def __init__(self, tensors: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors, self.change = tensors, change

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return self.change(tensor) if name == "weight" else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def write_adapter(student: ChatModel, folder: Path) -> None:
    """Write the adapter alone, as peft loads it: PeftModel.from_pretrained(base, folder)."""
    with whole_folder(folder) as work:
        _adapted(student).save_pretrained(str(work))


def _adapted(student: ChatModel) -> "PeftModel":
    return cast("PeftModel", student.model)
