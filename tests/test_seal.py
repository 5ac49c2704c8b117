"""The seal: its gradient is the one that it says, it holds what it says, and it changes nothing else."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from test_processes import launch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

import safesteer as ss
from conftest import copy_of, unchecked
from safesteer._errors import SafeSteerError
from safesteer.distillation import seal as seal_module
from safesteer.distillation.seal import N_TOKENS, divergence_from, hold
from safesteer.models.templates import ids_of, render
from safesteer.tokens.token_set import SafetyToken, TokenSet

TOKENS = TokenSet(tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in range(40, 120, 5)), {}, {}, 1)
ARGUMENTS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "max_steps": 1,
}
PLAIN_STEPS = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}  # weights move by the gradient


@pytest.fixture(scope="module")
def four(pairs) -> ss.PromptSet:
    """Four pairs of train, which every pull reads, and four of val."""
    return ss.PromptSet(tuple(p for name in ("train", "val") for p in pairs.split(name).first(4).prompts))


def rows_to_train_on(n: int = 32) -> list[dict]:
    draw = random.Random(0)
    ids = [[draw.randrange(60, 300) for _ in range(9)] for _ in range(n)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(chat, folder, *seals, model=None, resume=None, **changes) -> Trainer:
    """Train a copy of a model, or `model` itself."""
    model = copy_of(chat).model.requires_grad_(True) if model is None else model
    arguments = TrainingArguments(str(folder), **{**ARGUMENTS, **changes})
    trainer = Trainer(model, arguments, train_dataset=rows_to_train_on(), callbacks=list(seals))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def last(trainer: Trainer, name: str) -> float:
    return [row[name] for row in trainer.state.log_history if name in row][-1]


def moved(chat):
    """A copy that has left the model which is held, with gradients on."""
    other, generator = copy_of(chat), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    other.model.requires_grad_(True)
    return other


def reference(base, chat, prompts) -> torch.Tensor:
    """KL(q || p) prompt by prompt, from whole logits of single texts in float64."""
    terms, s = [], TOKENS.ids
    for prompt in [*prompts.harmful, *prompts.harmless]:
        ids = ids_of(base.tokenizer, render(base.tokenizer, prompt))
        for _ in range(N_TOKENS):
            with torch.no_grad():
                q = base.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            p = chat.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            q, p = (torch.cat([x[s], 1 - x[s].sum(0, keepdim=True)]) for x in (q, p))
            terms.append((q * (q / p).log()).sum())
            with torch.no_grad():
                ids = [*ids, int(base.model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] in base.eos_ids:
                break
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gemma2"])
def test_the_divergence_is_that_of_whole_logits(name, request, four):
    base = request.getfixturevalue(name)
    held, student = hold(base, four.split("train"), TOKENS), moved(base)
    rows = list(range(8))
    got, want = divergence_from(held, student, rows), reference(base, student, four.split("train"))
    assert want > 0.01
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    assert divergence_from(held, base, rows).abs() < 1e-6
    # A part of the rows, in an order of its own, is compared with what was stored of these.
    one = ss.PromptSet(tuple(p for p in four.split("train").prompts if p.text == held.prompts[5]))
    got, want = divergence_from(held, student, [5]), reference(base, student, one)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def test_a_step_adds_the_gradient_of_weight_times_the_divergence(tiny_llama, four, tmp_path):
    student, weight = moved(tiny_llama), 3.0
    want = torch.autograd.grad(
        reference(tiny_llama, student, four.split("train")), list(student.model.parameters())
    )
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=weight, look_every=0)
    without, with_seal = (
        weights(trained(student, tmp_path, *seals, **PLAIN_STEPS)) for seals in ((), (seal,))
    )
    names = [name for name, _ in student.model.named_parameters()]
    largest = max(float(g.abs().max()) for g in want)
    for name, gradient in zip(names, want, strict=True):
        got = (without[name] - with_seal[name]) / (PLAIN_STEPS["learning_rate"] * weight)
        assert float((got - gradient).abs().max()) < 1e-4 * max(largest, 1.0), name
    assert any(not torch.equal(without[name], with_seal[name]) for name in names)


def with_dropout(chat):
    """A copy whose training draws random numbers."""
    other = copy_of(chat)
    for module in other.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return other


def test_without_weight_the_training_is_that_without_a_seal(tiny_llama, four, tmp_path):
    """To the last bit, with dropout, looks and accumulation."""
    chat = with_dropout(tiny_llama)
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=0.0, look_every=2)
    settings = {"max_steps": 4, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    without, watched = (trained(chat, tmp_path, *seals, **settings) for seals in ((), (seal,)))
    both = zip(weights(without).values(), weights(watched).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (without, watched)]
    assert losses[0] == losses[1]
    assert last(watched, "seal_divergence") > 1e-4
    other = trained(tiny_llama, tmp_path, **settings)
    assert not torch.equal(*(weights(t)["model.norm.weight"] for t in (without, other)))  # dropout was on


def test_a_sealed_model_stays_nearer_on_s_and_learns_all_the_same(tiny_llama, four, tmp_path):
    runs = {}
    for weight in (0.0, 20.0):
        seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=weight, look_every=0)
        runs[weight] = trained(tiny_llama, tmp_path, seal, max_steps=30, learning_rate=1e-2)
    apart = {weight: last(trainer, "seal_divergence") for weight, trainer in runs.items()}
    assert apart[0] > 0.03
    assert apart[20] < apart[0] / 8
    for trainer in runs.values():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses[-1] < losses[0] - 0.3


def test_a_seal_holds_an_adapter_on_the_model(tiny_llama, four, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    apart, before = {}, {name: p.clone() for name, p in tiny_llama.model.named_parameters()}
    for weight in (0.0, 20.0):
        seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=weight, look_every=20)
        config = peft.LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(copy_of(tiny_llama).model, config)
        trainer = trained(None, tmp_path, seal, model=model, max_steps=40, learning_rate=1e-2)
        pulls = [row["seal_divergence"] for row in trainer.state.log_history if "seal_divergence" in row]
        apart[weight] = sum(pulls[-10:]) / 10
        assert {0, 20} <= {row["step"] for row in trainer.state.log_history if "seal_val_refused" in row}
        plain = dict(model.get_base_model().named_parameters())
        assert all(
            torch.equal(plain.get(name, plain.get(name.replace(".weight", ".base_layer.weight"))), p)
            for name, p in before.items()
        )
    assert apart[0] > 0.005
    assert apart[20] < 0.6 * apart[0]


def test_accumulated_batches_have_one_pull(tiny_llama, four, tmp_path):
    student, seen = moved(tiny_llama), []
    for size, n in ((4, 1), (2, 2), (1, 4)):
        seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=3.0, look_every=0)
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": n}
        seen.append(weights(trained(student, tmp_path, seal, **PLAIN_STEPS, **changes)))
    for other in seen[1:]:
        for name, p in seen[0].items():
            torch.testing.assert_close(other[name], p, rtol=1e-4, atol=1e-5)


def test_a_pull_is_the_same_where_activations_are_recomputed(tiny_llama, four, tmp_path):
    student, ends = moved(tiny_llama), []
    for recomputed in (False, True):
        seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=3.0, look_every=1)
        settings = {**PLAIN_STEPS, "gradient_checkpointing": recomputed}
        ends.append(weights(trained(student, tmp_path, seal, **settings)))
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=1e-4, atol=1e-5)


def test_what_is_clipped_is_the_sum(tiny_llama, four, tmp_path):
    """The norm of the whole step is the limit, and the logged norm that of both gradients."""
    student = moved(tiny_llama)
    settings = {**PLAIN_STEPS, "max_grad_norm": 0.01}
    seals = [
        ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=w, look_every=0) for w in (0.0, 50.0)
    ]
    plain, held = (trained(student, tmp_path, seal, **settings) for seal in seals)
    start = dict(student.model.named_parameters())
    step = [torch.linalg.vector_norm(p - start[n]) for n, p in weights(held).items()]
    assert float(torch.stack(step).norm().detach()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert last(held, "grad_norm") > 1.5 * last(plain, "grad_norm")


def test_the_log_has_the_divergence_and_the_looks(tiny_llama, four, tmp_path):
    asked_of = []

    def judge(prompt: str, answer: str) -> bool:
        asked_of.append(prompt)
        return prompt in four.split("val").harmful[:3]

    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, every=2, look_every=3, judge=judge)
    trainer = trained(tiny_llama, tmp_path, seal, max_steps=6, logging_steps=2, learning_rate=1e-2)
    history = trainer.state.log_history
    looks = [row for row in history if "seal_val_refused" in row]
    assert [row["step"] for row in looks] == [0, 3, 6]
    assert {row["seal_val_refused"] for row in looks} == {0.75}
    assert {row["seal_val_over_refused"] for row in looks} == {0.0}
    assert set(asked_of) == set(four.split("val").harmful + four.split("val").harmless)
    # A pull at the start of the steps 1, 3 and 5; a look brings a log of its own.
    pulls = {row["step"]: row["seal_divergence"] for row in history if "seal_divergence" in row}
    assert set(pulls) == {2, 3, 6}
    assert pulls[2] < 1e-5 < pulls[3] < pulls[6]
    assert not any("seal_divergence" in row for row in history if "train_loss" in row)


def test_a_tracker_hears_of_a_seal_that_comes_first(tiny_llama, four, tmp_path):
    heard = []

    class Tracker(seal_module.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, look_every=0)
    model = copy_of(tiny_llama).model.requires_grad_(True)
    arguments = TrainingArguments(str(tmp_path), **ARGUMENTS)
    trainer = Trainer(model, arguments, train_dataset=rows_to_train_on(), callbacks=[Tracker(), seal])
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(ss.SafetySeal))
    trainer.train()
    assert "seal_divergence" in heard[0]


def test_a_training_goes_on_as_if_it_had_not_stopped(tiny_llama, pairs, tmp_path):
    """With as many prompts as are drawn from, so that another draw would show."""
    settings = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}

    def seal():
        few = ss.PromptSet(tuple(p for n in ("train", "val") for p in pairs.split(n).first(12).prompts))
        return ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=few, weight=5.0, look_every=0)

    whole = weights(trained(tiny_llama, tmp_path / "whole", seal(), **settings))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = trained(tiny_llama, tmp_path / "again", seal(), resume=str(checkpoint), **settings)
    for name, p in weights(again).items():
        torch.testing.assert_close(p, whole[name], rtol=1e-5, atol=1e-6)


def begin_step(seal, model, optimizer=None, **changes) -> None:
    arguments = TrainingArguments("unused", **{**ARGUMENTS, **changes})
    seal.on_step_begin(arguments, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)


def test_a_scaled_loss_scales_the_pull(tiny_llama, four):
    """Of passes in float16: what the Trainer unscales later is unscaled with it."""
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, look_every=0)
    gradients = []
    for scale in (None, 8.0):
        student = moved(tiny_llama).model
        scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
        plain = torch.optim.SGD(student.parameters(), lr=1.0)
        Accelerator(cpu=True)  # which the optimizer asks
        begin_step(seal, student, AcceleratedOptimizer(plain, device_placement=False, scaler=scaler))
        gradients.append([p.grad for p in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(8 * one, other)


def test_mixed_precision_is_that_of_the_trainer(tiny_llama, four):
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, look_every=0)
    student, dtypes = moved(tiny_llama).model, set()
    inner = student.model.layers[0].mlp.up_proj
    inner.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    begin_step(seal, student, bf16=True)
    assert dtypes == {torch.bfloat16}
    assert {p.grad.dtype for p in student.parameters()} == {torch.float32}


def test_every_module_has_its_mode_again(tiny_llama, four):
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, look_every=0)
    student = moved(tiny_llama).model.train()
    student.model.layers[1].eval()
    before = [module.training for module in student.modules()]
    begin_step(seal, student)
    assert [module.training for module in student.modules()] == before
    assert {True, False} == set(before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight": -1.0}, "weight of 0 or more"),
        ({"weight": math.nan}, "weight of 0 or more"),
        ({"every": 0}, "every of 1 or more"),
        ({"look_every": -1}, "look_every of 0 or more"),
        ({"tokens": TokenSet((), {}, {}, 1)}, "at least one token"),
        (
            {"tokens": replace(TOKENS, tokens=(replace(TOKENS.tokens[0], id=400),))},
            "has 400 tokens: select S",
        ),
    ],
)
def test_what_a_seal_cannot_be_is_one_sentence(changes, sentence, tiny_llama, four):
    with pytest.raises(SafeSteerError, match=sentence):
        ss.SafetySeal(tiny_llama, **{"tokens": TOKENS, "prompts": four, **changes})


def test_arguments_of_another_kind_are_one_sentence(tiny_llama, four):
    for changes, sentence in (
        ({"tokens": "run/tokens.json"}, "A TokenSet belongs here, and a str"),
        ({"prompts": ["Hi"]}, "A PromptSet belongs here, and a list"),
    ):
        with unchecked(), pytest.raises(SafeSteerError, match=sentence):
            ss.SafetySeal(tiny_llama, **{"tokens": TOKENS, "prompts": four, **changes})


def test_what_it_needs_is_one_sentence(tiny_llama, four, pairs):
    with pytest.raises(SafeSteerError, match="has no tokenizer here"):
        ss.SafetySeal(tiny_llama.model, tokens=TOKENS, prompts=four)
    with pytest.raises(SafeSteerError, match="has no split 'val'"):
        ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=pairs.split("train"))
    plain = ss.SafetySeal(tiny_llama.model, tiny_llama.tokenizer, tokens=TOKENS, prompts=four)
    assert repr(plain) == "SafetySeal(16 tokens on 8 prompts, weight 1, every step)"
    damaged = copy_of(tiny_llama)
    with torch.no_grad():
        damaged.model.model.norm.weight[0] = torch.nan
    with pytest.raises(SafeSteerError, match="are not finite"):
        ss.SafetySeal(damaged, tokens=TOKENS, prompts=four)


def test_what_cannot_be_sealed_ends_in_one_sentence(tiny_llama, four, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def seal():
        return ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, look_every=0)

    on_head = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    before_prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for config, sentence in ((on_head, "leave the head out"), (before_prompts, "Nothing that trains")):
        model = peft.get_peft_model(copy_of(tiny_llama).model, config)
        with pytest.raises(SafeSteerError, match=sentence):
            trained(None, tmp_path, seal(), model=model)
    damaged = moved(tiny_llama).model
    with torch.no_grad():
        damaged.model.norm.weight[0] = torch.nan
    with pytest.raises(SafeSteerError, match="no numbers at step 1"):
        begin_step(seal(), damaged)
    spread = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(seal_module, "AcceleratorState", lambda: spread)
    with pytest.raises(SafeSteerError, match="spread over processes"):
        trained(tiny_llama, tmp_path, seal())


def test_trl_takes_it(tiny_llama, four, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    turns = [
        [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": f"{n}!"}]
        for n in range(8)
    ]
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, look_every=2)
    trainer = trl.SFTTrainer(
        copy_of(tiny_llama).model.requires_grad_(True),
        args=trl.SFTConfig(str(tmp_path), **{**ARGUMENTS, "max_steps": 2, "learning_rate": 1e-2}),
        train_dataset=datasets.Dataset.from_list([{"messages": m} for m in turns]),
        processing_class=tiny_llama.tokenizer,
        callbacks=[seal],
    )
    trainer.train()
    assert last(trainer, "seal_divergence") > 1e-6
    assert {0, 2} <= {row["step"] for row in trainer.state.log_history if "seal_val_refused" in row}


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers import Trainer, TrainingArguments
import safesteer as ss

folder, settings, rows = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
base, student = (ss.load_model(str(folder / name), device="cpu") for name in ("base", "student"))
tokens, prompts = ss.TokenSet.load(folder / "tokens.json"), ss.load_prompts()
four = ss.PromptSet(tuple(p for n in ("train", "val") for p in prompts.split(n).first(4).prompts))
seal = ss.SafetySeal(base, tokens=tokens, prompts=four, weight=3.0, look_every=1)
arguments = TrainingArguments(str(folder / "out"), **settings)
model = student.model.requires_grad_(True)
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[seal])
trainer.train()
assert arguments.world_size == 2
torch.save(dict(model.named_parameters()), folder / f"end{arguments.process_index}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tiny_llama, four, tmp_path):
    student = moved(tiny_llama)
    for name, chat in {"base": tiny_llama, "student": student}.items():
        chat.model.save_pretrained(tmp_path / name)
        chat.tokenizer.save_pretrained(tmp_path / name)
    TOKENS.save(tmp_path / "tokens.json")
    settings = {**ARGUMENTS, **PLAIN_STEPS, "max_steps": 2, "max_grad_norm": 1.0}
    seal = ss.SafetySeal(tiny_llama, tokens=TOKENS, prompts=four, weight=3.0, look_every=0)
    want = weights(trained(student, tmp_path / "alone", seal, **settings))
    (tmp_path / "train.py").write_text(SCRIPT)
    shared = {**settings, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    words = [str(tmp_path), json.dumps(shared), json.dumps(rows_to_train_on())]
    launch([str(tmp_path / "train.py"), *words])
    got = [torch.load(tmp_path / f"end{rank}.pt") for rank in (0, 1)]
    for name, p in want.items():
        assert torch.equal(got[0][name], got[1][name])
        torch.testing.assert_close(got[0][name].detach(), p, rtol=1e-4, atol=1e-5)


def test_the_name_loads_nothing_before_it_is_used():
    code = "import safesteer, sys; assert 'SafetySeal' in dir(safesteer)"
    code += "; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
