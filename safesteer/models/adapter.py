"""Low-rank adapters (peft): teacher and student in one copy of the weights.

The student is the base with an adapter on, the teacher the same weights with it off. Only matrices
inside the blocks get adapters, from `first_layer` up; embedding and head stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from safesteer._errors import SafeSteerError
from safesteer._files import whole_folder
from safesteer.models.chat_model import ChatModel
from safesteer.models.parts import blocks, hf_model, is_bridge

if TYPE_CHECKING:
    from peft import PeftModel


def with_adapter(chat: ChatModel, rank: int, alpha: int, first_layer: int = 0, seed: int = 0) -> ChatModel:
    """Put a fresh adapter on every linear map of the blocks from `first_layer` up.

    The modules of `chat.model` are wrapped in place: it answers as before inside `as_base` only, and
    for good after `without_adapter`.

    Raises:
        SafeSteerError: Where peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SafeSteerError("lora_rank needs the peft package: pip install 'safesteer[lora]'.") from error
    names = {module: name for name, module in chat.model.named_modules()}
    targets = [
        names[module]
        for block in blocks(chat.model)[first_layer:]
        for module in block.modules()
        if isinstance(module, nn.Linear | Conv1D)  # GPT-2 has linear maps of the second kind
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in names)
    torch.manual_seed(seed)  # the adapter's own start
    return replace(chat, model=get_peft_model(cast(PreTrainedModel, chat.model), config))


def shares_weights(base: ChatModel, student: ChatModel) -> bool:
    """Return whether the student is the base with an adapter."""
    return student.model is not base.model and hf_model(student.model) is base.model


@contextmanager
def as_base(base: ChatModel, student: ChatModel) -> Iterator[None]:
    """Let `base` be the base inside: an adapter that `student` has on the same weights is off."""
    with _adapted(student).disable_adapter() if shares_weights(base, student) else nullcontext():
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
    """Add the adapter to the weights of a plain model; uses the student up. Merge in float32."""
    return replace(student, model=_adapted(student).merge_and_unload())


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
            weight = cast(Tensor, module.get_base_layer().weight)
            delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            yield f"{name}.weight", (weight.float() + delta).detach()


def without_adapter(student: ChatModel) -> ChatModel:
    """Take the adapter out of the modules: the base again."""
    return replace(student, model=_adapted(student).unload())


def write_adapter(student: ChatModel, folder: Path) -> None:
    """Write the adapter alone, as peft loads it: PeftModel.from_pretrained(base, folder)."""
    with whole_folder(folder) as work:
        _adapted(student).save_pretrained(str(work))


def _adapted(student: ChatModel) -> "PeftModel":
    return cast("PeftModel", student.model)
