"""The on-policy data of a step: sampled answers, and the teacher's reading of them (Eq. 5).

1. `prompt_indices` says which prompts a step uses, from (seed, step) alone.
2. `sample_rollouts` lets the student answer them by pure sampling; the mask ends with the answer. With
   rollouts="mixed" the steered teacher answers every second prompt: a student that seldom starts to refuse
   seldom visits what follows "I'm", and would learn neither to go on refusing a harmful request nor to
   answer a harmless one after all. The student may read a prompt in disguise (`disguises`).
3. `teacher_hidden` reads the same tokens once: steered on harmful prompts, which it reads plain; on harmless
   ones the base as it is, or with the direction ablated (a two-sided teacher). It returns final hidden
   states, never a (position x vocabulary) tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._clock import timed
from safesteer._errors import SafeSteerError, expect
from safesteer.distillation.disguises import disguise, disguises_any
from safesteer.models.adapter import as_base
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.parts import is_quantized
from safesteer.models.placement import is_offloaded
from safesteer.models.precision import in_precision, weight_dtype
from safesteer.models.sharding import equal_passes
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.settings import DistillConfig
from safesteer.steering.direction import Direction, steer
from safesteer.steering.interventions import ablate
from safesteer.tokens.token_set import TokenSet


@dataclass(frozen=True, eq=False)
class Teacher:
    """What the student learns from: the frozen base, the direction that steers it, and S."""

    base: ChatModel
    direction: Direction
    tokens: TokenSet

    def __post_init__(self) -> None:
        expect(Direction, self.direction)
        expect(TokenSet, self.tokens)
        if not len(self.tokens):
            raise SafeSteerError("S holds no token, so there is nothing to teach on: select some.")
        self.tokens.check(self.base)


def prompt_indices(n_items: int, n: int, step: int, seed: int) -> list[int]:
    """Return the items that step `step` uses: consecutive pieces of an endless sequence of shuffles."""
    chosen: list[int] = []
    for i in range(step * n, (step + 1) * n):
        epoch, at = divmod(i, n_items)
        shuffle = torch.randperm(n_items, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        chosen.append(int(shuffle[at]))
    return chosen


def trained_prompts(prompts: PromptSet, config: DistillConfig) -> PromptSet:
    """Take the splits that `config` names, but for the one that early stopping measures.

    Raises:
        SafeSteerError: Where nothing is left to train on, nothing of a kind that steps take, or early
            stopping has prompts of one kind alone to measure.
    """
    if not config.splits:
        raise SafeSteerError("distill.splits names no split to train on.")
    names = [name for name in config.splits if not (config.check_every and name == "val")]
    if not names:
        raise SafeSteerError(
            "Early stopping (distill.check_every) measures val, so nothing is left to train on: add a split"
            " to distill.splits."
        )
    if config.check_every:
        prompts.split("val").require_kinds()
    chosen = prompts.split(*names)
    require_kinds_of(chosen, config)
    return chosen


def require_kinds_of(prompts: PromptSet, config: DistillConfig) -> None:
    """Raise SafeSteerError where prompts of a kind that steps take are missing."""
    for label in LABELS:
        if getattr(config, f"{label}_per_step") and not prompts.texts(label):
            raise SafeSteerError(
                f"The prompts to train on ('{prompts.name}') hold no {label} ones: add some, or set"
                f" distill.{label}_per_step=0."
            )


@dataclass(frozen=True)
class StepPrompts:
    """The prompts of one step, the key of its random numbers, and this process's share of them.

    An answer depends on `key` (seed and step) and its prompt's place in the step alone. `part` (i, n) takes
    every n-th prompt from the i-th on: the share of process i of n.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    key: tuple[int, ...] = (0, 0)
    part: tuple[int, int] = (0, 1)

    @classmethod
    def of(
        cls,
        harmful: Sequence[str],
        harmless: Sequence[str],
        config: DistillConfig,
        step: int,
        part: tuple[int, int] = (0, 1),
    ) -> "StepPrompts":
        """Draw the prompts of a step."""
        at = prompt_indices(len(harmful), config.harmful_per_step, step, config.seed)
        anchor = []
        if config.harmless_per_step:
            anchor = prompt_indices(len(harmless), config.harmless_per_step, step, config.seed + 1)
        key = (config.seed, step)
        return cls(tuple(harmful[i] for i in at), tuple(harmless[i] for i in anchor), key, part)

    @property
    def texts(self) -> tuple[str, ...]:
        """All prompts of the step, harmful ones first."""
        return (*self.harmful, *self.harmless)


