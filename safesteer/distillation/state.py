"""The student: what trains, its optimizer, and a checkpoint that repeats an uninterrupted run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from safesteer._errors import SafeSteerError
from safesteer._files import read_tensors, write_tensors
from safesteer.models.adapter import with_adapter
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.parts import blocks, decoder, final_norm, hf_model, is_adapted, is_bridge, is_quantized
from safesteer.models.placement import require_trainable
from safesteer.models.precision import settled_precision
from safesteer.models.sharding import gather, shard, shard_like, split_sharded
from safesteer.settings import DistillConfig
from safesteer.steering.direction import Direction

FUSED = ("cpu", "cuda")  # where AdamW is one pass over memory: on CPUs in a third of the time


@dataclass
class DistillState:
    """The student with its optimizer, its settings and the number of finished steps.

    `config` names the precision of passes, also where the settings leave it to the machine.
    """

    student: ChatModel
    optimizer: torch.optim.Optimizer
    config: DistillConfig
    step: int = 0

    def __post_init__(self) -> None:
        precision = settled_precision(self.config.precision, self.student.device)
        self.config = replace(self.config, precision=precision)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {n: p for n, p in self.student.model.named_parameters() if p.requires_grad}

    def save(self, path: Path, stamp: dict[str, Any], *, writes: bool = True) -> None:
        """Save the weights that train and the step as one file, with both Adam moments while steps are left.

        The weights of a sharded student are gathered: all processes call this, and one `writes`.
        """
        tensors, goes_on = {}, self.step < self.config.n_steps
        for name, p in self.trained.items():
            moments = self.optimizer.state.get(p, {}) if goes_on else {}
            for key, value in {"param": p.detach(), **moments}.items():
                gathered = gather(value)
                if writes:  # never more than one gathered tensor on a device
                    tensors[f"{key}.{name}"] = gathered.cpu()
        if writes:
            write_tensors(path, tensors, {"stamp": stamp, "step": self.step})

    def load(self, path: Path, stamp: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            SafeSteerError: If the file is damaged, or is the checkpoint of a run with other settings.
        """
        try:
            tensors, metadata = read_tensors(path)
        except SafeSteerError as error:
            raise SafeSteerError(f"{error} Delete it to train again.") from error
        if metadata.get("stamp") != stamp:
            raise SafeSteerError(
                f"{path} is the checkpoint of a run with other settings (here passes have"
                f" {self.config.precision})."
            )
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(shard_like(tensors[f"param.{name}"], p))
                if f"step.{name}" not in tensors:  # it never got a gradient: an expert that no token reached
                    continue
                moments = {
                    k: shard_like(tensors[f"{k}.{name}"].to(p.device), p) for k in ("exp_avg", "exp_avg_sq")
                }
                step = tensors[f"step.{name}"].to(p.device if p.device.type in FUSED else "cpu")
                self.optimizer.state[p] = {"step": step, **moments}
        self.step = metadata["step"]


def require_adapter(model: nn.Module, config: DistillConfig) -> None:
    """Raise SafeSteerError where quantized weights would have to train, or be spread over processes.

    Also where an adapter would come beside another one: taking it off would take off both.
    """
    if config.lora_rank and is_adapted(model):
        raise SafeSteerError(
            "The base carries an adapter already, and distill.lora_rank would put another beside it: merge it"
            " into the weights first (merge_and_unload)."
        )
    if not is_quantized(model):
        return
    if not config.lora_rank:
        raise SafeSteerError(
            "Quantized weights cannot train, but they can carry an adapter: set distill.lora_rank (16, say)."
        )
    if config.sharded:
        raise SafeSteerError("distill.sharded cannot spread quantized weights: leave out one of the two.")


def prepare_student(
    student: ModelLike, direction: Direction, config: DistillConfig | None = None
) -> DistillState:
    """Choose what trains and make the optimizer.

    The embedding (and a head tied to it) stays frozen but with train_layers="all": then the loss never
    touches the vocabulary in its backward pass.

    Args:
        student: A plain Hugging Face model in float32 that may be changed; with `lora_rank` the base itself,
            whose weights then carry the adapter (`training_steps` reads it with the adapter off).
        direction: The teacher's direction; its layer is the first that trains.
        config: Settings of stage 3.

    Returns:
        The state before the first step.

    Raises:
        SafeSteerError: If weights that train are in half precision, where steps of AdamW round away, are
            quantized, or are offloaded; for a bridge, whose modules are not those of a Hugging Face model.
    """
    student, config = as_chat(student), config or DistillConfig()
    if is_bridge(student.model):
        raise SafeSteerError(
            "A TransformerBridge cannot train: pass its plain model, as_chat(bridge).copy()."
        )
    require_adapter(student.model, config)
    first = direction.layer if config.train_layers == "from_steered" else 0
    student.model.requires_grad_(False)
    if config.lora_rank:
        student = with_adapter(student, config.lora_rank, config.lora_alpha, first, config.seed)
    elif config.train_layers != "all":
        for block in blocks(student.model)[first:]:
            block.requires_grad_(True)
        final_norm(student.model).requires_grad_(True)
    else:  # what the loss reads: not the vision part of a wrapper
        decoder(student.model).requires_grad_(True)
        cast(nn.Module, hf_model(student.model).get_output_embeddings()).requires_grad_(True)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    require_trainable(trained)
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in trained):
        raise SafeSteerError(
            "The student is in half precision, where steps this small round to nothing: load it with"
            " dtype='float32', or train an adapter (lora_rank)."
        )
    student.model.eval()  # no dropout: the teacher has none, and a resumed run would draw another
    if config.sharded:
        shard(student.model)
        trained = [p for p in student.model.parameters() if p.requires_grad]
    groups = [{"params": group} for group in split_sharded(trained)]
    options = {"lr": config.lr, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(groups, fused=trained[0].device.type in FUSED, **options)
    return DistillState(student, optimizer, config)
