"""Stage 3: localized on-policy distillation, as one call or step by step (paper section 3.4).

    student = distill(chat, direction, tokens)

`training_steps` is the same as a generator of records. Everything random depends on (seed, step) and an
answer's place in the step, so a resumed run repeats an uninterrupted one.

The paper has no anchor and uses divergence "reverse", normalizer "partial", rollouts "student" and decay 1.
A model that does not refuse has p ~ 0 on S, where that loss has no gradient; the defaults work on both.
"""

import html
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn

from safesteer._errors import SafeSteerError, expect
from safesteer.distillation.checkpoints import resume, save
from safesteer.distillation.early_stopping import look_at
from safesteer.distillation.holding import base_texts
from safesteer.distillation.rollouts import Sampler, StepPrompts, Teacher, require_kinds_of, trained_prompts
from safesteer.distillation.state import DistillState, prepare_student
from safesteer.distillation.step import StepRecord, take_step
from safesteer.distillation.tracking import open_tracker
from safesteer.distillation.watching import start_watch, watched_share
from safesteer.judges.judge import Judge
from safesteer.judges.wording import refuses
from safesteer.models.adapter import (
    as_base,
    merged,
    put_back,
    shares_weights,
    without_adapter,
    write_adapter,
)
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.parts import hf_model, is_bridge, is_quantized
from safesteer.models.placement import require_together
from safesteer.models.sharding import shard
from safesteer.progress import Progress, no_progress
from safesteer.prompts.conversation import PromptLike
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.settings import DistillConfig
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import TokenSet


def training_steps(
    state: DistillState,
    teacher: Teacher,
    prompts: PromptSet,
    *,
    sampler: Sampler | None = None,
) -> Iterator[StepRecord]:
    """Train `state.student` towards the teacher on S; yield a record after each optimizer step.

    Stop whenever you like: `state` is always between steps.

    Args:
        state: The student, from `prepare_student`.
        teacher: The frozen base (with an adapter, the model that carries it), its direction and S.
        prompts: Harmful prompts to learn on; harmless ones on which the student is held to the base.
        sampler: Samples the student's answers in its place (`distillation.vllm`).

    Yields:
        Loss, masses on S, drift and seconds of each step.

    Raises:
        SafeSteerError: If a loss or gradient is not finite (names the step, and the prompt or parameter), or
            prompts of a kind that steps take are missing.

    Example:
        >>> from safesteer.distillation.loop import training_steps
        >>> from safesteer.distillation.rollouts import Teacher
        >>> from safesteer.distillation.state import prepare_student
        >>> config = ss.DistillConfig(n_steps=2, harmful_per_step=2, harmless_per_step=2, max_new_tokens=3)
        >>> state = prepare_student(chat.copy(), direction, config)
        >>> prompts = ss.load_prompts().split("distill")
        >>> [record.step for record in training_steps(state, Teacher(chat, direction, tokens), prompts)]
        [1, 2]
    """
    config, student = state.config, state.student
    require_kinds_of(prompts, config)
    if config.lora_rank and not shares_weights(teacher.base, student):
        raise SafeSteerError(
            "With lora_rank the base must be the model that `prepare_student` put the adapter on."
        )
    if not config.lora_rank and hf_model(teacher.base.model) is hf_model(student.model):
        raise SafeSteerError(
            "The student is the base itself, so the teacher would move with it: prepare a copy,"
            " prepare_student(chat.copy(), ...)."
        )
    processes = PartialState(cpu=student.device.type == "cpu")
    n_prompts = config.harmful_per_step + config.harmless_per_step
    if processes.num_processes > n_prompts:
        raise SafeSteerError(
            f"{processes.num_processes} processes cannot share the {n_prompts} prompts of a step."
        )
    part = processes.process_index, processes.num_processes
    with as_base(teacher.base, student):
        texts = base_texts(teacher.base, prompts.harmless, config) if state.step < config.n_steps else []
    while state.step < config.n_steps:
        drawn = StepPrompts.of(prompts.harmful, prompts.harmless, config, state.step, part)
        yield take_step(state, teacher, drawn, sampler, texts)


