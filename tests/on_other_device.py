"""What `test_other_device.py` runs in a process of its own: the package on a second device, and on the CPU.

One copy of a tiny model is on the CPU and one on the device of `other_device.py`; both must give the same.
Left out: passes in bfloat16 by autocast, whose kernels torch has for real devices only.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from other_device import MixedDevices, other_device
from rich.console import Console

from conftest import PROMPTS, assert_near, copy_of
from safesteer import alignment
from safesteer._files import json_lines, read_json
from safesteer.directions.extraction import logistic_probe, mean_difference, pca_difference, system_contrast
from safesteer.directions.inspection import component_contributions, cosines, logit_lens
from safesteer.directions.reader_fitting import fit_reader
from safesteer.directions.shifts import representation_shift
from safesteer.distillation.loop import distill, training_steps
from safesteer.distillation.rollouts import Sampled, Teacher
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.curves import refusal_margins
from safesteer.exporting import reload_difference
from safesteer.judges.chat_judge import ChatJudge
from safesteer.judges.wording import refuses
from safesteer.live.reading import Subject, View, read_prompt, stream_answers
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import as_chat
from safesteer.models.generation import generate
from safesteer.models.loading import load_model
from safesteer.models.precision import in_precision
from safesteer.prompts.prompt_set import PromptSet
from safesteer.recipes import recipe
from safesteer.run_folder import Run
from safesteer.settings import DistillConfig, TokenConfig
from safesteer.steering.direction import Direction, steer
from safesteer.steering.interventions import ablate, ablate_placebo, add, clamp, gate
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenSet

QUIET = Console(quiet=True)
SMALL = recipe(
    **{
        "direction.extraction": "prefill",
        "direction.n_train": 2,
        "direction.n_val": 2,
        "direction.n_compare_prompts": 2,
        "tokens.k": 8,
        "tokens.n_samples": 2,
        "tokens.horizon": 3,
        "tokens.min_steered_prob": 1e-4,
        "distill.n_steps": 2,
        "distill.harmful_per_step": 2,
        "distill.harmless_per_step": 2,
        "distill.max_new_tokens": 3,
        "distill.watch_every": 1,
        "distill.n_watched": 1,
        "distill.on_fall": "warn",
        "distill.precision": "float32",
        "distill.lr": 1e-3,
        "evaluate.n_prompts": 2,
        "evaluate.max_new_tokens": 3,
        "evaluate.sets": ("own-short",),
        "evaluate.n_set_prompts": 2,
        "evaluate.perplexity_tokens": 60,
        "explain.n_prompts": 2,
        "explain.n_harmful": 2,
        "explain.n_samples": 1,
        "explain.max_tokens": 3,
        "explain.n_traces": 1,
        "explain.n_sets": 2,
        "explain.n_splits": 2,
    }
)
SECONDS = {"rollout_s", "teacher_s", "student_s"}


@pytest.fixture(scope="module")
def prompts(pairs) -> PromptSet:
    splits = (pairs.split(name).first(3) for name in ("train", "val", "distill", "test"))
    return PromptSet(tuple(prompt for split in splits for prompt in split.prompts))


@pytest.fixture(scope="module", autouse=True)
def device():
    with other_device() as name:
        yield name


@pytest.fixture(scope="module")
def both(tiny_llama, device):
    """The model on the CPU and on the device."""
    moved = copy_of(tiny_llama)
    moved.model.to(device)
    return tiny_llama, moved


@pytest.fixture(scope="module")
def runs(both, prompts, tmp_path_factory):
    """The main path of both, each in its folder."""
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        # It starts a process of its own, which has no second device.
        patch.setattr(alignment, "check_reload", lambda folder, **options: reload_difference(folder))
        for chat in both:
            out = tmp_path_factory.mktemp("runs") / chat.device.type
            folders.append(alignment.align(chat, out, SMALL, prompts=prompts, console=QUIET))
    return folders


@pytest.fixture(scope="module")
def tokens(tiny_llama, direction, few):
    config = TokenConfig(k=8, horizon=3, n_samples=2, min_steered_prob=0.0)
    return select_tokens(tiny_llama, direction, few.harmless[:2], config)


@pytest.fixture(scope="module")
def readers(both, few):
    return [fit_reader(chat, few, n_folds=2) for chat in both]


def test_the_device_refuses_tensors_of_the_cpu(device):
    """Otherwise nothing here could fail."""
    x, y, at = torch.zeros(3, device=device), torch.ones(3), torch.tensor([0, 2])
    mixes: list[Callable[[], object]] = [
        lambda: x + y,
        lambda: torch.cat([x, y]),
        lambda: x.add_(y),
        lambda: y.add_(x),
        lambda: torch.where(y > 0, x, x),
        lambda: x.index_put((at,), y[:2]),
        lambda: y[at.to(device)],
        lambda: torch.isin(x, y),
        lambda: torch.nn.functional.linear(x, torch.ones(2, 3)),
    ]
    for mix in mixes:
        with pytest.raises(MixedDevices):
            mix()
    with pytest.raises((RuntimeError, TypeError)):
        x.numpy()
    assert (x + torch.tensor(2.0)).tolist() == [2.0] * 3  # what CUDA allows
    assert x[at].device.type == device
    assert np.array_equal((x.copy_(y) * 2).cpu().numpy(), [2, 2, 2])
    made = torch.arange(3, device=device), torch.tensor(1, device=device)
    assert {t.device.type for t in (x, *made)} == {device}


def test_a_backward_pass_refuses_them_too():
    class Forgets(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * torch.ones(3)

    with pytest.raises(MixedDevices), other_device() as name:
        Forgets.apply(torch.zeros(3, device=name, requires_grad=True)).sum().backward()


def numbers(value: object) -> list[float]:
    """All numbers of a JSON value but the seconds that something took."""
    if isinstance(value, dict):
        return [x for k, v in value.items() if k not in SECONDS for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [float(value)] if isinstance(value, int | float) else []


def measured(path) -> object:
    if path.suffix == ".csv":
        return pd.read_csv(path).select_dtypes("number").to_numpy()
    return numbers(json_lines(path) if path.suffix == ".jsonl" else read_json(path))


def test_the_whole_path(runs):
    names = [{path.name for path in run.iterdir()} for run in runs]
    assert names[0] == names[1]
    assert {"reader_scores.csv", "shift.csv", "held_out.csv", "report.html"} <= names[0]
    for name in sorted(names[0] - {"manifest.json"}):
        if name.endswith((".csv", ".json", ".jsonl")):
            want, got = (measured(run / name) for run in runs)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3, err_msg=name)
    for name in ("answers.jsonl", "held_out_answers.jsonl"):
        assert (runs[0] / name).read_text() == (runs[1] / name).read_text()
    vectors = [Direction.load(run / "direction.safetensors").vector for run in runs]
    assert_near(vectors[1], vectors[0])
    students = [load_model(str(run / "model"), device="cpu").model.state_dict() for run in runs]
    for name, weight in students[0].items():
        assert_near(students[1][name], weight)


def test_a_run_is_loaded_where_its_base_is(both, runs, prompts):
    for chat, out in zip(both, runs, strict=True):
        before = (out / "manifest.json").read_text()
        alignment.align(chat, out, SMALL, prompts=prompts, console=QUIET)
        assert (out / "manifest.json").read_text() == before
        run = Run(out, chat, SMALL, prompts, refuses, refuses, QUIET)
        assert run.load_student().device == run.load_base().device == chat.device


def test_the_live_lens_on_a_run(both, runs):
    read = []
    for chat, out in zip(both, runs, strict=True):
        parts = Direction.load(out / "direction.safetensors", chat), TokenSet.load(out / "tokens.json")
        student = load_model(str(out / "model"), device=str(chat.device))
        subject = Subject(chat, *parts, student, HarmfulnessReader.load(out / "reader.safetensors", chat))
        prompt = read_prompt(subject, PROMPTS[0])
        view = View(PROMPTS[0], layer=1, coeff=2.0, intervention="gate", max_new_tokens=3)
        steps = [[t and (t.id, t.kl, t.p_student) for t in step] for step in stream_answers(subject, view)]
        read.append(numbers([prompt.projections.tolist(), prompt.mass_on_s.tolist(), prompt.score, steps]))
    assert_near(read[1], read[0], 1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpointing": True, "train_layers": "all", "support": "topk", "n_topk": 5},
        {"harmless_teacher": "ablated", "anchor_support": "full", "rollouts": "student"},
        {"teacher": "prompt", "support": "full", "micro_batch": 1},
        {"lora_rank": 2, "divergence": "jsd"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_each_way_to_train(both, direction, tokens, prompts, settings):
    if "lora_rank" in settings:
        pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")
    config = replace(SMALL.distill, n_steps=1, watch_every=0, **settings)
    losses = []
    for chat in both:
        student = distill(copy_of(chat), direction, tokens, prompts, config)
        losses.append([(record.loss, record.kl_off_s, record.grad_norm) for record in student.history])
    assert_near(losses[1], losses[0])


def test_a_base_in_bfloat16_and_an_external_sampler(both, direction, tokens, prompts):
    def sampler(texts, n_samples, max_new_tokens, keys):
        return [[Sampled((7,) * max_new_tokens, (-1.0,) * max_new_tokens)] * n_samples for _ in texts]

    config: DistillConfig = replace(SMALL.distill, n_steps=1)
    records = []
    for chat in both:
        base = copy_of(chat)
        with in_precision(base.model, torch.bfloat16):
            state = prepare_student(copy_of(chat), direction, config)
            records += training_steps(state, Teacher(base, direction, tokens), prompts, sampler=sampler)
    assert records[0].sampler_gap > 0
    want, got = ((r.loss, r.sampler_gap, r.grad_norm) for r in records)
    assert_near(got, want, 1e-2)


STEERED = {
    "add": lambda chat, d, reader: steer(chat, d, 4.0, scope="answer"),
    "clamp": lambda chat, d, reader: steer(chat, replace(d, operation="clamp"), 4.0, scope="last"),
    "ablate": lambda chat, d, reader: steer(chat, replace(d, operation="ablate"), scope="prompt"),
    "gated": lambda chat, d, reader: steer(chat, d, 4.0, gate=reader, closed="ablate"),
    "vector of one's own": lambda chat, d, reader: add(chat, d.vector, 1, 4.0),
    "clamped": lambda chat, d, reader: clamp(chat, d.vector, 1, 4.0),
    "ablated": lambda chat, d, reader: ablate(chat, d.vector),
    "placebo": lambda chat, d, reader: ablate_placebo(chat, d.vector),
    "gate": lambda chat, d, reader: gate(chat, d.vector, 2, 0.0, 4.0, gate_layer=1),
}


@pytest.mark.parametrize("way", STEERED)
def test_each_way_to_steer(both, readers, direction, way):
    answers = []
    for chat in both:
        with STEERED[way](chat, direction, readers[0]):
            answers.append(generate(chat, PROMPTS, max_new_tokens=3, temperature=1.0))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("extract", [mean_difference, system_contrast, pca_difference, logistic_probe])
def test_each_extraction(both, few, extract):
    want, got = (extract(chat, few.first(2)) for chat in both)
    assert got.vectors.device.type == "cpu"
    assert_near(got.vectors, want.vectors, 1e-3)
    assert_near(cosines(got).to_numpy(), cosines(want).to_numpy(), 1e-3)


def test_what_is_read_of_a_model(both, readers, direction, few):
    """Readers, parts of a direction, TransformerLens, a judge and the fingerprint."""
    assert_near(readers[1].weight, readers[0].weight, 1e-3)
    values = []
    for chat in both:
        bridge = as_chat(to_bridge(chat))
        # The tiny tokenizer has no "Yes" and no "No".
        judge = ChatJudge(chat, refuses_rubric="{prompt}{answer}", yes=("Write",), no=("how",), min_mass=0.0)
        assert bridge.device == chat.device
        assert generate(bridge, PROMPTS[:1], max_new_tokens=2) == generate(
            chat, PROMPTS[:1], max_new_tokens=2
        )
        values.append(
            {
                "reader": readers[0].scores(chat, PROMPTS),
                "lens": logit_lens(bridge, direction.vector[None], k=3).logit,
                "parts": component_contributions(chat, direction, few.first(2)).difference,
                "margins": refusal_margins(chat, torch.tensor([5, 6]), PROMPTS),
                "shift": representation_shift({"a": chat, "b": chat}, PROMPTS).select_dtypes("number"),
                "judge": [verdict.p_refuses for verdict in judge.verdicts(PROMPTS, PROMPTS)],
            }
        )
    for name, want in values[0].items():
        assert_near(np.asarray(values[1][name], float), np.asarray(want, float))
    assert both[0].fingerprint == both[1].fingerprint
