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
Everything random depends on (seed, step) and the answer's place in the step, so a resumed run
repeats an uninterrupted one, and several processes (torchrun, accelerate launch) that share a step's
answers between them take the step that one process takes: each adds its part of the gradient.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safesteer._errors import SafeSteerError
from safesteer.distillation.loss import Head, LossTerms, Support, divergence_loss, kl_outside_set
from safesteer.distillation.rollouts import (
    Rollouts,
    Sampler,
    predicting_states,
    prompt_indices,
    sample_rollouts,
    teacher_hidden,
)
from safesteer.distillation.state import DistillConfig, DistillState, Refreshed
from safesteer.models.adapter import as_base, shares_weights
from safesteer.models.chat_model import ChatModel, output_head
from safesteer.models.forward import final_hidden
from safesteer.models.logits import logps_on
from safesteer.models.sharding import equal_passes, gather, split_sharded, total_norm
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import TokenSet


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Masses are probabilities on S over harmful answers, times seconds.

    `kl_off_s` is the generalized KL(student || teacher) outside S, in nats a position, which the
    loss does not see: how far the student is from its teacher everywhere else. `sampler_gap` is the
    mean |log-probability of an external sampler - the student's| on its tokens, in nats (this process).
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


Refresh = Callable[[ChatModel], tuple[Direction, TokenSet]]


@contextmanager
def _gradient_checkpointing(student: ChatModel, wanted: bool) -> Iterator[None]:
    """transformers recomputes in training mode only; answers are sampled outside of it."""
    student.model.train(wanted)
    try:
        yield
    finally:
        student.model.eval()


def _autocast(student: ChatModel, config: DistillConfig) -> torch.autocast:
    """Forward passes in the precision of the recipe."""
    return torch.autocast(student.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


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
    sampler: Sampler | None = None,
) -> Iterator[StepRecord]:
    """Train `state.student` towards the teacher on S; yields a record after each optimizer step.

    `base` is the frozen original model, or with an adapter the model that carries it. Every
    `refresh_every` steps `refresh(student)` gives a new direction and S. `sampler` gives the student's
    answers in its place (`server.server_sampler`). Stop whenever you like:
    `state` is always between steps. Raises SafeSteerError naming step and prompts if a loss or
    gradient is not finite.
    """
    student, base_head = state.student, output_head(base.model)
    if config.lora_rank and not shares_weights(base, student):
        raise SafeSteerError("With lora_rank the base must be the model that `begin` put the adapter on.")
    if config.refresh_every and refresh is None:
        raise SafeSteerError("distill.refresh_every needs a function that finds direction and S again.")
    processes = PartialState(cpu=student.device.type == "cpu")
    params = list(state.trained.values())
    n_prompts, n_processes = config.harmful_per_step + config.harmless_per_step, processes.num_processes
    if n_processes > n_prompts:
        raise SafeSteerError(f"{n_processes} processes cannot share the {n_prompts} prompts of a step.")
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
        bad = [harmful[i] for i in prompt_indices(len(harmful), config.harmful_per_step, step, config.seed)]
        good = []
        if config.harmless_per_step:
            drawn = prompt_indices(len(harmless), config.harmless_per_step, step, config.seed + 1)
            good = [harmless[i] for i in drawn]
        teacher = (base, direction) if config.rollouts == "mixed" else None
        with _autocast(student, config):
            answers = sample_rollouts(
                student,
                bad,
                good,
                config.n_rollouts,
                config.max_new_tokens,
                teacher,
                key=(config.seed, step),
                part=(processes.process_index, n_processes),
                sampler=sampler,
            )
        rollout_s, clock = time.perf_counter() - clock, time.perf_counter()

        with as_base(base, student), _autocast(student, config):
            h_teacher = teacher_hidden(base, direction, answers, config.teacher, config.micro_batch)
        teacher_s, clock = time.perf_counter() - clock, time.perf_counter()

        w = _weights(answers, config, step)[answers.mask]
        state.optimizer.zero_grad(set_to_none=True)
        with (
            _gradient_checkpointing(student, config.checkpointing),
            equal_passes(student.model, backward=True),
        ):
            found, h_student = _backward(student, base_head, answers, h_teacher, w, ids, config, step)
        grads = _reduce_gradients(params, n_processes)
        norm = total_norm(grads)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            named = ((name, p.grad) for name, p in state.trained.items() if p.grad is not None)
            where = next((name for name, grad in named if not gather(grad).isfinite().all()), "their sum")
            raise SafeSteerError(
                f"The gradient is not finite at step {step + 1}, in {where}; the last checkpoint is kept."
            )
        for kind in split_sharded(params):
            nn.utils.clip_grads_with_norm_(kind, config.max_grad_norm, norm)
        # Before the weights move: a trained head must be the one that these states came from.
        head = output_head(student.model)
        gap = _sampler_gap(answers, h_student, head)
        off_s = kl_outside_set(h_student, h_teacher, head, base_head, ids)
        state.optimizer.step()
        state.step += 1
        bad_ones = answers.harmful[answers.mask.nonzero()[:, 0]]
        sums = [found.loss, off_s, len(w), bad_ones.sum(), found.student_mass[bad_ones].sum()]
        sums += [found.teacher_mass[bad_ones].sum(), found.student_mass[~bad_ones].sum()]
        loss, off_s, n, n_harmful, mass, mass_teacher, mass_anchor = _over_processes(
            [float(x) for x in sums], student.device
        )
        yield StepRecord(
            step=state.step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            mass_on_s_student=mass / n_harmful,
            mass_on_s_teacher=mass_teacher / n_harmful,
            mass_on_s_anchor=mass_anchor / (n - n_harmful) if good else 0.0,
            kl_off_s=off_s / n_processes,
            sampler_gap=gap,
            n_tokens=int(n),
            rollout_s=rollout_s,
            teacher_s=teacher_s,
            student_s=time.perf_counter() - clock,
        )