@dataclass(frozen=True, eq=False, repr=False)
class Student(ChatModel):
    """A trained model, to be used as any ChatModel, with the history of its training."""

    history: tuple[StepRecord, ...] = field(default=(), kw_only=True)

    def to_frame(self) -> pd.DataFrame:
        """Return the history: one row per step."""
        return pd.DataFrame([asdict(record) for record in self.history])

    def __repr__(self) -> str:
        if not self.history:
            return f"Student({self.name!r}, not trained)"
        first, last = self.history[0], self.history[-1]
        before = f"{first.mass_on_s_student:.3f} of the teacher's {first.mass_on_s_teacher:.3f}"
        after = f"{last.mass_on_s_student:.3f} of {last.mass_on_s_teacher:.3f}"
        return f"Student({self.name!r}, {last.step} steps: mass on S {before} -> {after})"

    def _repr_html_(self) -> str:
        columns = ["step", "loss", "mass_on_s_student", "mass_on_s_teacher", "mass_on_s_anchor", "kl_off_s"]
        table = self.to_frame().reindex(columns=columns)
        rows = table.to_html(index=False, float_format="{:.4f}".format, max_rows=12)
        return f"<p>{html.escape(repr(self))}</p>{rows}"


@dataclass(frozen=True, eq=False)
class Training:
    """How a training is followed: checkpoint and history, a tracker, early stopping, progress, a sampler.

    With a folder, training continues from its checkpoint, and writes one every `checkpoint_every` steps.
    """

    folder: str | Path | None = None
    track: str | None = None  # tensorboard, wandb, ...: files go to `folder`/tracking
    judge: Judge = refuses  # of the answers that early stopping looks at
    progress: Progress = no_progress
    # Makes what samples in the student's place, from the student: partial(vllm.engine_sampler, llm).
    sampler: Callable[[ChatModel], Sampler] | None = None


def distill(
    chat: ModelLike,
    direction: Direction,
    tokens: TokenSet,
    prompts: PromptSet | None = None,
    config: DistillConfig | None = None,
    *,
    training: Training | None = None,
) -> Student:
    """Teach a copy of `chat` to answer as the steered teacher does, on the safety tokens alone.

    Args:
        chat: The base: a ChatModel, a TransformerBridge, or (model, tokenizer). It stays as it is.
        direction: The direction that steers it into the teacher.
        tokens: The safety tokens S.
        prompts: Prompts with the splits that `config.splits` names; None: the project's own.
        config: Settings of stage 3; None: the defaults.
        training: Folder, tracker, judge of early stopping, and progress; None: nothing is written.

    Returns:
        The student: a plain Hugging Face model in float32, frozen, with its history. An adapter is merged
        into the weights.

    Raises:
        SafeSteerError: If a loss or gradient is not finite, a checkpoint belongs to other settings, the base
            is quantized or spread by a device map, or `config.sharded` asks for several processes (use
            `align` for all of them).

    Example:
        >>> config = ss.DistillConfig(n_steps=1, harmful_per_step=2, harmless_per_step=2, max_new_tokens=3)
        >>> len(ss.distill(chat, direction, tokens, config=config).history)
        1
    """
    chat, config, prompts = as_chat(chat), config or DistillConfig(), prompts or load_prompts()
    expect(DistillConfig, config)
    expect(PromptSet, prompts)
    if config.sharded:
        raise SafeSteerError(
            "distill.sharded needs `align`: `distill` returns one model that is not sharded."
        )
    if is_quantized(chat.model):
        raise SafeSteerError(
            "A quantized base needs `align`, which merges the adapter into weights that it loads anew;"
            " `train_student` leaves it on the base."
        )
    require_together(chat.model)  # it is copied, with an adapter once training has ended
    if config.lora_rank and is_bridge(chat.model):
        chat = chat.copy()  # the adapter wraps modules of a plain model
    teacher = Teacher(chat, direction, tokens)
    student = None if config.lora_rank else _float32_copy(chat)
    with put_back(chat.model):
        state, history = train_student(teacher, prompts, config, student, training)
        model = _merged_copy(teacher, state) if config.lora_rank else state.student.model
    return Student(model.requires_grad_(False), chat.tokenizer, chat.name, history=history)


def train_student(
    teacher: Teacher,
    prompts: PromptSet,
    config: DistillConfig,
    student: ChatModel | None,
    training: Training | None = None,
) -> tuple[DistillState, tuple[StepRecord, ...]]:
    """Train `student`, or where it is None an adapter on the base; return state and history.

    An adapter is still on the base when this returns (`models.adapter.without_adapter` takes it off).
    """
    state = prepare_student(teacher.base if student is None else student, teacher.direction, config)
    if config.sharded and student is not None:
        shard(teacher.base.model)
    try:
        return state, tuple(follow_steps(state, teacher, prompts, training))
    except BaseException:
        if config.lora_rank:
            without_adapter(state.student)  # the base is the caller's
        raise


