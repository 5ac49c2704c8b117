"""What keeps a student whole beside the loss on S: texts of its base, and a margin where answers begin.

1. `base_texts` lets the base write before training starts: every second text answers a harmless prompt, the
   others go on with a prompt as plain text. No other data is needed.
2. `hold_texts` adds, at each step, the divergence from the base over the whole vocabulary along a few of
   them. The loss on S sees the first tokens of answers; long answers and plain text are where students of it
   are damaged.
3. `margin_loss` is the logistic loss of the teacher's greedy decision, S or not, at each position, by the gap
   between the best logit of S and the best other. A divergence sees probabilities, not which of them is the
   largest; and a refusal is decided more than once ("I", "'m", "sorry").
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from safesteer._clock import BACKWARD, STUDENT, timed
from safesteer._errors import SafeSteerError
from safesteer.distillation.loss import divergence_loss
from safesteer.distillation.rollouts import Teacher, prompt_indices
from safesteer.models.adapter import as_base
from safesteer.models.batch import PromptBatch, cut_at_eos
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.head import Head, output_head
from safesteer.models.logits import logits_of, positions_per_chunk
from safesteer.models.sharding import equal_passes
from safesteer.models.templates import ids_of, render, special_start
from safesteer.models.traits import traits_of
from safesteer.prompts.conversation import PromptLike
from safesteer.settings import DistillConfig

N_TEXTS = 64  # at most, from which the steps draw
BATCH = 16  # of them at once


@dataclass(frozen=True)
class BaseText:
    """Ids that the base has read, and those that it wrote after them."""

    head: tuple[int, ...]
    written: tuple[int, ...]


def base_texts(base: ChatModel, prompts: Sequence[PromptLike], config: DistillConfig) -> list[BaseText]:
    """Let the base write the texts on which the student will be held to it; none where no step uses any.

    Args:
        base: The frozen base.
        prompts: Harmless prompts that train.
        config: Number of texts per step, their length, and the seed.

    Returns:
        Texts sampled at temperature 1, which depend on base, prompts and seed alone.

    Raises:
        SafeSteerError: Where there is no harmless prompt to begin with.
    """
    if not config.texts_per_step:
        return []
    if not prompts:
        raise SafeSteerError("distill.texts_per_step needs harmless prompts, and none of them trains.")
    tokenizer, n = base.tokenizer, min(N_TEXTS, config.texts_per_step * config.n_steps)
    drawn = [prompts[i] for i in prompt_indices(len(prompts), n, 0, config.seed + 2)]
    heads = [
        [*special_start(tokenizer), *base.encode(str(text))]
        if i % 2
        else ids_of(tokenizer, render(tokenizer, text))
        for i, text in enumerate(drawn)
    ]
    texts, size = [], BATCH if traits_of(base.model).pads else 1
    for start in range(0, n, size):
        part = heads[start : start + size]
        keys = [("base text", config.seed, start + i) for i in range(len(part))]
        random = torch.cat([uniforms(key, 1, config.text_tokens) for key in keys])
        batch = PromptBatch.from_ids(part, [[] for _ in part], device=base.device, share=False)
        new = generate_ids(
            base, batch, max_new_tokens=config.text_tokens, temperature=1.0, uniform=random
        ).tolist()
        texts += [
            BaseText(tuple(head), tuple(cut_at_eos(ids, base.eos_ids, keep_eos=True)))
            for head, ids in zip(part, new, strict=True)
        ]
    return texts


def hold_texts(
    student: ChatModel, teacher: Teacher, texts: Sequence[BaseText], config: DistillConfig, step: int
) -> float:
    """Add the gradient of a step's texts: the divergence from the base, over the whole vocabulary.

    Args:
        student: The model that trains.
        teacher: Its base is read without steering.
        texts: Those of `base_texts`, of which the step takes its own.
        config: Weight and number of the texts, and the divergence.
        step: Steps that are finished.

    Returns:
        The value that was added to the loss, of this process's share of the texts.
    """
    if not texts:
        return 0.0
    processes = PartialState()
    drawn = [texts[i] for i in prompt_indices(len(texts), config.texts_per_step, step, config.seed + 3)]
    share = drawn[processes.process_index :: processes.num_processes]
    on_full, total = replace(config, support="full"), sum(len(text.written) for text in drawn)
    ids, value = teacher.tokens.ids.to(student.device), 0.0
    # A model that cannot read padding reads one text at a time.
    parts = [share] if traits_of(student.model).pads and share else [[text] for text in share]
    with equal_passes(teacher.base.model), torch.no_grad(), as_base(teacher.base, student), timed("teacher"):
        states = [_writing_states(teacher.base, part, config) for part in parts]
    with equal_passes(student.model, backward=True):
        for part, h_base in zip(parts, states, strict=True):
            with timed(STUDENT):
                hidden = _writing_states(student, part, config)
            weights = torch.full((len(hidden),), config.text_weight / total, device=student.device)
            heads = output_head(student.model), output_head(teacher.base.model)
            loss = divergence_loss(hidden, h_base, weights, *heads, ids, on_full).loss
            with timed(BACKWARD):
                loss.backward()
            value += float(loss.detach())
    return value


def _writing_states(
    chat: ChatModel, texts: Sequence[BaseText], config: DistillConfig
) -> Float[Tensor, "n d_model"]:
    """Return the final hidden states that predict what the base wrote, text by text."""
    heads, tails = [text.head for text in texts], [text.written for text in texts]
    batch = PromptBatch.from_ids(heads, tails, device=chat.device, share=False)
    with torch.autocast(chat.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return final_hidden(chat.model, batch)[:, :-1][batch.completion_mask[:, 1:]]


def margin_loss(
    hidden: Float[Tensor, "n d_model"],
    h_teacher: Float[Tensor, "n d_model"],
    weights: Float[Tensor, " n"],
    head: Head,
    teacher_head: Head,
    ids: Int[Tensor, " n_set"],
) -> Float[Tensor, ""]:
    """Sum weight x softplus(-y gap) over positions, in nats: gap = best logit of S - best other logit.

    y is 1 where the teacher's likeliest token is one of S, else -1.

    Args:
        hidden: The student's final hidden states, [n, d_model].
        h_teacher: The teacher's at the same positions, [n, d_model].
        weights: Weight of each position, [n].
        head: The student's output head.
        teacher_head: The teacher's.
        ids: The safety tokens S.

    Example:
        >>> import torch
        >>> from safesteer.distillation.holding import margin_loss
        >>> from safesteer.models.head import Head
        >>> head, one = Head(torch.eye(3), None, None, 1.0), torch.ones(1)
        >>> states, teachers = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
        >>> round(float(margin_loss(states, teachers, one, head, head, torch.tensor([0]))), 3)
        2.127
    """
    in_s, other = _best_tokens(hidden, head, ids)
    their_s, their_other = _best_tokens(h_teacher, teacher_head, ids)
    with torch.no_grad():
        opens = _logit(h_teacher, their_s, teacher_head) > _logit(h_teacher, their_other, teacher_head)
    y = torch.where(opens, 1.0, -1.0)
    gap = _logit(hidden, in_s, head) - _logit(hidden, other, head)
    return (weights * softplus(-y * gap)).sum()


@torch.no_grad()
def _best_tokens(
    hidden: Float[Tensor, "n d_model"], head: Head, ids: Int[Tensor, " n_set"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the likeliest token of S and the likeliest other one at each position."""
    best = []
    for part in hidden.split(positions_per_chunk(head.weight)):
        z = logits_of(part, *head)
        inside = ids[z[:, ids].argmax(-1)]
        best.append(torch.stack([inside, z.index_fill_(1, ids, -torch.inf).argmax(-1)]))
    in_s, other = torch.cat(best, 1)
    return in_s, other


def _logit(hidden: Float[Tensor, "n d_model"], ids: Int[Tensor, " n"], head: Head) -> Float[Tensor, " n"]:
    """Return the logit of one token per position, in float32 or wider: a gradient of two rows of the head."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = (hidden.to(wide) * head.weight[ids].to(wide)).sum(-1)
    z = head.scale * (z if head.bias is None else z + head.bias[ids])
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
