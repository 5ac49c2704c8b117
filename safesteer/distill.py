"""Localized on-policy distillation (paper section 3.4, Eq. 5 and 6), as a generator of records.

A step:
1. draw harmful prompts, and harmless ones for the anchor; the student answers them (T = 1),
   and with rollouts="mixed" the steered teacher every second one in its place;
2. the teacher reads the same tokens once: steered on harmful prompts, the base on harmless ones;
3. the student is pulled to the teacher on the safety tokens S only, averaged over the counting
   positions of an answer and then over answers; one AdamW step.

The paper has no anchor and uses divergence "reverse", normalizer "partial", rollouts "student" and
decay 1. A model that does not refuse has p ~ 0 on S, where that loss has no gradient; the defaults
here work on both kinds.
Everything random depends on (seed, step) alone, so a resumed run repeats an uninterrupted one.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from safesteer.directions import Direction
from safesteer.divergence import Divergence, Normalizer, logps_on
from safesteer.errors import SafeSteerError
from safesteer.files import read_tensors, write_tensors
from safesteer.lora import as_base, shares_weights, with_adapter
from safesteer.models import ChatModel, blocks, final_hidden, hf_model, output_head
from safesteer.objective import Support, loss_part, off_set, topk_ids
from safesteer.onpolicy import answer, counting, draw, teacher_hidden
from safesteer.tokens import TokenSet


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
    anchor_weight: float = 2.0  # of a harmless answer, in harmful ones
    late_anchor_weight: float = 6.0  # the same in the last third of the steps
    rollouts: Literal["student", "mixed"] = "mixed"  # "mixed": half are the steered teacher's
    decay: float = 0.8  # weight of an answer's next position to the one before; 1: all alike, as published
    lora_rank: int = 0  # above 0: an adapter of this rank, and one copy of the weights
    lora_alpha: int = 32
    precision: Literal["float32", "bfloat16"] = "float32"  # of the forward passes; weights stay
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
        words = {
            "divergence": ("reverse", "forward", "symmetric", "jsd"),
            "normalizer": ("partial", "generalized", "tail", "renormalized"),
            "support": ("safety", "topk", "full"),
            "teacher": ("steered", "prompt"),
            "train": ("all", "above"),
            "rollouts": ("student", "mixed"),
            "precision": ("float32", "bfloat16"),
        }
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise SafeSteerError(f"distill.{name} must be one of {allowed}, not '{getattr(self, name)}'.")
        at_least = {"n_steps": 1, "harmful_per_step": 1, "harmless_per_step": 0, "n_rollouts": 1}
        at_least |= {"lora_rank": 0, "refresh_every": 0}
        at_least |= {"max_new_tokens": 1, "micro_batch": 1, "checkpoint_every": 1, "n_topk": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise SafeSteerError(f"distill.{name} must be at least {low}.")
        if not self.lr > 0:
            raise SafeSteerError("distill.lr must be positive.")
        if not 0 < self.decay <= 1:
            raise SafeSteerError("distill.decay must lie above 0 and at most at 1.")
        if not 0 < self.beta < 1:
            raise SafeSteerError("distill.beta must lie between 0 and 1.")


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Masses are probabilities on S over harmful answers, times seconds.

    `kl_off_s` is the generalized KL(student || teacher) outside S, in nats a position, which the
    loss does not see: how far the student is from its teacher everywhere else.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    mass_on_s_student: float
    mass_on_s_teacher: float
    mass_on_s_anchor: float
    kl_off_s: float
    n_tokens: int
    rollout_s: float
    teacher_s: float
    student_s: float


@dataclass(frozen=True, eq=False)
class Refreshed:
    """Direction and S as they were found again before step `step` + 1."""

    step: int
    direction: Direction
    tokens: TokenSet


Refresh = Callable[[ChatModel], tuple[Direction, TokenSet]]


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

    def save(self, path: Path, stamp: dict) -> None:
        """Weights that train, both Adam moments, the step and what was refreshed, as one file."""
        tensors, found = {}, None
        for name, p in self.trained.items():
            tensors[f"param.{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
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
                p.copy_(tensors[f"param.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {
                    k: tensors[f"{k}.{name}"].to("cpu" if k == "step" else p.device) for k in keys
                }
        self.step, found = meta["step"], meta["refreshed"]
        if found is not None:
            direction = Direction(vector=tensors["refreshed"], **found["direction"])
            self.refreshed = Refreshed(found["step"], direction, TokenSet.of(found["tokens"]))


def begin(student: ChatModel, direction: Direction, config: DistillConfig) -> DistillState:
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
        hf_model(student.model).get_decoder().norm.requires_grad_(True)  # type: ignore[union-attr]
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
    optimizer = torch.optim.AdamW(params, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    return DistillState(student, optimizer)


@contextmanager
def _recomputing(student: ChatModel, wanted: bool) -> Iterator[None]:
    """transformers recomputes in training mode only; answers are sampled outside of it."""
    student.model.train(wanted)
    try:
        yield
    finally:
        student.model.eval()


def learning_rate(step: int, config: DistillConfig) -> float:
    """Linear warm-up over the first share of the steps, then half a cosine to zero."""
    warm = max(1, round(config.warmup * config.n_steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    share = (step - warm) / max(1, config.n_steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


def distill(
    state: DistillState,
    base: ChatModel,
    direction: Direction,
    tokens: TokenSet,
    harmful: Sequence[str],
    harmless: Sequence[str],
    config: DistillConfig,
    *,
    refresh: Refresh | None = None,
) -> Iterator[StepRecord]:
    """Train `state.student` towards the teacher on S; yields a record after each optimizer step.

    `base` is the frozen original model, or with an adapter the model that carries it. Every
    `refresh_every` steps `refresh(student)` gives a new direction and S. Stop whenever you like:
    `state` is always between steps. Raises SafeSteerError naming step and prompts if a loss or
    gradient is not finite.
    """
    student, base_head = state.student, output_head(base.model)
    if config.lora_rank and not shares_weights(base, student):
        raise SafeSteerError("With lora_rank the base must be the model that `begin` put the adapter on.")
    if config.refresh_every and refresh is None:
        raise SafeSteerError("distill.refresh_every needs a function that finds direction and S again.")
    params = list(state.trained.values())
    how = config.support, config.divergence, config.normalizer, config.beta
    narrow = torch.autocast(student.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    while state.step < config.n_steps:
        step, clock = state.step, time.perf_counter()
        due = config.refresh_every and step and step % config.refresh_every == 0
        if refresh and due and (state.refreshed is None or state.refreshed.step != step):
            state.refreshed = Refreshed(step, *refresh(student))
        if state.refreshed is not None:
            direction, tokens = state.refreshed.direction, state.refreshed.tokens
        ids = tokens.ids.to(student.device)
        lr = learning_rate(step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        bad = [harmful[i] for i in draw(len(harmful), config.harmful_per_step, step, config.seed)]
        good = []
        if config.harmless_per_step:
            drawn = draw(len(harmless), config.harmless_per_step, step, config.seed + 1)
            good = [harmless[i] for i in drawn]
        torch.manual_seed(config.seed * 1_000_003 + step)
        teacher = (base, direction) if config.rollouts == "mixed" else None
        with narrow:
            answers = answer(student, bad, good, config.n_rollouts, config.max_new_tokens, teacher)
        rollout_s, clock = time.perf_counter() - clock, time.perf_counter()

        with as_base(base, student), narrow:
            h_teacher = teacher_hidden(base, direction, answers, config.teacher, config.micro_batch)
        on_s = logps_on(h_teacher, base_head[0], ids, bias=base_head[1], softcap=base_head[2])
        set_ids: Tensor = ids
        if config.support == "topk":
            set_ids = topk_ids(h_teacher, base_head, config.n_topk)
        teacher_s, clock = time.perf_counter() - clock, time.perf_counter()

        # Mean over an answer's positions, then over answers; the anchor counts by its weight.
        late = step >= 2 * config.n_steps / 3
        anchor = config.late_anchor_weight if late else config.anchor_weight
        weight = torch.where(answers.harmful, 1.0, anchor)
        early = config.decay ** torch.arange(answers.mask.shape[1], device=answers.mask.device)
        per_token = answers.mask * early
        per_token = per_token / per_token.sum(1, keepdim=True) * (weight / weight.sum())[:, None]
        row, _ = answers.mask.nonzero(as_tuple=True)
        w, is_harmful = per_token[answers.mask], answers.harmful[row]
        starts = answers.mask.sum(1).cumsum(0) - answers.mask.sum(1)
        loss, student_mass, h_student = 0.0, torch.zeros_like(w), torch.zeros_like(h_teacher)
        state.optimizer.zero_grad(set_to_none=True)
        for at in torch.arange(len(answers.mask)).split(config.micro_batch):
            first = int(starts[at[0]])
            span = slice(first, first + int(answers.mask[at].sum()))
            rows = answers.batch.rows(at)
            if config.checkpointing:  # recomputing has no use for a cache of the shared columns
                rows = replace(rows, n_shared=0)
            with narrow, _recomputing(student, config.checkpointing):
                states = final_hidden(student.model, rows)
            hidden = counting(states, answers.mask[at])
            here = set_ids[span] if set_ids.dim() == 2 else set_ids
            part, mass = loss_part(hidden, h_teacher[span], student.model, base_head, ids, here, *how)
            objective = (part * w[span]).sum()
            if not torch.isfinite(objective):
                worst = (~part.detach().isfinite()).int().argmax()  # the first, if only their sum overflows
                culprit = int(row[span][worst]) // answers.n_rollouts
                raise SafeSteerError(
                    f"The loss is not finite at step {step + 1}, on the prompt"
                    f" {answers.texts[culprit]!r}; the last checkpoint is kept."
                )
            objective.backward()
            loss, student_mass[span] = loss + float(objective.detach()), mass
            h_student[span] = hidden.detach().to(h_student)
        grad_norm = float(nn.utils.clip_grad_norm_(params, config.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise SafeSteerError(
                f"The gradient is not finite at step {step + 1}; the last checkpoint is kept."
            )
        # Before the weights move: a trained head must be the one that these states came from.
        off_s = off_set(h_student, h_teacher, student.model, base_head, ids)
        state.optimizer.step()
        state.step += 1
        yield StepRecord(
            step=state.step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            mass_on_s_student=float(student_mass[is_harmful].mean()),
            mass_on_s_teacher=float(on_s[is_harmful].exp().sum(-1).mean()),
            mass_on_s_anchor=float(student_mass[~is_harmful].mean()) if good else 0.0,
            kl_off_s=off_s,
            n_tokens=int(answers.mask.sum()),
            rollout_s=rollout_s,
            teacher_s=teacher_s,
            student_s=time.perf_counter() - clock,
        )
