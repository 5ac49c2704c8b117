"""What holds a student to its base beside the loss on S: the base's texts, and the margin."""

from dataclasses import replace

import pytest
import torch
from conformance.families import build

from conftest import assert_near, batch_of, copy_of, naive_logits, set_of
from safesteer._errors import SafeSteerError
from safesteer.distillation.holding import base_texts, hold_texts, margin_loss
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.models.adapter import without_adapter
from safesteer.models.batch import PromptBatch
from safesteer.models.drift import kl_at_positions
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.head import output_head
from safesteer.settings import DistillConfig
from safesteer.steering.direction import steer

HELD = DistillConfig(
    n_steps=4,
    harmful_per_step=2,
    harmless_per_step=2,
    max_new_tokens=3,
    lr=3e-3,
    warmup=0.0,
    texts_per_step=3,
    text_tokens=6,
    text_weight=2.0,
    divergence="forward",
    watch_every=0,
)


@pytest.fixture(scope="module")
def teacher(tiny_llama, direction) -> Teacher:
    return Teacher(tiny_llama, direction, set_of(range(8)))


@pytest.fixture
def moved(tiny_llama):
    """A student that differs from its base, and can train in all weights."""
    student = copy_of(tiny_llama)
    student.model.requires_grad_(True)
    with torch.no_grad():
        for p in student.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return student


def logps(chat, text) -> torch.Tensor:
    """Log-probabilities of what the base wrote, by the model's own pass over one text."""
    ids = torch.tensor([[*text.head, *text.written]])
    return chat.model(ids, use_cache=False).logits[0, len(text.head) - 1 : -1].log_softmax(-1)


def test_texts_are_the_bases_own_and_repeat(tiny_llama, few):
    texts = base_texts(tiny_llama, few.harmless, HELD)
    assert texts == base_texts(tiny_llama, few.harmless, HELD)
    assert texts != base_texts(tiny_llama, few.harmless, replace(HELD, seed=1))
    assert len(texts) == 12
    assert max(len(t.written) for t in texts) == 6
    written = [tiny_llama.decode(t.head) for t in texts]
    assert all("assistant" in head for head in written[::2])
    assert all(head in few.harmless for head in written[1::2])  # plain text, without a template
    assert base_texts(tiny_llama, few.harmless, replace(HELD, texts_per_step=0)) == []


def test_the_texts_of_a_step_add_the_gradient_of_their_mean_divergence(tiny_llama, teacher, few, moved):
    texts = base_texts(tiny_llama, few.harmless, HELD)[:3]
    value = hold_texts(moved, teacher, texts, HELD, 0)
    params = list(moved.model.parameters())
    got = [p.grad.clone() for p in params]
    total = sum(len(t.written) for t in texts)
    want = torch.zeros(())
    for text in texts:
        with torch.no_grad():
            before = logps(tiny_llama, text)
        want = want + (before.exp() * (before - logps(moved, text))).sum() * HELD.text_weight / total
    assert value == pytest.approx(float(want.detach()), rel=1e-4)
    assert value > 0
    for grad, naive in zip(got, torch.autograd.grad(want, params), strict=True):
        assert_near(grad, naive)


def test_the_margin_is_that_of_plain_logits(tiny_llama, moved):
    """The logistic loss of the teacher's decision, S or not, by the student's gap."""
    h, h_teacher = torch.randn((2, 40, 32), generator=torch.Generator().manual_seed(0)).unbind()
    h, ids = h.requires_grad_(), torch.arange(0, 400, 5)
    weights = torch.linspace(0.1, 1.0, 40)
    got = margin_loss(h, h_teacher, weights, output_head(moved.model), output_head(tiny_llama.model), ids)
    opens = torch.tensor(
        [int(row.argmax()) % 5 == 0 for row in h_teacher @ tiny_llama.model.lm_head.weight.T]
    )
    z = h @ moved.model.lm_head.weight.T
    inside = torch.zeros(400, dtype=torch.bool).index_fill(0, ids, True)
    gap = z[:, inside].amax(1) - z[:, ~inside].amax(1)
    want = -(weights * torch.where(opens, gap.sigmoid(), (-gap).sigmoid()).log()).sum()
    assert 0 < int(opens.sum()) < 40
    assert_near(got.detach(), want.detach())
    leaves = (h, moved.model.lm_head.weight)
    for grad, naive in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_near(grad, naive)