def follow_steps(
    state: DistillState, teacher: Teacher, prompts: PromptSet, training: Training | None = None
) -> Iterator[StepRecord]:
    """Train as `training_steps` does, and write, log, watch and check as `training` says.

    Stop whenever you like, as there.

    Args:
        state: The student, from `prepare_student`.
        teacher: What the student learns from.
        prompts: Prompts with the splits that `state.config.splits` names, and with "val" where that is
            watched or checked.
        training: Folder, tracker, judge, progress and sampler; None: nothing is written.

    Yields:
        The records of the whole history: those of a checkpoint in the folder, then each new one.
    """
    training, config = training or Training(), state.config
    expect(Training, training)
    folder = None if training.folder is None else Path(training.folder)
    history, stamp = resume(state, teacher, prompts, folder)
    yield from tuple(history)
    sampler = None if training.sampler is None else training.sampler(state.student)
    steps = training_steps(state, teacher, trained_prompts(prompts, config), sampler=sampler)
    settings = {"model": teacher.base.name, **asdict(config)}
    with open_tracker(training.track, (folder or Path()) / "tracking", settings) as log:

        def may_stop() -> bool:
            if not config.check_every or not state.step or state.step % config.check_every:
                return False
            look = look_at(state.student, teacher.base, prompts.split("val"), training.judge)
            log({"val_refused": look.refused, "val_kl": look.kl}, state.step)
            return look.suffices(config)

        training.progress(state.step / config.n_steps)
        stopped = may_stop()  # a training that ended early, called again
        watch = None
        if config.watch_every and not stopped and state.step < config.n_steps:
            watch = start_watch(teacher.base, state.student, _watched(prompts, config), training.judge)
        for record in () if stopped else steps:
            if watch is not None and (record.step % config.watch_every == 0 or record.step == config.n_steps):
                share = watched_share(watch, teacher.base, state.student, training.judge, config)
                record = replace(record, val_refused=share)
            history.append(record)
            training.progress(record.step / config.n_steps)
            log({k: v for k, v in asdict(record).items() if v is not None}, record.step)
            stopped = may_stop()
            last = stopped or record.step == config.n_steps
            if folder is not None and (last or record.step % config.checkpoint_every == 0):
                save(folder, state, stamp, history)
            yield record
            if stopped:
                break


def _watched(prompts: PromptSet, config: DistillConfig) -> list[PromptLike]:
    """Take the harmful val prompts that are looked at while training; a set may have none."""
    val = PromptSet(tuple(p for p in prompts.prompts if p.split == "val"))
    return list(val.across(config.n_watched).harmful)


def restore_student(
    student: ChatModel, teacher: Teacher, prompts: PromptSet, config: DistillConfig, folder: Path
) -> Student:
    """Give `student`, a float32 copy of the base, the weights of the checkpoint in `folder`.

    An adapter is merged; with `keep_adapter` it is written to `folder`/adapter too.
    """
    state = prepare_student(student, teacher.direction, replace(config, sharded=False))
    history, _ = resume(state, teacher, prompts, folder)
    trained = state.student
    if config.lora_rank:
        if config.keep_adapter:
            write_adapter(trained, folder / "adapter")
        trained = merged(trained)
    model = trained.model.requires_grad_(False)
    return Student(model, student.tokenizer, student.name, history=tuple(history))


def _float32_copy(chat: ChatModel) -> ChatModel:
    """Copy the plain model in float32: weights that may train."""
    plain = chat.copy()
    return ChatModel(plain.model.float(), plain.tokenizer, plain.name)


def _merged_copy(teacher: Teacher, state: DistillState) -> nn.Module:
    """Take the adapter off the base, and merge it into a float32 copy."""
    weights = {name: p.detach().clone() for name, p in state.trained.items()}
    without_adapter(state.student)
    fresh = prepare_student(_float32_copy(teacher.base), teacher.direction, state.config)
    with torch.no_grad():
        for name, p in fresh.trained.items():
            p.copy_(weights[name])
    return merged(fresh.student).model