def _backward(
    student: ChatModel,
    base_head: Head,
    answers: Rollouts,
    h_teacher: Float[Tensor, "n d_model"],
    w: Float[Tensor, " n"],
    ids: Int[Tensor, " n_set"],
    config: DistillConfig,
    step: int,
) -> tuple[LossTerms, Float[Tensor, "n d_model"]]:
    """The gradient of a step's loss, by micro-batches. Returns the comparison and the student's states."""
    head, row = output_head(student.model), answers.mask.nonzero()[:, 0]
    how = {name: getattr(config, name) for name in ("divergence", "normalizer", "beta", "n_topk")}
    starts = answers.mask.sum(1).cumsum(0) - answers.mask.sum(1)
    loss, h_student = 0.0, h_teacher.new_zeros(h_teacher.shape, dtype=head[0].dtype)
    found = torch.zeros((3, len(w)), dtype=torch.float32, device=w.device)
    for at in torch.arange(len(answers.mask)).split(config.micro_batch):
        first = int(starts[at[0]])
        span = slice(first, first + int(answers.mask[at].sum()))
        rows = answers.batch.rows(at)
        if config.checkpointing or config.sharded:  # neither has a use for a cache of the shared columns
            rows = replace(rows, n_shared=0)
        with _autocast(student, config):
            states = final_hidden(student.model, rows)
        hidden = predicting_states(states, answers.mask[at])
        h_student[span] = hidden.detach().to(h_student)
        entire = ~answers.harmful[row[span]] & (config.anchor_support == "full")
        kinds: list[tuple[Support, Tensor]] = [(config.support, ~entire), ("full", entire)]
        losses = []
        for support, these in kinds:
            n = these.nonzero()[:, 0]
            if len(n):
                three = hidden[n], h_teacher[span][n], w[span][n]
                part = divergence_loss(*three, head, base_head, ids, support=support, **how)
                losses.append(part.loss)
                found[:, first + n] = torch.stack(part[1:]).to(found)
        objective = torch.stack(losses).sum()
        if not torch.isfinite(objective):
            worst = (~found[0, span].isfinite()).int().argmax()  # the first, if only their sum overflows
            culprit = answers.texts[int(row[span][worst]) // answers.n_rollouts]
            raise SafeSteerError(
                f"The loss is not finite at step {step + 1}, on the prompt {culprit!r}; the last checkpoint"
                " is kept."
            )
        objective.backward()
        loss += float(objective.detach())
    return LossTerms(torch.tensor(loss), *found), h_student


def _reduce_gradients(params: list[nn.Parameter], n_processes: int) -> list[Tensor]:
    """Gradients summed over all processes. Those of sharded weights come as a mean."""
    for p in params:
        if n_processes > 1 and p.grad is not None:
            p.grad = p.grad * n_processes if isinstance(p, DTensor) else reduce(p.grad, "sum")  # type: ignore[assignment]
    return [p.grad for p in params if p.grad is not None]


def _weights(answers: Rollouts, config: DistillConfig, step: int) -> Float[Tensor, "rows new_pos"]:
    """Mean over an answer's positions, then over all answers of the step; the anchor counts by its weight."""
    anchor = config.late_anchor_weight if step >= 2 * config.n_steps / 3 else config.anchor_weight
    total = config.n_rollouts * (config.harmful_per_step + anchor * config.harmless_per_step)
    early = config.decay ** torch.arange(answers.mask.shape[1], device=answers.mask.device)
    of_position = answers.mask * early
    of_answer = torch.where(answers.harmful, 1.0, anchor) / total
    return of_position / of_position.sum(1, keepdim=True) * of_answer[:, None]


@torch.no_grad()
def _sampler_gap(answers: Rollouts, hidden: Float[Tensor, "n d_model"], head: tuple) -> float:
    """How far an external sampler's log-probabilities are from the student's; 0 without one."""
    if answers.sampler_logps is None:
        return 0.0
    theirs = answers.sampler_logps[answers.mask.cpu()]
    known = ~theirs.isnan()
    if not bool(known.any()):
        return 0.0
    width, at = answers.mask.shape[1], known.to(hidden.device)
    ids = answers.batch.prompt_ids[:, -width:][answers.mask][at]
    ours = logps_on(hidden[at], head[0], ids[:, None], bias=head[1], softcap=head[2])[:, 0]
    return float((ours.double().cpu() - theirs[known]).abs().mean())


def _over_processes(sums: list[float], device: torch.device) -> list[float]:
    """Each number summed over all processes."""
    if PartialState().num_processes == 1:
        return sums
    wide = torch.float32 if device.type == "mps" else torch.float64
    return reduce(torch.tensor(sums, dtype=wide, device=device), "sum").tolist()  # type: ignore[union-attr]