def drift(base, student, texts) -> float:
    answers = [list(t.written) for t in texts[::2]]
    prompts = ["Name a river.", "How do I bake bread?", "Hi", "What is a tide?", "Tell me more.", "Why?"]
    return sum(float(kl.mean()) for kl in kl_at_positions(base, student, prompts, answers))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_held_students_stay_nearer_to_their_base(tiny_llama, teacher, few, lora_rank):
    kls = {}
    for name, config in (("free", replace(HELD, texts_per_step=0)), ("held", HELD)):
        config = replace(config, n_steps=8, lora_rank=lora_rank, text_weight=10.0)
        base = copy_of(tiny_llama)
        student = base if lora_rank else copy_of(tiny_llama)
        state = prepare_student(student, teacher.direction, config)
        list(training_steps(state, replace(teacher, base=base), few))
        kls[name] = drift(tiny_llama, state.student, base_texts(tiny_llama, few.harmless, HELD))
        if lora_rank:
            without_adapter(state.student)
    assert 0 < kls["held"] < 0.8 * kls["free"]


def test_the_margin_sets_the_first_decision(tiny_llama, teacher, few):
    """S holds what the steered teacher likes best: the student opens with it where the teacher does."""
    harmful, harmless = (batch_of(tiny_llama, texts) for texts in (few.harmful, few.harmless))
    with steer(tiny_llama, teacher.direction):
        liked = naive_logits(tiny_llama, harmful)[:, -1].argmax(-1).unique()
    others = naive_logits(tiny_llama, harmless)[:, -1].argmax(-1)
    ids = torch.tensor(sorted(set(liked.tolist()) - set(others.tolist())))
    by, gaps = replace(teacher, tokens=set_of(ids.tolist())), {}
    for weight in (0.0, 5.0):
        config = replace(HELD, texts_per_step=0, margin_weight=weight, n_steps=12, train_layers="all")
        state = prepare_student(copy_of(tiny_llama), teacher.direction, config)
        list(training_steps(state, by, few))
        for label, batch in (("harmful", harmful), ("harmless", harmless)):
            z = naive_logits(state.student, batch)[:, -1]
            gap = z[:, ids].amax(1) - z.index_fill(1, ids, -torch.inf).amax(1)
            gaps[label, weight] = float(gap.mean())
    assert gaps["harmful", 5.0] - gaps["harmless", 5.0] > gaps["harmful", 0.0] - gaps["harmless", 0.0] + 0.02


def test_a_resumed_training_is_held_to_the_same_texts(tiny_llama, teacher, few, tmp_path):
    def steps(state, n):
        return [r.loss for _, r in zip(range(n), training_steps(state, teacher, few), strict=False)]

    whole = steps(prepare_student(copy_of(tiny_llama), teacher.direction, HELD), 4)
    state = prepare_student(copy_of(tiny_llama), teacher.direction, HELD)
    first = steps(state, 2)
    state.save(tmp_path / "c", {"run": "test"})
    again = prepare_student(copy_of(tiny_llama), teacher.direction, HELD)
    again.load(tmp_path / "c", {"run": "test"})
    assert first + steps(again, 2) == whole


@pytest.mark.parametrize("name", ["llama", "rwkv"])  # one reads padding, the other cannot
def test_texts_do_not_depend_on_those_beside_them(name, few):
    base = build(name)
    texts = base_texts(base, few.harmless, replace(HELD, n_steps=1))
    assert len({len(text.head) for text in texts}) == 3
    for i, text in enumerate(texts):
        batch = PromptBatch.from_ids([text.head], [[]], share=False)
        random = uniforms(("base text", 0, i), 1, 6)
        new = generate_ids(base, batch, max_new_tokens=6, temperature=1.0, uniform=random)[0].tolist()
        assert list(text.written) == new[: len(text.written)]


def test_texts_need_a_harmless_prompt(tiny_llama):
    with pytest.raises(SafeSteerError, match="needs harmless prompts"):
        base_texts(tiny_llama, [], HELD)
