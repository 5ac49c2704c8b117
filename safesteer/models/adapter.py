"""Low-rank adapters (peft): teacher and student in one copy of the weights.

The student is the base with an adapter on, the teacher the same weights with it off. Only matrices
inside the blocks get adapters, from `first_layer` up; embedding and head stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from safesteer._errors import SafeSteerError
from safesteer._files import whole_folder
from safesteer.models.chat_model import ChatModel, blocks, hf_model


def with_adapter(chat: ChatModel, rank: int, alpha: int, first_layer: int = 0, seed: int = 0) -> ChatModel:
    """`chat` with a fresh adapter on every linear map of its blocks from `first_layer` up.

    The modules of `chat.model` are wrapped in place: it answers as before inside `as_base` only, and
    for good after `without_adapter`. Raises SafeSteerError where peft is missing.
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
        if isinstance(module, nn.Linear)
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(seed)  # the adapter's own start
    return replace(chat, model=get_peft_model(chat.model, config))  # type: ignore[arg-type]


def shares_weights(base: ChatModel, student: ChatModel) -> bool:
    """True where the student is the base with an adapter."""
    return student.model is not base.model and hf_model(student.model) is base.model


@contextmanager
def as_base(base: ChatModel, student: ChatModel) -> Iterator[None]:
    """Inside, `base` is the base: an adapter that `student` has on the same weights is off."""
    off = student.model.disable_adapter() if shares_weights(base, student) else nullcontext()  # type: ignore[operator]
    with off:
        yield


def merged(student: ChatModel) -> ChatModel:
    """A plain model with the adapter added to the weights; uses the student up. Merge in float32."""
    return replace(student, model=student.model.merge_and_unload())  # type: ignore[operator]


def without_adapter(student: ChatModel) -> ChatModel:
    """The base again: the adapter is taken out of its modules."""
    return replace(student, model=student.model.unload())  # type: ignore[operator]


def write_adapter(student: ChatModel, folder: Path) -> None:
    """The adapter alone, as peft loads it: PeftModel.from_pretrained(base, folder)."""
    with whole_folder(folder) as work:
        student.model.save_pretrained(work)  # type: ignore[operator]
