"""One optimizer step of localized distillation (paper section 3.4, Eq. 5 and 6).

1. The student answers the step's prompts (T = 1), and with rollouts="mixed" the steered teacher every
   second one in its place.
2. The teacher reads the same tokens once: steered on harmful prompts, the base on harmless ones.
3. The student is pulled to the teacher on the safety tokens S only, averaged over the counting positions
   of an answer and then over answers; one AdamW step.

Several processes (torchrun, accelerate launch) share the answers of a step, and each adds its part of the
gradient: together they take the step that one process takes.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from safesteer._clock import BACKWARD, STUDENT, timed
from safesteer._errors import SafeSteerError
from safesteer.distillation.holding import BaseText, hold_texts, margin_loss
from safesteer.distillation.loss import LossTerms, divergence_loss, kl_outside_set
from safesteer.distillation.rollouts import (
    Rollouts,
    Sampler,
    StepPrompts,
    Teacher,
    predicting_states,
    sample_rollouts,
    teacher_hidden,
)
from safesteer.distillation.state import DistillState
from safesteer.models.adapter import as_base
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import earned, final_hidden
from safesteer.models.head import Head, output_head
from safesteer.models.logits import logps_on
from safesteer.models.parts import blocks
from safesteer.models.passes import without_cudnn_attention
from safesteer.models.placement import is_offloaded
from safesteer.models.sharding import equal_passes, gather, split_sharded, total_norm
from safesteer.settings import DistillConfig


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Masses are probabilities on S over harmful answers, times seconds.

    `kl_off_s` is the generalized KL(student || teacher) outside S, in nats per position, which the loss
    does not see: how far the student is from its teacher everywhere else. `sampler_gap` is the mean
    |log-probability of an external sampler - the student's| on its tokens, in nats (this process).
    `val_refused` is the share of the watched harmful prompts that the student refuses after this step, None
    where nobody looked.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    mass_on_s_student: float
    mass_on_s_teacher: float
    mass_on_s_anchor: float
    kl_off_s: float
    sampler_gap: float
    n_tokens: int
    rollout_s: float
    teacher_s: float
    student_s: float
    val_refused: float | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """A step's answers, the teacher's states on them, and the weights, whose sum over processes is one."""

    rollouts: Rollouts
    h_teacher: Float[Tensor, "n d_model"]
    weights: Float[Tensor, " n"]


def take_step(
    state: DistillState,
    teacher: Teacher,
    prompts: StepPrompts,
    sampler: Sampler | None = None,
    texts: Sequence[BaseText] = (),
) -> StepRecord:
    """Take one optimizer step on `prompts`, and on some of the base's own texts (`holding`).

    Raises:
        SafeSteerError: If a loss or gradient is not finite; names the step, and the prompt or parameter.
    """
    config, student, step = state.config, state.student, state.step
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    clock = time.perf_counter()
    reading, rollout_s = read_answers(state, teacher, prompts, sampler)
    rollouts, teacher_s = reading.rollouts, time.perf_counter() - clock - rollout_s

    clock = time.perf_counter()
    state.optimizer.zero_grad(set_to_none=True)
    terms, h_student = accumulate_gradient(state, teacher, reading)
    with _recomputed(student, _recomputes(state)):
        of_texts = hold_texts(student, teacher, texts, config, step)
    with timed("optimizer"):
        grad_norm = _clip_gradients(state)
    # Before the weights move: a trained head must be the one that these states came from.
    head, ids = output_head(student.model), teacher.tokens.ids.to(student.device)
    gap = _sampler_gap(rollouts, h_student, head)
    off_s = kl_outside_set(h_student, reading.h_teacher, head, output_head(teacher.base.model), ids)
    with timed("optimizer"):
        state.optimizer.step()
    state.step += 1

    harmful = rollouts.harmful[rollouts.mask.nonzero()[:, 0]]
    sums = [terms.loss + of_texts, off_s, len(harmful), harmful.sum(), terms.student_mass[harmful].sum()]
    sums += [terms.teacher_mass[harmful].sum(), terms.student_mass[~harmful].sum()]
    loss, off_s, n, n_harmful, mass, mass_teacher, mass_anchor = _over_processes(
        [float(x) for x in sums], student.device
    )
    return StepRecord(
        step=state.step,
        loss=loss,
        grad_norm=grad_norm,
        lr=learning_rate(step, config),
        mass_on_s_student=mass / n_harmful,
        mass_on_s_teacher=mass_teacher / n_harmful,
        mass_on_s_anchor=mass_anchor / (n - n_harmful) if prompts.harmless else 0.0,
        kl_off_s=off_s / PartialState().num_processes,
        sampler_gap=gap,
        n_tokens=int(n),
        rollout_s=rollout_s,
        teacher_s=teacher_s,
        student_s=time.perf_counter() - clock,
    )


def read_answers(
    state: DistillState, teacher: Teacher, prompts: StepPrompts, sampler: Sampler | None = None
) -> tuple[Reading, float]:
    """Let the step's prompts be answered, and the teacher read the answers (Eq. 5).

    Args:
        state: The student and its settings; it stays as it is.
        teacher: What the student learns from.
        prompts: The step's prompts.
        sampler: Samples in the student's place.

    Returns:
        The answers as the teacher reads them, and the seconds that answering took.
    """
    config, student, clock = state.config, state.student, time.perf_counter()
    with _autocast(student, config):
        author = teacher if config.rollouts == "mixed" else None
        rollouts = sample_rollouts(student, prompts, config, author, sampler)
    rollout_s = time.perf_counter() - clock
    with as_base(teacher.base, student), _autocast(student, config):
        h_teacher = teacher_hidden(teacher, rollouts, config)
    return Reading(rollouts, h_teacher, _weights(rollouts, config, state.step)[rollouts.mask]), rollout_s


def learning_rate(step: int, config: DistillConfig) -> float:
    """Return the rate of step `step`: that of transformers' `get_cosine_schedule_with_warmup`.

    It rises in a line from zero, which is the rate of the first step, over as many steps as transformers'
    trainer takes for that share, and falls by half a cosine. At least one step has the whole rate.
    """
    warm = min(math.ceil(config.warmup * config.n_steps), config.n_steps - 1)
    if step < warm:
        return config.lr * step / warm
    share = (step - warm) / (config.n_steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


def _recomputes(state: DistillState) -> bool:
    """Say whether blocks run again in the backward pass: else it would hold all offloaded weights at once."""
    return state.config.checkpointing or is_offloaded(state.student.model)


@contextmanager
def _recomputed(student: ChatModel, enabled: bool) -> Iterator[None]:
    """Keep no activations inside blocks: the backward pass computes them again.

    The model stays in evaluation mode. Training mode, in which alone transformers recomputes, has dropout.
    """
    selected = list(blocks(student.model)) if enabled else []
    before = [vars(block).get("forward") for block in selected]  # of a block that a device map has placed
    try:
        for block in selected:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        with without_cudnn_attention():  # in the second pass too
            yield
    finally:
        for block, forward in zip(selected, before, strict=True):
            vars(block).pop("forward", None)  # the class's own is back
            if forward is not None:
                block.forward = forward


def _autocast(student: ChatModel, config: DistillConfig) -> torch.autocast:
    """Run forward passes in the precision of the recipe."""
    return torch.autocast(student.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _weights(rollouts: Rollouts, config: DistillConfig, step: int) -> Float[Tensor, "rows new_pos"]:
    """Weigh positions: mean over an answer, then over the answers of the step, anchors by their weight."""
    anchor = config.late_anchor_weight if step >= 2 * config.n_steps / 3 else config.anchor_weight
    total = config.n_rollouts * (config.harmful_per_step + anchor * config.harmless_per_step)
    early = config.decay ** torch.arange(rollouts.mask.shape[1], device=rollouts.mask.device)
    by_position = rollouts.mask * early
    by_answer = torch.where(rollouts.harmful, 1.0, anchor) / total
    return by_position / by_position.sum(1, keepdim=True) * by_answer[:, None]


def accumulate_gradient(
    state: DistillState, teacher: Teacher, reading: Reading
) -> tuple[LossTerms, Float[Tensor, "n d_model"]]:
    """Add the gradient of the step's loss to that of the weights that train, by micro-batches.

    Args:
        state: The student and its settings.
        teacher: What the student learns from, and S.
        reading: The step's answers (`read_answers`).

    Returns:
        The terms of the loss, and the student's final hidden states at the counting positions.

    Raises:
        SafeSteerError: If the loss is not finite; names the step and the prompt.
    """
    student = state.student
    with _recomputed(student, _recomputes(state)), equal_passes(student.model, backward=True):
        return _backward(state, teacher, reading)


def _backward(
    state: DistillState, teacher: Teacher, reading: Reading
) -> tuple[LossTerms, Float[Tensor, "n d_model"]]:
    config, student, rollouts = state.config, state.student, reading.rollouts
    head, row = output_head(student.model), rollouts.mask.nonzero()[:, 0]
    base_head, ids = output_head(teacher.base.model), teacher.tokens.ids.to(student.device)
    starts = rollouts.mask.sum(1).cumsum(0) - rollouts.mask.sum(1)
    h_student = reading.h_teacher.new_zeros(reading.h_teacher.shape, dtype=head[0].dtype)
    # Neither recomputed nor sharded blocks have a use for a cache of the shared columns.
    without_cache = _recomputes(state) or config.sharded
    loss, terms = 0.0, torch.zeros((3, len(row)), dtype=torch.float32, device=row.device)
    for at in torch.arange(len(rollouts.mask)).split(config.micro_batch):
        first = int(starts[at[0]])
        span = slice(first, first + int(rollouts.mask[at].sum()))
        rows = rollouts.batch.rows(at)
        if without_cache:
            rows = replace(earned(student.model, rows), n_shared=0)
        with timed(STUDENT), _autocast(student, config):
            states = final_hidden(student.model, rows)
        hidden = predicting_states(states, rollouts.mask[at])
        h_student[span] = hidden.detach().to(h_student)
        whole = ~rollouts.harmful[row[span]] & (config.anchor_support == "full")
        losses = []
        for settings, selected in ((config, ~whole), (replace(config, support="full"), whole)):
            n = selected.nonzero()[:, 0]
            if len(n):
                part = divergence_loss(
                    hidden[n],
                    reading.h_teacher[span][n],
                    reading.weights[span][n],
                    head,
                    base_head,
                    ids,
                    settings,
                )
                losses.append(part.loss)
                terms[:, first + n] = torch.stack(part[1:]).to(terms)
        if config.margin_weight:
            parts = hidden, reading.h_teacher[span], reading.weights[span], head, base_head, ids
            losses.append(config.margin_weight * margin_loss(*parts))
        objective = torch.stack(losses).sum()
        if not torch.isfinite(objective):
            worst = (~terms[0, span].isfinite()).int().argmax()  # the first, if only their sum overflows
            prompt = rollouts.texts[int(row[span][worst]) // rollouts.n_rollouts]
            raise SafeSteerError(
                f"The loss is not finite at step {state.step + 1}, on the prompt {prompt!r}; the last"
                " checkpoint is kept."
            )
        with timed(BACKWARD):
            objective.backward()
        loss += float(objective.detach())
    return LossTerms(torch.tensor(loss), *terms), h_student


def _clip_gradients(state: DistillState) -> float:
    """Sum the gradients over all processes, clip them, and return their norm before clipping."""
    params, n_processes = list(state.trained.values()), PartialState().num_processes
    grads = _reduce_gradients(params, n_processes)
    norm = total_norm(grads)
    if not math.isfinite(float(norm)):
        named = ((name, p.grad) for name, p in state.trained.items() if p.grad is not None)
        where = next((name for name, grad in named if not gather(grad).isfinite().all()), "their sum")
        raise SafeSteerError(
            f"The gradient is not finite at step {state.step + 1}, in {where}; the last checkpoint is kept."
        )
    for group in split_sharded(params):
        nn.utils.clip_grads_with_norm_(group, state.config.max_grad_norm, norm)
    return float(norm)


def _reduce_gradients(params: list[nn.Parameter], n_processes: int) -> list[Tensor]:
    """Sum gradients over all processes. Those of sharded weights come as a mean."""
    for p in params:
        if n_processes > 1 and p.grad is not None:
            p.grad = p.grad * n_processes if isinstance(p, DTensor) else _summed(p.grad)
    return [p.grad for p in params if p.grad is not None]


def _summed(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes."""
    total = reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


@torch.no_grad()
def _sampler_gap(rollouts: Rollouts, hidden: Float[Tensor, "n d_model"], head: Head) -> float:
    """Measure how far an external sampler's log-probabilities are from the student's; 0 without one."""
    if rollouts.sampler_logps is None:
        return 0.0
    theirs = rollouts.sampler_logps[rollouts.mask.cpu()]
    known = ~theirs.isnan()
    if not bool(known.any()):
        return 0.0
    width, at = rollouts.mask.shape[1], known.to(hidden.device)
    ids = rollouts.batch.prompt_ids[:, -width:][rollouts.mask][at]
    ours = logps_on(hidden[at], head.weight, ids[:, None], **head.options)[:, 0]
    return float((ours.double().cpu() - theirs[known]).abs().mean())


def _over_processes(sums: list[float], device: torch.device) -> list[float]:
    """Sum each number over all processes."""
    if PartialState().num_processes == 1:
        return sums
    return _summed(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
