"""A step's on-policy data: the student's answers, and the teacher's reading of them (Eq. 5).

1. `draw` says which prompts a step uses, from (seed, step) alone.
2. `answer` lets the student answer them by pure sampling; the mask ends with the answer.
3. `teacher_hidden` reads the same tokens once: steered on harmful prompts, the base on harmless
   ones. What it returns is a few numbers a position, never a (position x vocabulary) tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safesteer.directions.refusal_tokens import REFUSING_SYSTEM
from safesteer.models.adapter import as_base
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.sharding import equal_passes
from safesteer.steering.direction import Direction, steer


def prompt_indices(n_items: int, n: int, step: int, seed: int) -> list[int]:
    """Which items step `step` uses: consecutive pieces of an endless sequence of shuffles."""
    chosen: list[int] = []
    for i in range(step * n, (step + 1) * n):
        epoch, at = divmod(i, n_items)
        shuffle = torch.randperm(n_items, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        chosen.append(int(shuffle[at]))
    return chosen


@dataclass(frozen=True)
class Sampled:
    """An answer's token ids (with the end-of-answer id) and what their sampler says of each, in nats."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]


# (prompts as ids, samples a prompt, max_new_tokens, a key a prompt for the seed) -> samples of each prompt
Sampler = Callable[[Sequence[Sequence[int]], int, int, Sequence[tuple]], list[list[Sampled]]]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """A step's on-policy data: the student's answers and which of their tokens count.

    Rows are ordered by the length of their prompt, so that neighbours need little padding.
    """

    batch: PromptBatch
    mask: Bool[Tensor, "rows new_pos"]
    harmful: Bool[Tensor, " rows"]
    texts: tuple[str, ...]
    sampler_logps: Float[Tensor, "rows new_pos"] | None = None  # NaN where sampled here

    @property
    def n_rollouts(self) -> int:
        return len(self.mask) // len(self.texts)


def sample_rollouts(
    student: ChatModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    n_rollouts: int,
    max_new_tokens: int,
    teacher: tuple[ChatModel, Direction] | None = None,
    *,
    key: tuple[int, ...] = (0, 0),
    part: tuple[int, int] = (0, 1),
    sampler: Sampler | None = None,
) -> Rollouts:
    """On-policy rollouts: all prompts of the step in one call, M answers each.

    An answer depends on `key` (seed and step) and its prompt's place in the step. `part` (i, n) takes
    every n-th prompt from the i-th on: the share of process i. `sampler` samples in the student's place.

    With `teacher` (base and direction) every second prompt is answered by the steered base instead.
    A student that seldom starts to refuse seldom visits what follows "I'm": there it would learn
    neither to go on refusing a harmful request nor to turn back on a harmless one.
    """
    all_texts = [*harmful, *harmless]
    mine = range(part[0], len(all_texts), part[1])
    (order,) = batches(student.tokenizer, [all_texts[i] for i in mine], len(mine))
    places = [mine[i] for i in order]
    texts, place = [all_texts[i] for i in places], torch.tensor(places, device=student.device)
    by_teacher = (place % 2 == 0) & (teacher is not None)
    batch, eos = PromptBatch.of(student.tokenizer, texts, device=student.device), student.eos_ids
    shape = (len(texts), n_rollouts, max_new_tokens)
    ids = torch.full(shape, eos[0] if eos else 0, device=student.device)
    logps = torch.full(shape, torch.nan, dtype=torch.float64)
    for steered in (False, True) if teacher else (False,):
        author = teacher[0] if steered and teacher else student
        rows = (by_teacher == steered).nonzero()[:, 0].tolist()
        keys = [(*key, places[i]) for i in rows]
        if sampler is not None and not steered:
            prompts = [batch.prompt_ids[i][batch.attention_mask[i].bool()].tolist() for i in rows]
            drawn = sampler(prompts, n_rollouts, max_new_tokens, keys) if rows else []
            for i, samples in zip(rows, drawn, strict=True):
                for n, sampled in enumerate(samples):
                    ids[i, n, : len(sampled.ids)] = torch.tensor(sampled.ids, device=ids.device)
                    logps[i, n, : len(sampled.logps)] = torch.tensor(sampled.logps, dtype=logps.dtype)
            continue
        with (
            _as_teacher(teacher, student) if steered and teacher else nullcontext(),
            equal_passes(author.model),
        ):
            if not rows:  # entered all the same: another process may have some
                continue
            new = generate_ids(
                author,
                batch.rows(torch.tensor(rows)),
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                n_samples=n_rollouts,
                uniform=torch.cat([uniforms(k, n_rollouts, max_new_tokens) for k in keys]),
            )
        ids[rows, :, : new.shape[1]] = new.view(-1, n_rollouts, new.shape[1])
    ids = ids.flatten(0, 1)
    ended = torch.isin(ids, torch.tensor(eos, device=student.device))
    mask = ended.cumsum(1) - ended.long() == 0  # the end-of-answer token itself counts
    width = int(mask.any(0).sum())
    return Rollouts(
        batch.extended(ids[:, :width]),
        mask[:, :width],
        (place < len(harmful)).repeat_interleave(n_rollouts),
        tuple(texts),
        None if sampler is None else logps.flatten(0, 1)[:, :width],
    )


@contextmanager
def _as_teacher(teacher: tuple[ChatModel, Direction], student: ChatModel) -> Iterator[None]:
    with as_base(teacher[0], student), steer(*teacher):
        yield


def predicting_states(
    hidden: Float[Tensor, "rows rest d_model"], mask: Bool[Tensor, "rows new_pos"]
) -> Tensor:
    """Hidden states that predict the counting answer tokens, rows first."""
    return hidden[:, -mask.shape[1] - 1 : -1][mask]


@torch.no_grad()
def teacher_hidden(
    base: ChatModel,
    direction: Direction,
    answers: Rollouts,
    teacher: str = "steered",
    micro_batch: int = 8,
) -> Float[Tensor, "n d_model"]:
    """Step 2: the teacher's final hidden states at every counting position."""
    n_new = answers.mask.shape[1]
    dtype = next(base.model.parameters()).dtype
    out = torch.zeros((*answers.mask.shape, base.d_model), dtype=dtype, device=base.device)
    with equal_passes(base.model):
        for is_harmful in answers.harmful.unique().tolist():
            for at in torch.nonzero(answers.harmful == is_harmful)[:, 0].split(micro_batch):
                if is_harmful and teacher == "prompt":
                    batch = _with_system(base, answers, at)
                else:
                    batch = answers.batch.rows(at)
                steered = is_harmful and teacher == "steered"
                with steer(base, direction) if steered else nullcontext():
                    out[at] = final_hidden(base.model, batch)[:, -n_new - 1 : -1]
    return out[answers.mask]


def _with_system(base: ChatModel, answers: Rollouts, at: Tensor) -> PromptBatch:
    """The same answers after the same prompts under a refusing system prompt (Table 3)."""
    texts = [answers.texts[int(i) // answers.n_rollouts] for i in at]
    tails = answers.batch.prompt_ids[at, -answers.mask.shape[1] :].tolist()
    return PromptBatch.of(base.tokenizer, texts, tails, system=REFUSING_SYSTEM, device=base.device)