@dataclass(frozen=True)
class Sampled:
    """An answer's token ids (with the end-of-answer id) and their log-probabilities in nats."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]


# (prompts as ids, samples per prompt, max_new_tokens, one key per prompt for the seed) -> samples per prompt
Sampler = Callable[[Sequence[Sequence[int]], int, int, Sequence[tuple]], list[list[Sampled]]]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """A step's answers and which of their tokens count.

    Rows are ordered by the length of their prompt, so that neighbours need little padding. `texts` are the
    plain prompts; `batch` holds what the student reads in their place (`disguises`).
    """

    batch: PromptBatch
    mask: Bool[Tensor, "rows new_pos"]
    harmful: Bool[Tensor, " rows"]
    texts: tuple[str, ...]
    sampler_logps: Float[Tensor, "rows new_pos"] | None = None  # NaN where sampled here

    @property
    def n_rollouts(self) -> int:
        """Answers per prompt."""
        return len(self.mask) // len(self.texts)


def sample_rollouts(
    student: ChatModel,
    prompts: StepPrompts,
    config: DistillConfig,
    teacher: Teacher | None = None,
    sampler: Sampler | None = None,
) -> Rollouts:
    """Sample `config.n_rollouts` answers to each prompt of this process's share.

    Args:
        student: The model that answers.
        prompts: The step's prompts.
        config: Number and length of the answers.
        teacher: Answers every second prompt instead of the student; None: the student answers all.
        sampler: Samples in the student's place (`distillation.vllm`).

    Raises:
        SafeSteerError: If `sampler` ends an answer early, at a token that ends none.
    """
    texts = prompts.texts
    share = range(prompts.part[0], len(texts), prompts.part[1])
    (order,) = batches(student.tokenizer, [texts[i] for i in share], len(share))
    places = [share[i] for i in order]
    ordered = tuple(texts[i] for i in places)
    place = torch.tensor(places, device=student.device)
    by_teacher = (place % 2 == 0) & (teacher is not None)
    batch, eos = PromptBatch.of(student.tokenizer, ordered, device=student.device), student.eos_ids
    told = batch  # what the teacher reads: plain prompts, under its system prompt where it has one (Table 3)
    if teacher and config.teacher == "prompt":
        told = PromptBatch.of(student.tokenizer, ordered, system=config.system, device=student.device)
    if disguises_any(config):
        read = [disguise(student, texts[i], config, (*prompts.key, i)) for i in places]
        batch = PromptBatch.of(
            student.tokenizer, [d.prompt for d in read], [d.opening for d in read], device=student.device
        )
    shape = (len(places), config.n_rollouts, config.max_new_tokens)
    ids = torch.full(shape, eos[0] if eos else 0, device=student.device)
    logps = torch.full(shape, torch.nan, dtype=torch.float64)
    for steered in (False, True) if teacher else (False,):
        rows = (by_teacher == steered).nonzero()[:, 0].tolist()
        keys = [(*prompts.key, places[i]) for i in rows]
        if sampler is not None and not steered:
            _fill_from_sampler(ids, logps, batch, rows, keys, sampler, eos)
            continue
        author = teacher.base if steered and teacher else student
        with (
            _as_teacher(teacher, student, config) if steered and teacher else _rounded_once(student, config),
            equal_passes(author.model),
        ):
            if not rows:  # entered all the same: another process may have some
                continue
            new = generate_ids(
                author,
                (told if steered else batch).rows(torch.tensor(rows)),
                max_new_tokens=config.max_new_tokens,
                temperature=1.0,
                n_samples=config.n_rollouts,
                uniform=torch.cat([uniforms(k, config.n_rollouts, config.max_new_tokens) for k in keys]),
            )
        ids[rows, :, : new.shape[1]] = new.view(-1, config.n_rollouts, new.shape[1])
    ids = ids.flatten(0, 1)
    ended = torch.isin(ids, torch.tensor(eos, device=student.device))
    mask = ended.cumsum(1) - ended.long() == 0  # the end-of-answer token itself counts
    width = int(mask.any(0).sum())
    return Rollouts(
        batch.extended(ids[:, :width]),
        mask[:, :width],
        (place < len(prompts.harmful)).repeat_interleave(config.n_rollouts),
        ordered,
        None if sampler is None else logps.flatten(0, 1)[:, :width],
    )


def _fill_from_sampler(
    ids: Int[Tensor, "n n_samples new_pos"],
    logps: Float[Tensor, "n n_samples new_pos"],
    batch: PromptBatch,
    rows: list[int],
    keys: list[tuple],
    sampler: Sampler,
    eos: list[int],
) -> None:
    """Write an external sampler's answers, and their log-probabilities, into some rows."""
    prompts = [batch.prompt_ids[i][batch.attention_mask[i].bool()].tolist() for i in rows]
    answers = sampler(prompts, ids.shape[1], ids.shape[2], keys) if rows else []
    for i, samples in zip(rows, answers, strict=True):
        for n, sampled in enumerate(samples):
            # What pads an answer is an end token: it would count, and be learnt.
            if len(sampled.ids) < ids.shape[2] and (not sampled.ids or sampled.ids[-1] not in eos):
                raise SafeSteerError(
                    f"An external sampler ended an answer after {len(sampled.ids)} of {ids.shape[2]} tokens"
                    " without an end token of the model: give it room for prompt and answer (vLLM:"
                    " max_model_len), and no stop words."
                )
            ids[i, n, : len(sampled.ids)] = torch.tensor(sampled.ids, device=ids.device)
            logps[i, n, : len(sampled.logps)] = torch.tensor(sampled.logps, dtype=logps.dtype)


