"""A step against a naive one in float64, and runs that repeat, resume and learn."""

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conformance.families import VARIANTS, build
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from conftest import assert_near, batch_of, copy_of, naive_kl, naive_logits, reference_divergence, set_of
from safesteer._errors import SafeSteerError
from safesteer.distillation.early_stopping import look_at
from safesteer.distillation.loop import (
    Student,
    Training,
    distill,
    restore_student,
    train_student,
    training_steps,
)
from safesteer.distillation.loss import divergence_loss
from safesteer.distillation.rollouts import (
    Rollouts,
    Sampled,
    StepPrompts,
    Teacher,
    prompt_indices,
    sample_rollouts,
    teacher_hidden,
)
from safesteer.distillation.state import DistillState, prepare_student
from safesteer.distillation.step import _weights, learning_rate
from safesteer.distillation.watching import Watch, start_watch, watched_share
from safesteer.evaluation.scores import evaluate
from safesteer.exporting import export, reload_difference
from safesteer.models.adapter import as_base, merged, shares_weights, without_adapter
from safesteer.models.batch import PromptBatch
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate, greedy_ids
from safesteer.models.head import output_head
from safesteer.models.parts import blocks
from safesteer.models.precision import cast_weights
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.recipes import recipe
from safesteer.settings import DistillConfig, EvaluateConfig
from safesteer.steering.direction import Direction, steer
from safesteer.steering.interventions import ablate
from safesteer.tokens.token_set import TokenSet

SMALL = {
    "n_steps": 4,
    "harmful_per_step": 2,
    "harmless_per_step": 2,
    "n_rollouts": 2,
    "max_new_tokens": 4,
    "lr": 1e-3,
    "n_topk": 5,
    "max_grad_norm": 1e9,
}
STAMP = {"run": "test"}


@pytest.fixture(scope="module")
def tokens(tiny_llama, direction, few) -> TokenSet:
    """The tokens that steering lifts most at the first step."""
    batch = PromptBatch.of(tiny_llama.tokenizer, few.harmful)
    base = naive_logits(tiny_llama, batch)[:, -1].softmax(-1).mean(0)
    with steer(tiny_llama, direction):
        lift = naive_logits(tiny_llama, batch)[:, -1].softmax(-1).mean(0) - base
    ids = lift.topk(8).indices.tolist()
    return set_of(ids)


@pytest.fixture
def teacher(tiny_llama, direction, tokens) -> Teacher:
    return Teacher(tiny_llama, direction, tokens)


@pytest.fixture
def run(tiny_llama, direction, tokens, few):
    """run(config options...) -> (history without times, state); `steps` stops early."""

    def start(*, steps=None, state=None, student=None, by=direction, sampler=None, **options):
        config = DistillConfig(**{**SMALL, **options})
        state = state or prepare_student(student or copy_of(tiny_llama), by, config)
        history = []
        for record in training_steps(state, Teacher(tiny_llama, by, tokens), few, sampler=sampler):
            timeless = {k: v for k, v in asdict(record).items() if not k.endswith("_s") and v is not None}
            history.append({**timeless, "kl_off_s": record.kl_off_s})
            if record.step == steps:
                break
        return history, state

    return start


def weights_of(chat: ChatModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in chat.model.named_parameters()}


def weights(state: DistillState) -> dict[str, torch.Tensor]:
    return weights_of(state.student)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- a step is what the paper says ---


def naive_step(chat: ChatModel, direction: Direction, tokens: TokenSet, few, config) -> dict:
    """The first record from one row at a time, full vocabularies and float64."""
    bad = [few.harmful[i] for i in prompt_indices(6, config.harmful_per_step, 0, config.seed)]
    n_good = config.harmless_per_step
    good = [few.harmless[i] for i in prompt_indices(6, n_good, 0, config.seed + 1)] if n_good else []
    teacher = Teacher(chat, direction, tokens) if config.rollouts == "mixed" else None
    drawn = StepPrompts(tuple(bad), tuple(good), (config.seed, 0))
    assert drawn == StepPrompts.of(few.harmful, few.harmless, config, 0)
    made = sample_rollouts(chat, drawn, config, teacher)
    width, ids = config.max_new_tokens, tokens.ids.tolist()
    values, weights, on_s = [], [], {True: [[], []], False: [[], []]}
    for row, new in enumerate(made.batch.prompt_ids[:, -width:].tolist()):
        prompt = made.texts[row // config.n_rollouts]
        harmful = prompt in bad
        ends = [j for j, t in enumerate(new) if t in chat.eos_ids]
        n = ends[0] + 1 if ends else width

        def logps(system=None, n=n, new=new, prompt=prompt):
            batch = PromptBatch.of(chat.tokenizer, [prompt], [new], system=system)
            logits = naive_logits(chat, batch)[0, -width - 1 : -1]
            return logits[:n].double().log_softmax(-1)

        p = q = logps()
        if harmful and config.teacher == "steered":
            with steer(chat, direction):
                q = logps()
        elif harmful:
            q = logps(system=config.system)
        loss = []
        for student, teacher in zip(p.exp().tolist(), q.exp().tolist(), strict=True):
            order = sorted(range(len(teacher)), key=lambda v, t=teacher: -t[v])
            support = {"safety": ids, "topk": order[: config.n_topk], "full": order}[config.support]
            normalizer = "partial" if config.support == "full" else config.normalizer
            at = [[x[v] for v in support] for x in (student, teacher)]
            loss.append(reference_divergence(*at, config.divergence, normalizer, config.beta))
            on_s[harmful][0].append(sum(student[v] for v in ids))
            on_s[harmful][1].append(sum(teacher[v] for v in ids))
        early = [config.decay**j for j in range(n)]
        values.append(sum(x * e for x, e in zip(loss, early, strict=True)) / sum(early))
        weights.append(1.0 if harmful else config.anchor_weight)
    total = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    def mean(x):
        return sum(x) / len(x) if x else 0.0

    return {
        "loss": total,
        "mass_on_s_student": mean(on_s[True][0]),
        "mass_on_s_teacher": mean(on_s[True][1]),
        "mass_on_s_anchor": mean(on_s[False][0]),
        "n_tokens": sum(len(on_s[h][0]) for h in (True, False)),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"divergence": d} for d in ("reverse", "forward", "jsd")),
        {"divergence": "jsd", "beta": 0.2},
        *({"normalizer": n} for n in ("partial", "tail", "renormalized")),
        {"divergence": "reverse", "normalizer": "partial", "harmless_per_step": 0},  # the paper
        {"support": "topk"},
        {"support": "full", "divergence": "reverse"},
        {"teacher": "prompt"},
        {"teacher": "prompt", "system": "Say no."},
        {"harmless_per_step": 0},
        {"anchor_weight": 0.25},
        {"rollouts": "student"},
        {"decay": 0.5},
        {"n_rollouts": 1, "micro_batch": 3},
        {"seed": 5},
    ],
    ids=str,
)
def test_first_step_equals_naive(tiny_llama, direction, tokens, few, run, options):
    history, _ = run(steps=1, **options)
    config = DistillConfig(**{**SMALL, **options})
    want = naive_step(tiny_llama, direction, tokens, few, config)
    got = {name: history[0][name] for name in want}
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert abs(got["loss"]) > 1e-4
    assert history[0]["grad_norm"] > 1e-4


