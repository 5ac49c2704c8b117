"""Prompts in disguise: what the student reads, and what its teacher reads in the same place."""

from dataclasses import replace

import pytest
import torch

from conftest import assert_near, copy_of, set_of
from safesteer.distillation.disguises import disguise
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import StepPrompts, Teacher, sample_rollouts, teacher_hidden
from safesteer.distillation.state import prepare_student
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.prompts.conversation import messages_of
from safesteer.prompts.wrappers import load_openings, load_wrappers
from safesteer.settings import DistillConfig
from safesteer.steering.direction import steer
from safesteer.steering.interventions import ablate

WIDTH = 3
ALL = DistillConfig(
    wrapped_share=1.0,
    opened_share=1.0,
    max_opening=4,
    n_rollouts=2,
    max_new_tokens=WIDTH,
    micro_batch=5,
    harmless_teacher="ablated",
)


@pytest.fixture(scope="module")
def teacher(tiny_llama, direction) -> Teacher:
    return Teacher(tiny_llama, direction, set_of(range(8)))


@pytest.fixture
def drawn(few) -> StepPrompts:
    return StepPrompts(tuple(few.harmful), tuple(few.harmless), (7, 0))


def rendered(chat, prompt) -> list[int]:
    """A prompt by the tokenizer's own chat template."""
    messages = messages_of(prompt)
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def read_ids(batch, row: int) -> list[int]:
    return batch.prompt_ids[row][batch.attention_mask[row].bool()].tolist()


def test_no_share_leaves_prompts_alone(chat, drawn):
    for i, text in enumerate(drawn.texts):
        plain = disguise(chat, text, DistillConfig(), (0, i))
        assert (plain.prompt, plain.opening) == (text, ())


def test_disguises_are_those_of_the_training_splits(chat, drawn):
    """Every drawn text is one of what the suite does not measure with."""
    openings = [chat.encode(text) for text in load_openings("train")]
    wrapped = 0
    for i, text in enumerate(drawn.texts * 8):
        made = disguise(chat, text, ALL, (0, i))
        assert 1 <= len(made.opening) <= 4
        assert any(tuple(ids[: len(made.opening)]) == made.opening for ids in openings)
        framed = [w for w in load_wrappers("val") if w.n_variations == 1]
        wrapped += made.prompt in {w.wrap(text)[0] for w in framed}
        assert not any(made.prompt in w.wrap(text) for w in load_wrappers("test"))
    assert 0 < wrapped < 8 * len(drawn.texts)  # the others are variations
    assert not set(load_openings("train")) & set(load_openings())


def test_shares_are_shares(chat):
    half = DistillConfig(wrapped_share=0.5, opened_share=0.25)
    made = [disguise(chat, "Name a river in Europe.", half, (3, i)) for i in range(400)]
    assert 160 < sum(d.prompt != "Name a river in Europe." for d in made) < 240
    assert 70 < sum(bool(d.opening) for d in made) < 130


def test_the_student_reads_the_disguise_and_the_answer_counts_alone(tiny_llama, teacher, drawn):
    made = sample_rollouts(copy_of(tiny_llama), drawn, ALL, teacher)
    for row, new in enumerate(made.batch.prompt_ids[:, -made.mask.shape[1] :].tolist()):
        text = made.texts[row // 2]
        read = disguise(tiny_llama, text, ALL, (7, 0, drawn.texts.index(text)))
        assert read_ids(made.batch, row) == [*rendered(tiny_llama, read.prompt), *read.opening, *new]
    assert made.mask.shape[1] <= WIDTH  # the opening is no part of the mask


def test_a_share_of_the_prompts_draws_the_same_disguises(tiny_llama, drawn):
    """What a process reads does not depend on how many share the work."""
    whole = sample_rollouts(tiny_llama, drawn, ALL)
    rows = {tuple(read_ids(whole.batch, i)) for i in range(len(whole.mask))}
    parts = [sample_rollouts(tiny_llama, replace(drawn, part=(i, 2)), ALL) for i in range(2)]
    assert {tuple(read_ids(p.batch, i)) for p in parts for i in range(len(p.mask))} == rows


def test_the_teacher_of_harmful_answers_reads_the_plain_prompt(tiny_llama, teacher, drawn, few):
    """One row at a time by the model's own forward pass: steered and plain, or ablated and in disguise."""
    made = sample_rollouts(tiny_llama, drawn, ALL, teacher)
    logits = logits_of(teacher_hidden(teacher, made, ALL), *output_head(tiny_llama.model))
    start = 0
    for row, counts in enumerate(made.mask.tolist()):
        n, new = sum(counts), made.batch.prompt_ids[row, -len(counts) :].tolist()
        harmful = made.texts[row // 2] in few.harmful
        ids = [*rendered(tiny_llama, made.texts[row // 2]), *new] if harmful else read_ids(made.batch, row)
        change = (
            steer(tiny_llama, teacher.direction) if harmful else ablate(tiny_llama, teacher.direction.vector)
        )
        with change, torch.no_grad():
            naive = tiny_llama.model(torch.tensor([ids]), use_cache=False).logits[0]
        first = len(ids) - len(new) - 1
        assert_near(logits[start : start + n], naive[first : first + n])
        start += n
    assert start == len(logits)


def test_a_step_learns_from_disguised_prompts(tiny_llama, teacher, few):
    """The loss is that of other rows than without disguise, and it falls on the same prompts."""
    losses = {}
    for name, config in (("plain", replace(ALL, wrapped_share=0.0, opened_share=0.0)), ("disguised", ALL)):
        config = replace(config, n_steps=6, harmful_per_step=6, harmless_per_step=6, lr=3e-3, warmup=0.0)
        state = prepare_student(copy_of(tiny_llama), teacher.direction, config)
        losses[name] = [record.loss for record in training_steps(state, teacher, few)]
    assert losses["plain"][0] != losses["disguised"][0]
    assert losses["disguised"][-1] < 0.8 * losses["disguised"][0]