@contextmanager
def _rounded_once(student: ChatModel, config: DistillConfig) -> Iterator[None]:
    """Hold a student's weights in the precision of its passes while it answers.

    Autocast would round all of them again for every new token. Weights that are sharded, quantized or not on
    the device stay as they are.
    """
    model = student.model
    if config.precision != "bfloat16" or config.sharded or is_offloaded(model) or is_quantized(model):
        yield
        return
    mixed = weight_dtype(model) == torch.bfloat16  # a wide adapter on a narrow base needs autocast
    with (
        in_precision(model, torch.bfloat16),
        torch.autocast(student.device.type, torch.bfloat16, enabled=mixed),
    ):
        yield


@contextmanager
def _as_teacher(teacher: Teacher, student: ChatModel, config: DistillConfig) -> Iterator[None]:
    """Make the base the teacher of harmful answers inside, without an adapter that `student` has on it."""
    with as_base(teacher.base, student), _reading_as(teacher, True, config):
        yield


def predicting_states(
    hidden: Float[Tensor, "rows uncached d_model"], mask: Bool[Tensor, "rows new_pos"]
) -> Float[Tensor, "n d_model"]:
    """Select the hidden states that predict the counting answer tokens, rows first."""
    return hidden[:, -mask.shape[1] - 1 : -1][mask]


@timed("teacher")
@torch.no_grad()
def teacher_hidden(teacher: Teacher, rollouts: Rollouts, config: DistillConfig) -> Float[Tensor, "n d_model"]:
    """Let the teacher read the answers; return its final hidden states at every counting position."""
    base, n_new = teacher.base, rollouts.mask.shape[1]
    dtype, n_rows = next(base.model.parameters()).dtype, config.micro_batch
    out = torch.zeros((*rollouts.mask.shape, base.d_model), dtype=dtype, device=base.device)
    with equal_passes(base.model):
        for is_harmful in rollouts.harmful.unique().tolist():
            for at in torch.nonzero(rollouts.harmful == is_harmful)[:, 0].split(n_rows):
                if is_harmful and (config.teacher == "prompt" or disguises_any(config)):
                    system = config.system if config.teacher == "prompt" else None
                    batch = _plain_rows(base, rollouts, at, system)
                else:
                    batch = rollouts.batch.rows(at)
                with _reading_as(teacher, is_harmful, config):
                    out[at] = final_hidden(base.model, batch)[:, -n_new - 1 : -1]
    return out[rollouts.mask]


def _reading_as(teacher: Teacher, is_harmful: bool, config: DistillConfig) -> AbstractContextManager[None]:
    """Make the base the teacher of harmful or of harmless answers."""
    if is_harmful:
        return steer(teacher.base, teacher.direction) if config.teacher == "steered" else nullcontext()
    if config.harmless_teacher == "ablated":
        return ablate(teacher.base, teacher.direction.vector.to(teacher.base.device))
    return nullcontext()


def _plain_rows(base: ChatModel, rollouts: Rollouts, at: Tensor, system: str | None) -> PromptBatch:
    """Put the same answers after the plain prompts, under a system prompt where there is one (Table 3)."""
    texts = [rollouts.texts[int(i) // rollouts.n_rollouts] for i in at]
    answers = rollouts.batch.prompt_ids[at, -rollouts.mask.shape[1] :].tolist()
    return PromptBatch.of(base.tokenizer, texts, answers, system=system, device=base.device)