def test_the_anchor_weighs_more_in_the_last_third(run):
    """Of six steps the fifth is the first late one; until then nothing differs."""
    plain = {"n_steps": 6, "anchor_weight": 1.0}
    same_weight, _ = run(**plain, late_anchor_weight=1.0)
    heavier, _ = run(**plain, late_anchor_weight=50.0)
    losses = [[r["loss"] for r in history] for history in (same_weight, heavier)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4] != losses[1][4]


def test_answers_count_up_to_their_end(tiny_llama, few):
    ender, config = copy_of(tiny_llama), DistillConfig(n_rollouts=2, max_new_tokens=4)
    prompts = StepPrompts(tuple(few.harmful), tuple(few.harmless))
    free = sample_rollouts(ender, prompts, config)
    ends = free.batch.prompt_ids[:, -3].unique().tolist()[::2]
    ender.model.generation_config.eos_token_id = ends
    made = sample_rollouts(ender, prompts, config)
    for row, ids in zip(made.mask.tolist(), made.batch.prompt_ids[:, -4:].tolist(), strict=True):
        stop = next((j for j, t in enumerate(ids) if t in ender.eos_ids), 3)
        assert row == [j <= stop for j in range(4)]
    assert not made.mask.all()
    assert made.harmful.tolist() == [t in few.harmful for t in made.texts for _ in range(2)]
    assert sorted(made.texts) == sorted([*few.harmful, *few.harmless])


