"""The student: what trains, its optimizer, and a checkpoint that repeats an uninterrupted run."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from safesteer._errors import SafeSteerError
from safesteer._files import read_tensors, write_tensors
from safesteer._settings import AT_LEAST_1, FINITE, POSITIVE, SHARE, check_settings
from safesteer.distillation.divergence import Divergence, Normalizer
from safesteer.distillation.loss import Support
from safesteer.models.adapter import with_adapter
from safesteer.models.chat_model import ChatModel, blocks, final_norm, hf_model
from safesteer.models.sharding import gather, shard, shard_like, split_sharded
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import TokenSet


@dataclass(frozen=True)
class DistillConfig:
    """One flag with a word for each choice of the paper and its ablations (Tables 3 to 5)."""

    divergence: Divergence = "symmetric"
    normalizer: Normalizer = "generalized"
    support: Support = "safety"
    teacher: Literal["steered", "prompt"] = "steered"
    train: Literal["all", "above"] = "above"  # "above": only blocks from the steered layer up
    n_steps: int = 50
    harmful_per_step: int = 10
    harmless_per_step: int = 18  # 0: no anchor, as published
    n_rollouts: int = 1
    max_new_tokens: int = 8
    anchor_support: Literal["same", "full"] = "same"  # "full": harmless answers over the whole vocabulary
    anchor_weight: float = 2.0  # of a harmless answer, in harmful ones
    late_anchor_weight: float = 6.0  # the same in the last third of the steps
    rollouts: Literal["student", "mixed"] = "mixed"  # "mixed": half are the steered teacher's
    decay: float = 0.8  # weight of an answer's next position to the one before; 1: all alike, as published
    lora_rank: int = 0  # above 0: an adapter of this rank, and one copy of the weights
    lora_alpha: int = 32
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward passes; weights stay
    sharded: bool = False  # spread the blocks over the processes of torchrun or accelerate launch
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    refresh_every: int = 0  # steps after which direction and S are found again; 0: never
    lr: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    n_topk: int = 50
    beta: float = 0.5
    micro_batch: int = 8  # answers a forward pass: fewer need less padding and memory; same loss
    checkpoint_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_steps", "harmful_per_step", "n_rollouts", "max_new_tokens", "micro_batch", "n_topk")
        bounds = {
            **dict.fromkeys((*sizes, "checkpoint_every", "lora_alpha"), AT_LEAST_1),
            **dict.fromkeys(("anchor_weight", "late_anchor_weight", "weight_decay"), (0.0, FINITE[1])),
            **dict.fromkeys(("lr", "max_grad_norm"), (POSITIVE[0], FINITE[1])),
            "warmup": SHARE,
            "decay": (POSITIVE[0], 1.0),
            "beta": (POSITIVE[0], 1.0 - math.ulp(1.0)),
        }
        check_settings(self, "distill", bounds)


@dataclass(frozen=True, eq=False)
class Refreshed:
    """Direction and S as they were found again before step `step` + 1."""

    step: int
    direction: Direction
    tokens: TokenSet


@dataclass
class DistillState:
    """The student with its optimizer and the number of finished steps: all that a resume needs."""

    student: ChatModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    refreshed: Refreshed | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.student.model.named_parameters() if p.requires_grad}

    def save(self, path: Path, stamp: dict, *, writes: bool = True) -> None:
        """Weights that train, both Adam moments, the step and what was refreshed, as one file.

        Of a sharded student the weights are put together: all processes call this, and one `writes`.
        """
        tensors, found = {}, None
        for name, p in self.trained.items():
            for key, value in {"param": p.detach(), **self.optimizer.state.get(p, {})}.items():
                gathered = gather(value)
                if writes:  # never more than one whole tensor on a device
                    tensors[f"{key}.{name}"] = gathered.cpu()
        if not writes:
            return
        if self.refreshed is not None:
            direction, tokens = self.refreshed.direction, self.refreshed.tokens
            tensors["refreshed"] = direction.vector.contiguous()
            found = {"step": self.refreshed.step, "direction": direction.metadata, "tokens": asdict(tokens)}
        write_tensors(path, tensors, {"stamp": stamp, "step": self.step, "refreshed": found})

    def load(self, path: Path, stamp: dict) -> None:
        """Continue from a saved state; raises SafeSteerError if it is of another run."""
        tensors, meta = read_tensors(path)
        if meta.get("stamp") != stamp:
            raise SafeSteerError(f"{path} is the checkpoint of a run with other settings.")
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(shard_like(tensors[f"param.{name}"], p))
                moments = {
                    k: shard_like(tensors[f"{k}.{name}"].to(p.device), p) for k in ("exp_avg", "exp_avg_sq")
                }
                self.optimizer.state[p] = {"step": tensors[f"step.{name}"], **moments}
        self.step, found = meta["step"], meta["refreshed"]
        if found is not None:
            direction = Direction(vector=tensors["refreshed"], **found["direction"])
            self.refreshed = Refreshed(found["step"], direction, TokenSet.of(found["tokens"]))


def prepare_student(student: ChatModel, direction: Direction, config: DistillConfig) -> DistillState:
    """Choose what trains and make the optimizer. `student` must be a plain Hugging Face model.

    The embedding (and a head tied to it) stays frozen with train="above" or an adapter: then the
    loss never touches the vocabulary in its backward pass. With `lora_rank` pass the base itself:
    its weights carry the adapter, and `distill` reads it with the adapter off. Training weights in
    half precision are refused, because AdamW steps of this size round away in them.
    """
    first = direction.layer if config.train == "above" else 0
    student.model.requires_grad_(config.train == "all" and not config.lora_rank)
    if config.lora_rank:
        student = with_adapter(student, config.lora_rank, config.lora_alpha, first, config.seed)
    elif config.train == "above":
        for block in blocks(student.model)[first:]:
            block.requires_grad_(True)
        final_norm(student.model).requires_grad_(True)
    params = [p for p in student.model.parameters() if p.requires_grad]
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
        raise SafeSteerError(
            "The student is in half precision, where steps this small round to nothing: load it with"
            " dtype='float32', or train an adapter (lora_rank)."
        )
    if config.checkpointing:
        inner = hf_model(student.model)
        enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if config.sharded:
        shard(student.model)
    kinds = [
        {"params": kind} for kind in split_sharded([p for p in student.model.parameters() if p.requires_grad])
    ]
    optimizer = torch.optim.AdamW(kinds, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    return DistillState(student, optimizer)