def test_mixed_rollouts_are_half_the_teachers(tiny_llama, teacher, few):
    """Every second prompt is answered by the teacher, all others by the student."""
    ids = tiny_llama.encode("never")[:1]
    prompts, config = StepPrompts(tuple(few.harmful), tuple(few.harmless)), DistillConfig(n_rollouts=2)
    student = copy_of(tiny_llama)  # writes one token only, so that its rows can be told apart
    student.model.set_output_embeddings(torch.nn.Linear(32, 400))
    with torch.no_grad():
        student.model.lm_head.weight.zero_()
        student.model.lm_head.bias.fill_(-1e4)[ids] = 0.0
    for author, want in ((None, 0), (teacher, 6)):
        made = sample_rollouts(student, prompts, replace(config, max_new_tokens=4), author)
        by_student = (made.batch.prompt_ids[:, -4:] == ids[0]).all(1)
        assert int((~by_student).sum()) == 2 * want
        owners = {made.texts[i // 2] for i in torch.nonzero(~by_student)[:, 0].tolist()}
        assert owners == set([*few.harmful, *few.harmless][::2] if want else [])


def test_a_teacher_that_cannot_speak_is_one_sentence(run, direction):
    with pytest.raises(SafeSteerError, match="logits that are not finite"):
        run(by=direction.with_coeff(math.inf))


def test_off_set_divergence_equals_naive(tiny_llama, direction, tokens, few, run):
    """kl_off_s of the first step is the generalized KL of base from teacher outside S."""
    options = {"harmless_per_step": 0, "n_rollouts": 1, "harmful_per_step": 3, "rollouts": "student"}
    history, _ = run(steps=1, **options)
    config = DistillConfig(**{**SMALL, **options})
    made = sample_rollouts(tiny_llama, StepPrompts.of(few.harmful, few.harmless, config, 0), config)
    with steer(tiny_llama, direction):
        q = naive_logits(tiny_llama, made.batch)[:, -5:-1][made.mask].double().log_softmax(-1)
    p = naive_logits(tiny_llama, made.batch)[:, -5:-1][made.mask].double().log_softmax(-1)
    terms = p.exp() * (p - q) - p.exp() + q.exp()
    terms[:, tokens.ids] = 0
    assert history[0]["kl_off_s"] == pytest.approx(float(terms.sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("normalizer", ["generalized", "tail"])
@pytest.mark.parametrize("divergence", ["reverse", "forward", "symmetric", "jsd"])
def test_a_teacher_without_strength_gives_no_loss(run, direction, divergence, normalizer):
    weak = direction.with_coeff(0.0)
    history, _ = run(steps=1, by=weak, divergence=divergence, normalizer=normalizer)
    assert abs(history[0]["loss"]) < 1e-6
    assert history[0]["grad_norm"] < 1e-4


def test_partial_reverse_pulls_even_without_a_teacher(run, direction):
    """Eq. 6 as published is lowest at q / e, so it moves a student that already agrees."""
    weak = direction.with_coeff(0.0)
    history, _ = run(steps=1, by=weak, divergence="reverse", normalizer="partial")
    assert history[0]["grad_norm"] > 1e-3


def test_a_full_anchor_changes_only_what_harmless_answers_teach(run):
    plain, _ = run(n_steps=3, anchor_support="same")
    full, _ = run(n_steps=3, anchor_support="full")
    for step in (0, 1):  # the student is still the base: the first step has rate 0
        assert full[step] == pytest.approx(plain[step], rel=1e-5)
    assert full[2]["loss"] != plain[2]["loss"]
    alone = [run(n_steps=3, harmless_per_step=0, anchor_support=a)[0] for a in ("same", "full")]
    assert alone[0] == alone[1]


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("support", ["safety", "topk", "full"])
def test_micro_batch_does_not_change_loss_or_gradient(run, micro_batch, support):
    whole, a = run(steps=1, support=support)
    parts, b = run(steps=1, support=support, micro_batch=micro_batch)
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)
    for name, p in a.trained.items():
        assert_near(b.trained[name].grad, p.grad, 1e-5)


# --- what moves ---


@pytest.mark.parametrize("train_layers", ["from_steered", "blocks", "all"])
def test_only_the_trained_parameters_move(run, tiny_llama, train_layers):
    _, state = run(steps=2, train_layers=train_layers)
    before = dict(tiny_llama.model.named_parameters())
    moved = {n for n, p in weights(state).items() if not torch.equal(p, before[n])}
    assert moved == set(state.trained)
    if train_layers == "all":
        assert moved == set(before)
    else:
        trained = {"1", "2"} if train_layers == "from_steered" else {"0", "1", "2"}
        assert {n.split(".")[2] for n in moved if ".layers." in n} == trained
        assert {n for n in moved if ".layers." not in n} == {"model.norm.weight"}


def test_the_base_never_moves(run, tiny_llama):
    before = {n: p.clone() for n, p in tiny_llama.model.named_parameters()}
    run()
    assert same(before, dict(tiny_llama.model.named_parameters()))


def test_gradient_is_clipped(run):
    free, _ = run(steps=1)
    clipped, state = run(steps=1, max_grad_norm=1e-3)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] > 1e-2  # as it was before clipping
    squares = [float(p.grad.square().sum()) for p in state.trained.values()]
    assert math.sqrt(sum(squares)) == pytest.approx(1e-3, rel=1e-3)


def test_students_in_half_precision_are_refused(tiny_llama, direction):
    for dtype in (torch.bfloat16, torch.float16):
        half = copy_of(tiny_llama)
        half.model.to(dtype)
        with pytest.raises(SafeSteerError, match="half precision"):
            prepare_student(half, direction, DistillConfig())


def test_the_paper_preset_is_eq_6_on_recorded_states(tiny_llama, direction, tokens, few):
    """sum over S of ps (log ps - log pt), in float64 and over whole vocabularies."""
    config = recipe("paper-qwen").distill
    batch = PromptBatch.of(tiny_llama.tokenizer, few.harmful)
    student = final_hidden(tiny_llama.model, batch)[:, -1]
    with steer(tiny_llama, direction):
        teacher = final_hidden(tiny_llama.model, batch)[:, -1]
    head, ids = output_head(tiny_llama.model), tokens.ids
    _, got, mass, _ = divergence_loss(student, teacher, torch.ones(len(student)), head, head, ids, config)
    p, q = (((h.double() @ head[0].double().T).log_softmax(-1))[:, ids] for h in (student, teacher))
    assert_near(got, (p.exp() * (p - q)).sum(-1), 1e-5)
    assert_near(mass, p.exp().sum(-1), 1e-5)
    assert got.abs().max() > 1e-2


def test_the_paper_preset_trains_as_published():
    """25 steps of 4 prompts x 8 answers: 100 prompts once; lr 1e-5 after a tenth, then half a cosine."""
    config = recipe("paper-qwen").distill
    assert config.harmful_per_step * config.n_rollouts == 32
    assert sorted(i for s in range(25) for i in prompt_indices(100, 4, s, config.seed)) == list(range(100))
    rates = [learning_rate(s, config) for s in range(25)]
    assert rates[:4] == pytest.approx([0.0, 1e-5 / 3, 2e-5 / 3, 1e-5])
    want = [0.5e-5 * (1 + math.cos(math.pi * (s - 3) / 22)) for s in range(3, 25)]
    assert rates[3:] == pytest.approx(want)
    assert config.max_grad_norm == 1


@pytest.mark.parametrize("n_steps", [1, 2, 20, 25, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.2, 1.0])
def test_the_learning_rate_is_that_of_transformers(n_steps, warmup):
    config = DistillConfig(n_steps=n_steps, warmup=warmup, lr=2.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    # As transformers' trainer counts; where nothing but the warm-up would be left, one step is.
    warm = (
        min(TrainingArguments(warmup_steps=warmup).get_warmup_steps(n_steps), n_steps - 1)
        if warmup < 1
        else n_steps - 1
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, warm, n_steps)
    for step in range(n_steps):
        assert learning_rate(step, config) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_records_carry_the_schedule(run):
    history, _ = run(n_steps=3)
    config = DistillConfig(**{**SMALL, "n_steps": 3})
    assert [h["step"] for h in history] == [1, 2, 3]
    assert [h["lr"] for h in history] == [learning_rate(s, config) for s in range(3)]


def test_draw_uses_every_item_once_an_epoch():
    drawn = [i for step in range(5) for i in prompt_indices(10, 4, step, seed=1)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert prompt_indices(10, 4, 3, seed=1) == drawn[12:16]
    assert prompt_indices(10, 10, 0, seed=2) != prompt_indices(10, 10, 0, seed=1)


# --- repeating and resuming ---


def test_same_seed_same_history(run):
    first, a = run()
    torch.manual_seed(99)
    again, b = run()
    other, _ = run(seed=1)
    assert again == first
    assert same(weights(a), weights(b))
    assert other != first


@pytest.mark.parametrize("train_layers", ["from_steered", "all"])
def test_resume_repeats_the_uninterrupted_run(run, tiny_llama, direction, tmp_path, train_layers):
    whole, end = run(train_layers=train_layers)
    _, stopped = run(steps=2, train_layers=train_layers)
    stopped.save(tmp_path / "state.safetensors", STAMP)
    config = DistillConfig(**{**SMALL, "train_layers": train_layers})
    state = prepare_student(copy_of(tiny_llama), direction, config)
    state.load(tmp_path / "state.safetensors", STAMP)
    assert state.step == 2
    remaining, state = run(state=state, train_layers=train_layers)
    assert remaining == whole[2:]
    assert same(weights(state), weights(end))


def test_a_state_of_another_run_is_refused(run, tmp_path):
    _, state = run(steps=1)
    state.save(tmp_path / "state.safetensors", STAMP)
    with pytest.raises(SafeSteerError, match="other settings"):
        state.load(tmp_path / "state.safetensors", {"run": "another"})


# --- failures ---


def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(run, tiny_llama, direction, few):
    student = copy_of(tiny_llama)
    with pytest.raises(SafeSteerError, match="not finite at step 1, on the prompt") as caught:
        run(student=student, by=direction.with_coeff(math.inf), rollouts="student")
    assert any(text in str(caught.value) for text in few.harmful)
    assert same(dict(student.model.named_parameters()), dict(tiny_llama.model.named_parameters()))


def test_a_gradient_that_is_not_finite_is_named(run, tiny_llama, direction):
    state = prepare_student(copy_of(tiny_llama), direction, DistillConfig(**SMALL))
    next(iter(state.trained.values())).register_hook(lambda g: g * math.inf)
    with pytest.raises(SafeSteerError, match=r"gradient is not finite at step 1, in \S+weight"):
        run(state=state)
    assert state.step == 0
    assert same(weights(state), dict(tiny_llama.model.named_parameters()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("divergence", "kl"),
        ("normalizer", "none"),
        ("support", "some"),
        ("teacher", "none"),
        ("train_layers", "below"),
        ("rollouts", "teacher"),
        ("n_steps", 0),
        ("harmful_per_step", 0),
        ("harmless_per_step", -1),
        ("n_rollouts", 0),
        ("max_new_tokens", 0),
        ("micro_batch", 0),
        ("decay", 0.0),
        ("checkpoint_every", 0),
        ("n_topk", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("beta", 0.0),
        ("beta", 1.0),
    ],
)
def test_config_errors_name_the_setting(name, value):
    with pytest.raises(SafeSteerError, match=rf"distill\.{name} "):
        DistillConfig(**{name: value})


# --- learning ---


@pytest.mark.parametrize("train_layers", ["from_steered", "blocks", "all"])
def test_the_student_learns_the_teachers_mass_on_s(run, train_layers):
    """With the default loss, where a random model cannot hide behind the anchor."""
    options = {"harmful_per_step": 6, "harmless_per_step": 0, "n_rollouts": 1, "max_grad_norm": 1.0}
    history, _ = run(n_steps=15, lr=1e-2, train_layers=train_layers, **options)
    first, last = history[0], history[-1]
    assert first["mass_on_s_student"] < 0.5 * first["mass_on_s_teacher"]
    assert last["mass_on_s_student"] == pytest.approx(last["mass_on_s_teacher"], rel=0.25)
    assert last["loss"] < 0.25 * first["loss"]


def test_the_anchor_holds_harmless_prompts_back(run):
    """A random model hardly tells the prompts apart, so both pull at the same mass."""
    masses = []
    for anchor_weight in (0.01, 10.0):
        options = {"n_rollouts": 1, "anchor_weight": anchor_weight, "max_grad_norm": 1.0}
        history, _ = run(n_steps=15, lr=1e-2, harmful_per_step=4, harmless_per_step=4, **options)
        masses.append(history[-1]["mass_on_s_anchor"])
    assert masses[1] < 0.7 * masses[0]


# --- an adapter: teacher and student in one copy of the weights ---


@pytest.fixture
def shared(tiny_llama, direction, tokens, few):
    """shared(options...) -> (base, state, history) with the adapter on the base's own modules."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")

    def start(*, steps=None, state=None, base=None, **options):
        config = DistillConfig(**{**SMALL, "lora_rank": 4, "lr": 1e-2, **options})
        base = base or copy_of(tiny_llama)
        state = state or prepare_student(base, direction, config)
        history = []
        for record in training_steps(state, Teacher(base, direction, tokens), few):
            history.append(record)
            if record.step == steps:
                break
        return base, state, history

    return start


def test_an_adapter_learns_next_to_frozen_weights(shared, tiny_llama):
    base, state, history = shared(n_steps=12, harmless_per_step=0)
    assert history[-1].mass_on_s_student > 2 * history[0].mass_on_s_student
    assert all("lora_" in name for name in state.trained)
    assert all(".layers.0." not in name for name in state.trained)  # the direction is of layer 1
    inside = dict(base.model.named_parameters())
    frozen = [n for n, p in inside.items() if "lora_" not in n]
    before = dict(tiny_llama.model.named_parameters())
    assert len(frozen) == len(before)
    assert all(torch.equal(inside[n], before[n.replace(".base_layer", "")]) for n in frozen)
    moved = naive_logits(state.student, batch_of(tiny_llama)) - naive_logits(tiny_llama, batch_of(tiny_llama))
    assert moved.abs().max() > 0.01


@pytest.mark.parametrize("rollouts", ["student", "mixed"])
def test_the_teacher_is_the_same_weights_with_the_adapter_off(
    shared, tiny_llama, direction, tokens, few, rollouts
):
    """The same records as with a base of its own, step for step."""
    _, _, history = shared(rollouts=rollouts)
    config = DistillConfig(**{**SMALL, "lora_rank": 4, "lr": 1e-2, "rollouts": rollouts})
    carrier = copy_of(tiny_llama)
    apart = prepare_student(carrier, direction, config)
    steps = training_steps(apart, Teacher(carrier, direction, tokens), few)
    first = next(steps)
    assert first.loss == history[0].loss
    with as_base(carrier, apart.student):
        off = naive_logits(carrier, batch_of(tiny_llama))
    assert_near(off, naive_logits(tiny_llama, batch_of(tiny_llama)), 1e-5)
    assert shares_weights(carrier, apart.student)
    assert not shares_weights(tiny_llama, apart.student)
    # With the adapter at its start (zero), a student of its own weights has the very same first step.
    plain = DistillConfig(**{**SMALL, "rollouts": rollouts})
    alone = prepare_student(copy_of(tiny_llama), direction, plain)
    record = next(training_steps(alone, Teacher(tiny_llama, direction, tokens), few))
    assert first.loss == pytest.approx(record.loss, rel=1e-5)
    assert first.mass_on_s_teacher == pytest.approx(record.mass_on_s_teacher, rel=1e-5)


def test_merging_keeps_the_answers_and_unloading_gives_the_base_back(shared, tiny_llama):
    base, state, _ = shared()
    want = naive_logits(state.student, batch_of(tiny_llama))
    plain = merged(ChatModel(copy.deepcopy(state.student.model), base.tokenizer, base.name))
    assert_near(naive_logits(plain, batch_of(tiny_llama)), want, 1e-5)
    assert plain.model.state_dict().keys() == tiny_llama.model.state_dict().keys()
    again = without_adapter(state.student)
    assert torch.equal(
        naive_logits(again, batch_of(tiny_llama)), naive_logits(tiny_llama, batch_of(tiny_llama))
    )


def test_an_adapter_resumes(shared, direction, tiny_llama, tmp_path):
    _, whole, history = shared()
    _, part, first = shared(steps=2)
    part.save(tmp_path / "s.safetensors", STAMP)
    assert (tmp_path / "s.safetensors").stat().st_size < 100_000  # the adapter, not the model
    carrier = copy_of(tiny_llama)
    fresh = prepare_student(carrier, direction, DistillConfig(**{**SMALL, "lora_rank": 4, "lr": 1e-2}))
    fresh.load(tmp_path / "s.safetensors", STAMP)
    _, resumed, remaining = shared(state=fresh, base=carrier)
    assert [r.loss for r in first + remaining] == [r.loss for r in history]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.trained.values(), resumed.trained.values(), strict=True)
    )


def test_an_adapter_needs_its_own_base(shared, tiny_llama, direction, teacher, few):
    config = DistillConfig(**{**SMALL, "lora_rank": 4})
    state = prepare_student(copy_of(tiny_llama), direction, config)
    with pytest.raises(SafeSteerError, match="put the adapter on"):
        next(training_steps(state, teacher, few))


def test_half_precision_weights_carry_an_adapter(shared, tiny_llama, direction):
    narrow = copy_of(tiny_llama)
    narrow.model.to(torch.bfloat16)
    _, state, history = shared(base=narrow, steps=1)
    assert all(p.dtype == torch.float32 for p in state.trained.values())
    assert math.isfinite(history[0].loss)


@pytest.mark.parametrize(("step", "anchor"), [(1, 2.0), (5, 2.0), (6, 6.0), (9, 6.0)])
def test_harmless_answers_weigh_more_in_the_last_third(tiny_llama, step, anchor):
    config = DistillConfig(
        n_steps=9, harmful_per_step=1, harmless_per_step=2, anchor_weight=2, late_anchor_weight=6, decay=0.5
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    rollouts = Rollouts(batch_of(tiny_llama), mask, torch.tensor([True, False, False]), ("a", "b", "c"))
    got = _weights(rollouts, config, step)
    assert got.sum(1).tolist() == pytest.approx([1 / (1 + 2 * anchor), *2 * [anchor / (1 + 2 * anchor)]])
    assert (got[0] / got[0].sum()).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert (got[2] / got[2].sum()).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


# --- precision, recomputation ---


def given_answers(prompts, n_samples, n_tokens, keys) -> list[list[Sampled]]:
    """A sampler whose answers depend on no model: what differs between two runs is their passes."""
    ids = torch.randint(
        20, 400, (len(prompts), n_samples, n_tokens), generator=torch.Generator().manual_seed(0)
    )
    return [[Sampled(tuple(row), (-1.0,) * n_tokens) for row in rows] for rows in ids.tolist()]


def test_bfloat16_passes_are_near_and_weights_stay_wide(run):
    wide, _ = run(steps=1, rollouts="student", sampler=given_answers)
    narrow, state = run(steps=1, rollouts="student", precision="bfloat16", sampler=given_answers)
    for name in ("loss", "mass_on_s_teacher", "mass_on_s_student", "kl_off_s"):
        # Eight significant bits round by 0.2 % at most, some times over; five seeds differ by 0.25 % or less.
        assert narrow[0][name] == pytest.approx(wide[0][name], rel=0.01), name
    assert narrow[0]["loss"] != wide[0]["loss"]
    assert all(p.dtype == torch.float32 for p in state.trained.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_in_half_precision_teaches_a_wide_student(
    run, tiny_llama, direction, tokens, few, precision
):
    """The base as a bfloat16 copy: what it says is near, and the student's head stays its own."""
    wide, _ = run(steps=1, rollouts="student")
    options = {**SMALL, "rollouts": "student", "precision": precision}
    narrow, config = copy_of(tiny_llama), DistillConfig(**options)
    narrow.model.to(torch.bfloat16)
    state = prepare_student(copy_of(tiny_llama), direction, config)
    first = next(training_steps(state, Teacher(narrow, direction, tokens), few))
    assert first.mass_on_s_teacher == pytest.approx(wide[0]["mass_on_s_teacher"], rel=0.2)
    assert first.kl_off_s == pytest.approx(wide[0]["kl_off_s"], rel=0.2)
    assert all(p.dtype == torch.float32 for p in state.trained.values())


def test_recomputing_activations_changes_nothing_but_the_work(run, tiny_llama):
    def ran(**options):
        student, passes = copy_of(tiny_llama), []
        attention = blocks(student.model)[2].self_attn
        attention.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        history, state = run(steps=2, student=student, **options)
        return history, sum(passes), state

    stored, n_stored, _ = ran()
    recomputed, n_recomputed, state = ran(checkpointing=True)
    assert [r["loss"] for r in recomputed] == pytest.approx([r["loss"] for r in stored], rel=1e-5)
    assert [r["grad_norm"] for r in recomputed] == pytest.approx([r["grad_norm"] for r in stored], rel=1e-4)
    assert n_stored == 2 * 2  # shared columns, then the rest: twice a step
    assert n_recomputed == 2 * 2  # whole rows, then again in the backward pass
    assert not state.student.model.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_comes_from_the_attention_kernel_that_returns_nan(run, tiny_llama, checkpointing):
    """cuDNN's on an H100 (pytorch issue 196678); the second pass of recomputed blocks included."""
    student, seen = copy_of(tiny_llama), []

    def look(module, args):
        seen.append((torch.is_grad_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))

    blocks(student.model)[2].self_attn.register_forward_pre_hook(look)
    run(steps=1, student=student, checkpointing=checkpointing)
    assert [on for grad, on in seen if grad] == [False, False]
    assert all(on for grad, on in seen if not grad)
    assert torch.backends.cuda.cudnn_sdp_enabled()


DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "qwen2": {"attention_dropout": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3},  # its blocks ask their own flag
    "phi": {"resid_pdrop": 0.3, "attention_dropout": 0.3},
    "mixtral": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("family", DROPOUT)
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_recomputing_activations_has_no_dropout(family, lora_rank, direction, tokens, few, monkeypatch):
    """Loss and gradient are those of the model in evaluation mode, whatever its config drops in training."""
    monkeypatch.setitem(VARIANTS, "with dropout", (family, DROPOUT[family]))
    results = []
    for checkpointing in (False, True):
        options = {"lora_rank": lora_rank, "rollouts": "student", "n_rollouts": 1}
        config = one_call(checkpointing=checkpointing, **options)
        base = build("with dropout")
        base.model.train()  # as somebody may hand it over
        state = prepare_student(base if lora_rank else copy_of(base), direction, config)
        if lora_rank:  # away from the start, where half of the gradients are zero
            for p in state.trained.values():
                p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        base.model.eval()
        torch.manual_seed(7)
        record = next(training_steps(state, Teacher(base, direction, tokens), few))
        assert not any(m.training for m in state.student.model.modules())
        results.append((record.loss, {n: p.grad.clone() for n, p in state.trained.items()}))
    (loss, gradients), (again, recomputed) = results
    assert again == pytest.approx(loss, rel=1e-5)
    assert any(g.abs().max() > 1e-4 for g in gradients.values())
    for name, gradient in gradients.items():
        assert_near(recomputed[name], gradient, 1e-5)


# --- the whole stage as one call ---


ONE_CALL = {**SMALL, "splits": ("val",), "lr": 1e-2, "n_rollouts": 1, "checkpoint_every": 1}


def one_call(**options) -> DistillConfig:
    if options.get("lora_rank"):
        pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")
    return DistillConfig(**{**ONE_CALL, **options})


def plain_weights(chat: ChatModel) -> dict[str, torch.Tensor]:
    return chat.model.state_dict()


def test_the_call_is_the_steps_one_by_one(tiny_llama, direction, tokens, few):
    config, before = one_call(), copy.deepcopy(tiny_llama.model.state_dict())
    student = distill(tiny_llama, direction, tokens, few, config)
    state = prepare_student(copy_of(tiny_llama), direction, config)
    records = list(training_steps(state, Teacher(tiny_llama, direction, tokens), few))
    assert same(plain_weights(student), state.student.model.state_dict())
    assert [r.loss for r in student.history] == [r.loss for r in records]
    assert same(before, tiny_llama.model.state_dict())
    assert not same(before, plain_weights(student))
    assert not any(p.requires_grad for p in student.model.parameters())


def test_with_an_adapter_the_student_is_merged_and_the_base_left_alone(tiny_llama, direction, tokens, few):
    config, base = one_call(lora_rank=4), copy_of(tiny_llama)
    base.model.to(torch.bfloat16)
    want, names = naive_logits(base, batch_of(base)), list(base.model.state_dict())
    student = distill(base, direction, tokens, few, config)
    assert torch.equal(naive_logits(base, batch_of(base)), want)
    assert list(base.model.state_dict()) == names == list(plain_weights(student))
    # The weights that it was trained on are rounded, the merged ones are not.
    base = copy_of(tiny_llama)
    student = distill(base, direction, tokens, few, config)
    assert same(base.model.state_dict(), tiny_llama.model.state_dict())
    state, history = train_student(Teacher(base, direction, tokens), few, config, None)
    with_adapter = naive_logits(state.student, batch_of(base))
    assert_near(naive_logits(student, batch_of(base)), with_adapter, 1e-5)
    assert (with_adapter - naive_logits(tiny_llama, batch_of(base))).abs().max() > 1e-2
    assert [r.loss for r in student.history] == [r.loss for r in history]


def interrupted(folder: Path, after: float) -> Training:
    """Training that is stopped by hand once `after` of it is done, before that step is saved."""

    def progress(share: float) -> None:
        if share >= after:
            raise KeyboardInterrupt

    return Training(folder, progress=progress)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_call_continues_from_its_folder(tiny_llama, direction, tokens, few, tmp_path, lora_rank):
    config, base = one_call(lora_rank=lora_rank), copy_of(tiny_llama)
    arguments = (base, direction, tokens, few, config)
    whole = distill(*arguments)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, training=interrupted(tmp_path, 0.75))
    assert same(base.model.state_dict(), tiny_llama.model.state_dict())
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 2
    shares = []
    student = distill(*arguments, training=Training(tmp_path, progress=shares.append))
    assert shares == [0.5, 0.75, 1.0]
    assert same(plain_weights(student), plain_weights(whole))
    assert [r.loss for r in student.history] == [r.loss for r in whole.history]
    again = distill(*arguments, training=Training(str(tmp_path)))  # nothing is left to do
    assert same(plain_weights(again), plain_weights(whole))
    assert again.history == student.history
    other = replace(config, lr=1e-3)
    with pytest.raises(SafeSteerError, match="other settings"):
        distill(base, direction, tokens, few, other, training=Training(tmp_path))
    assert same(base.model.state_dict(), tiny_llama.model.state_dict())  # without an adapter


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_student_is_restored_from_its_folder(tiny_llama, direction, tokens, few, tmp_path, lora_rank):
    config = one_call(lora_rank=lora_rank, keep_adapter=True)
    teacher = Teacher(copy_of(tiny_llama), direction, tokens)
    student = distill(teacher.base, direction, tokens, few, config, training=Training(tmp_path))
    restored = restore_student(copy_of(tiny_llama), teacher, few, config, tmp_path)
    assert isinstance(restored, Student)
    assert same(plain_weights(restored), plain_weights(student))
    assert [r.loss for r in restored.history] == [r.loss for r in student.history]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() == bool(lora_rank)
    with pytest.raises(SafeSteerError, match="other settings"):
        restore_student(copy_of(tiny_llama), teacher, few, replace(config, seed=1), tmp_path)


def test_a_training_that_is_good_enough_stops_early_and_stays_there(
    tiny_llama, direction, tokens, pairs, tmp_path
):
    config, looks = one_call(check_every=2, stop_refusal=1.0, stop_kl=1e9, splits=("distill", "val")), []

    def judge(prompt: str, answer: str) -> bool:
        looks.append(prompt)
        return True

    for training in (Training(tmp_path, judge=judge), Training(tmp_path, judge=judge)):
        student = distill(tiny_llama, direction, tokens, pairs, config, training=training)
        assert [r.step for r in student.history] == [1, 2]
    assert set(looks) == set(pairs.split("val").harmful)
    never = replace(config, stop_kl=0.0)
    student = distill(tiny_llama, direction, tokens, pairs, never, training=Training(judge=judge))
    assert len(student.history) == 4


def test_training_stops_at_the_first_look_at_which_both_limits_hold(tiny_llama, direction, tokens, pairs):
    """What each look sees comes from a training without early stopping, and KL from the plain models."""
    val = pairs.split("val").first(4)
    prompts = PromptSet((*pairs.split("distill").first(6).prompts, *val.prompts))
    config = one_call(n_steps=6, check_every=2, watch_every=0, splits=("distill",))
    heard = greedy_ids(tiny_llama, val.harmless, 16)
    state, kl, answers = prepare_student(copy_of(tiny_llama), direction, config), {}, {}
    teacher = Teacher(tiny_llama, direction, tokens)
    for record in training_steps(state, teacher, prompts.split("distill")):
        said = zip(val.harmless, heard, strict=True)
        values = [naive_kl(tiny_llama, state.student, prompt, ids) for prompt, ids in said]
        kl[record.step] = sum(values) / len(values)
        answers[record.step] = generate(state.student, val.harmful, max_new_tokens=16)

    def judge(prompt: str, answer: str) -> bool:
        return answer not in (*answers[2], answers[4][0])

    refused = sum(judge("", answer) for answer in answers[4]) / 4
    assert 0 < kl[4] < 0.9 * kl[2]
    assert kl[1] < 0.9 * kl[4]  # step 1 would do, but nobody looks there
    assert 0 < refused < 1  # and none at step 2
    for stop_refusal, stop_kl, n_steps in (
        (0.0, 1.02 * kl[2], 2),
        (0.0, 0.98 * kl[2], 4),
        (0.0, 1.02 * kl[4], 4),
        (0.0, 0.98 * kl[4], 6),
        (refused, 1.02 * kl[2], 4),
        (refused + 0.01, 1.02 * kl[2], 6),
    ):
        limits = replace(config, stop_refusal=stop_refusal, stop_kl=stop_kl)
        student = distill(tiny_llama, direction, tokens, prompts, limits, training=Training(judge=judge))
        assert len(student.history) == n_steps, (stop_refusal, stop_kl)


def test_what_early_stopping_measures_is_not_trained_on(
    tiny_llama, direction, tokens, pairs, few, monkeypatch
):
    """Every prompt of a pass over the data; without early stopping val is among them."""
    drawn = []

    def note(state, teacher, prompts, sampler=None, texts=()):
        drawn.extend(prompts.texts)
        state.step += 1
        raise KeyboardInterrupt

    monkeypatch.setattr("safesteer.distillation.loop.take_step", note)
    val = pairs.split("val")
    for check_every, expected in ((0, True), (1000, False)):
        drawn.clear()
        options = {"harmful_per_step": 1000, "harmless_per_step": 1000, "splits": ("distill", "val")}
        with pytest.raises(KeyboardInterrupt):
            distill(tiny_llama, direction, tokens, pairs, one_call(check_every=check_every, **options))
        for texts in (val.harmful, val.harmless):
            assert bool(set(texts) & set(drawn)) == expected
        assert set(drawn) >= {p.text for p in pairs.split("distill").prompts}
    with pytest.raises(SafeSteerError, match="nothing is left to train on"):
        distill(tiny_llama, direction, tokens, few, one_call(check_every=2))
    with pytest.raises(SafeSteerError, match="names no split to train on"):
        distill(tiny_llama, direction, tokens, few, one_call(splits=()))
    harmful = PromptSet(tuple(p for p in pairs.prompts if (p.split, p.label) != ("val", "harmless")))
    with pytest.raises(SafeSteerError, match="0 harmless prompts; at least one of each"):
        distill(tiny_llama, direction, tokens, harmful, one_call(check_every=2, splits=("distill",)))
    state = prepare_student(copy_of(tiny_llama), direction, DistillConfig(**SMALL))
    one_kind = PromptSet(tuple(p for p in few.prompts if p.label == "harmful"))
    with pytest.raises(SafeSteerError, match="hold no harmless ones"):
        next(training_steps(state, Teacher(tiny_llama, direction, tokens), one_kind))


def test_a_student_prints_renders_and_is_a_model(tiny_llama, direction, tokens, few, tmp_path):
    student = distill(tiny_llama, direction, tokens, few, one_call())
    frame = student.to_frame()
    assert frame["step"].tolist() == [1, 2, 3, 4]
    first, last = frame["mass_on_s_student"].iloc[[0, -1]]
    before, after = frame["mass_on_s_teacher"].iloc[[0, -1]]
    mass = f"mass on S {first:.3f} of the teacher's {before:.3f} -> {last:.3f} of {after:.3f}"
    assert repr(student) == f"Student('tiny-llama', 4 steps: {mass})"
    assert "<table" in student._repr_html_()
    assert "4 steps" in student._repr_html_()
    assert repr(Student(student.model, student.tokenizer, "x")) == "Student('x', not trained)"
    assert student.fingerprint == tiny_llama.fingerprint  # the embedding does not train
    scores = evaluate(tiny_llama, student, config=EvaluateConfig(n_prompts=2, perplexity_tokens=50)).scores
    assert scores["student"].kl_harmless > 0
    export(student, tmp_path / "model")
    assert reload_difference(tmp_path / "model") < 1e-4


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_bridge_and_a_pair_teach_as_the_model_does(tiny_llama, direction, tokens, few, tmp_path, lora_rank):
    config = one_call(lora_rank=lora_rank, n_steps=2)
    want = distill(copy_of(tiny_llama), direction, tokens, few, config)
    pair = distill((copy_of(tiny_llama).model, tiny_llama.tokenizer), direction, tokens, few, config)
    assert same(plain_weights(pair), plain_weights(want))
    bridge = to_bridge(tiny_llama)
    student = distill(bridge, direction, tokens, few, config)
    assert plain_weights(student).keys() == plain_weights(want).keys()
    for name, weight in plain_weights(want).items():
        assert_near(plain_weights(student)[name], weight, 1e-3)
    assert_near(
        naive_logits(as_chat(bridge).copy(), batch_of(tiny_llama)),
        naive_logits(tiny_llama, batch_of(tiny_llama)),
        1e-5,
    )
    export(student, tmp_path / "model")
    assert reload_difference(tmp_path / "model") < 1e-4


def test_what_cannot_be_taught_is_one_sentence(tiny_llama, direction, tokens, few, tmp_path):
    with pytest.raises(SafeSteerError, match="needs `align`"):
        distill(tiny_llama, direction, tokens, few, one_call(sharded=True))
    with pytest.raises(SafeSteerError, match="Bridge cannot train"):
        prepare_student(to_bridge(tiny_llama), direction, one_call())
    carrier = prepare_student(copy_of(tiny_llama), direction, one_call(lora_rank=4)).student
    with pytest.raises(SafeSteerError, match="still carries an adapter"):
        export(carrier, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_bridge_is_exported_as_its_plain_model(tiny_qwen2, tmp_path):
    export(to_bridge(tiny_qwen2), tmp_path / "model")
    assert reload_difference(tmp_path / "model") < 1e-4


def test_early_stopping_reads_the_student_in_the_precision_of_its_base(tiny_llama, few):
    """Equal weights show no drift; and the student trains on in float32."""
    base, student = copy_of(tiny_llama), copy_of(tiny_llama)
    cast_weights(base.model, torch.bfloat16)
    before = weights_of(student)
    look = look_at(student, base, few, judge=lambda prompt, answer: False)
    assert look.kl == 0.0
    assert same(before, weights_of(student))
    assert student.model.dtype == torch.float32


class TestWatching:
    """Refusals are counted while training runs."""

    def test_training_stops_where_refusals_are_lost_and_goes_on_with_warn(
        self, tiny_llama, direction, tokens
    ):
        base_answers = set(
            generate(tiny_llama, load_prompts().split("val").across(16).harmful, max_new_tokens=16)
        )
        options = {**SMALL, "watch_every": 2, "lr": 0.3, "splits": ("distill",)}

        def judge(prompt, answer):
            return answer in base_answers

        with pytest.raises(SafeSteerError, match=r"takes refusals away: the base refuses 100% of 16"):
            distill(
                tiny_llama, direction, tokens, config=DistillConfig(**options), training=Training(judge=judge)
            )
        warned = DistillConfig(**options, on_fall="warn")
        with pytest.warns(UserWarning, match="takes refusals away"):
            student = distill(tiny_llama, direction, tokens, config=warned, training=Training(judge=judge))
        assert [record.val_refused is None for record in student.history] == [True, False, True, False]
        assert student.history[1].val_refused == 0

    def test_the_sentence_names_the_way_out_for_the_loss_of_eq_6(self, tiny_llama):
        watch = Watch(("a", "b", "c", "d", "e"), (True,) * 5)
        config = DistillConfig(normalizer="partial")
        with pytest.raises(SafeSteerError, match="q / e"):
            watched_share(watch, tiny_llama, tiny_llama, lambda prompt, answer: False, config)

    def test_a_loss_within_chance_is_no_fall(self, tiny_llama):
        watch = Watch(("a", "b", "c", "d", "e"), (True,) * 4 + (False,))
        assert (
            watched_share(watch, tiny_llama, tiny_llama, lambda prompt, answer: False, DistillConfig()) == 0
        )

    def test_a_set_without_val_is_not_watched(self, tiny_llama):
        assert start_watch(tiny_llama, tiny_llama, [], lambda prompt, answer: True) is None


def test_the_two_sided_teacher_reads_harmless_answers_with_the_direction_ablated(
    run, tiny_llama, direction, few
):
    config = DistillConfig(**SMALL, harmless_teacher="ablated")
    rollouts = sample_rollouts(tiny_llama, StepPrompts(("bad",), ("good", "fine")), config)
    tokens_ = set_of([5])
    two_sided = teacher_hidden(Teacher(tiny_llama, direction, tokens_), rollouts, config)
    one_sided = teacher_hidden(
        Teacher(tiny_llama, direction, tokens_), rollouts, replace(config, harmless_teacher="base")
    )
    with ablate(tiny_llama, direction.vector):
        states = final_hidden(tiny_llama.model, rollouts.batch)
    want = states[:, -rollouts.mask.shape[1] - 1 : -1][rollouts.mask]
    harmless = ~rollouts.harmful[rollouts.mask.nonzero()[:, 0]]
    assert_near(two_sided[harmless], want[harmless])
    assert torch.equal(two_sided[~harmless], one_sided[~harmless])
    assert not torch.allclose(two_sided[harmless], one_sided[harmless], atol=1e-3)
