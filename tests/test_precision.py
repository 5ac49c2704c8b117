"""The precision that the machine chooses, and what bfloat16 changes beside float32."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_pipeline import QUIET, SMALL

from conftest import batch_of, copy_of
from safesteer._errors import SafeSteerError
from safesteer.alignment import align
from safesteer.directions.extraction import prefill_contrast
from safesteer.distillation.loop import Training, distill
from safesteer.distillation.rollouts import Rollouts, StepPrompts, Teacher, sample_rollouts, teacher_hidden
from safesteer.distillation.state import prepare_student
from safesteer.distillation.step import Reading, accumulate_gradient
from safesteer.evaluation.targets import load_target
from safesteer.judges.wording import refuses
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.precision import cast_weights, fast_dtype, in_precision, settled_precision, weight_dtype
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.recipes import Recipe, recipe
from safesteer.run_folder import STAGES, Run
from safesteer.settings import DistillConfig, TokenConfig
from safesteer.steering.direction import Direction, steer
from safesteer.tokens import sampling
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import SafetyToken, TokenSet

WITH, WITHOUT = {"avx512_f": True, "avx512_bf16": True}, {"avx512_f": True, "avx512_bf16": False}
SHORT = SMALL | {"evaluate.sets": "", "evaluate.n_prompts": 2, "evaluate.perplexity_tokens": 64}
AUTO = SHORT | {"dtype": "auto", "distill.precision": "auto"}
REAL = (pytest.mark.model, pytest.mark.slow)
PASSES = {"harmful_per_step": 2, "harmless_per_step": 2, "max_new_tokens": 3, "rollouts": "student"}


@pytest.fixture
def processor(monkeypatch):
    """processor(capabilities): the machine from here on."""
    return lambda listed: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed, raising=False)


@pytest.fixture
def tokens() -> TokenSet:
    return TokenSet(tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in range(40, 48)), {}, {}, 1)


# --- what is chosen ---


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        (WITH, torch.bfloat16),
        ({"amx_tile": True, "amx_bf16": True}, torch.bfloat16),
        (WITHOUT, torch.float32),
        ({"architecture": "aarch64", "neon": True}, torch.float32),
    ],
)
def test_a_processor_with_instructions_for_bfloat16_gets_it(processor, capabilities, fast):
    processor(capabilities)
    assert fast_dtype("cpu") == fast
    assert settled_precision("auto", "cpu") == str(fast).removeprefix("torch.")


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_older_versions_of_torch_are_asked_too(monkeypatch, instructions):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    assert fast_dtype("cpu") == (torch.bfloat16 if instructions else torch.float32)


@pytest.mark.parametrize(("native", "fast"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_emulates_bfloat16_does_not_get_it(monkeypatch, native, fast):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert fast_dtype("cuda:1") == fast


def test_other_devices_get_float32(processor):
    processor(WITH)
    assert fast_dtype("meta") == torch.float32


def test_a_precision_with_a_name_is_that_one_and_a_run_keeps_its_own(processor):
    processor(WITH)
    assert settled_precision("float32", "cpu", "bfloat16") == "float32"
    assert settled_precision("auto", "cpu", "float32") == "float32"


# --- runs ---


@pytest.fixture(scope="module")
def source(tiny_llama, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama.model.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    return str(folder)


def chosen_in(run: Path) -> tuple[str, str]:
    written = json.loads((run / "manifest.json").read_text())["recipe"]
    return written["dtype"], written["distill"]["precision"]


def test_a_run_goes_on_elsewhere_in_the_precision_that_it_began_with(processor, source, tmp_path, capsys):
    """It learns what a run learns that names bfloat16; what it leaves can be opened."""
    processor(WITH)
    chosen, wide = recipe(**AUTO), Console(width=200)
    run = align(source, tmp_path / "auto", chosen, stages=STAGES[:2], console=wide)
    assert (
        "auto is bfloat16 here (dtype, distill.precision): the fast one of this cpu"
        in capsys.readouterr().out
    )
    assert chosen_in(run) == ("bfloat16", "bfloat16")

    processor(WITHOUT)
    align(source, run, chosen, stages=STAGES[:5], console=wide)
    out = capsys.readouterr().out
    assert out.count("auto is bfloat16 here") == 1
    assert "the run began with it, where this cpu would take float32" in out
    named = recipe(**SHORT | {"dtype": "bfloat16", "distill.precision": "bfloat16"})
    want = align(source, tmp_path / "named", named, stages=STAGES[:3], console=QUIET)
    for name in ("direction.safetensors", "tokens.json", "checkpoint.safetensors"):
        assert (run / name).read_bytes() == (want / name).read_bytes()
    assert {w.dtype for w in load_file(run / "model" / "model.safetensors").values()} == {torch.float32}
    opened = Run(run, source, chosen, load_prompts(), refuses, refuses, QUIET)
    assert {weight_dtype(chat.model) for chat in (opened.load_base(), opened.load_student())} == {
        torch.bfloat16
    }
    assert load_target(run, run).keys() == {"base", "student"}
    assert 'dtype = "bfloat16"' in (run / "model" / "README.md").read_text()


def test_the_recipe_says_auto_on_every_machine(processor, source, tmp_path):
    hashes = set()
    for name, machine in (("with", WITH), ("without", WITHOUT)):
        processor(machine)
        run = align(source, tmp_path / name, recipe(**AUTO), stages=(), console=QUIET)
        assert Recipe.load(run / "recipe.toml") == recipe(**AUTO)
        hashes.add(Recipe.load(run / "recipe.toml").hash)
    assert len(hashes) == 1
    assert [chosen_in(tmp_path / name)[0] for name in ("with", "without")] == ["bfloat16", "float32"]
    with pytest.raises(SafeSteerError, match="another recipe"):
        align(source, tmp_path / "with", recipe(**SHORT), stages=(), console=QUIET)


def test_a_run_that_named_its_precision_is_continued_by_auto(processor, source, tmp_path):
    """As runs of the preset two-sided did before it had "auto"."""
    processor(WITHOUT)
    options = {"stages": (), "console": QUIET}
    run = align(source, tmp_path, recipe(**SHORT | {"dtype": "bfloat16"}), **options)
    before = (run / "manifest.json").read_bytes()
    align(source, run, recipe(**AUTO | {"distill.precision": "float32"}), **options)
    assert (run / "manifest.json").read_bytes() == before


def test_an_open_model_keeps_its_precision(processor, tiny_llama, tmp_path, capsys):
    processor(WITH)
    align(tiny_llama, tmp_path, recipe(**AUTO), stages=(), console=Console(width=200))
    assert "auto is bfloat16 here (distill.precision):" in capsys.readouterr().out
    assert weight_dtype(tiny_llama.model) == torch.float32


@pytest.mark.parametrize("name", ["quick", "two-sided"])
def test_our_presets_leave_both_to_the_machine(name):
    assert (recipe(name).dtype, recipe(name).distill.precision) == ("auto", "auto")


def test_training_without_a_run_takes_the_machines_precision(
    processor, tiny_llama, direction, tokens, few, tmp_path
):
    """A checkpoint goes on in its own precision alone, and says which there is here."""
    processor(WITH)
    prompts = replace(few, prompts=tuple(replace(p, split="distill") for p in few.prompts))
    config = DistillConfig(**PASSES, precision="auto", n_steps=1, splits="distill", watch_every=0)
    train = partial(distill, tiny_llama, direction, tokens, prompts, training=Training(tmp_path))
    assert prepare_student(copy_of(tiny_llama), direction, config).config.precision == "bfloat16"
    first = train(config=config).history
    assert train(config=replace(config, precision="bfloat16")).history == first
    processor(WITHOUT)
    with pytest.raises(SafeSteerError, match=r"other settings \(here passes have float32\)"):
        train(config=config)


# --- bfloat16 beside float32: docs/how-to/models.md states these bounds ---

VARIATION, COSINE, SHARED, LOSS = 0.05, 0.999, 0.9, 0.05


def first_token_probabilities(
    chat: ChatModel, prompts: PromptSet, direction: Direction | None
) -> torch.Tensor:
    batch = batch_of(chat, [*prompts.harmful, *prompts.harmless])
    with torch.no_grad(), nullcontext() if direction is None else steer(chat, direction):
        states = final_hidden(chat.model, batch)[:, -1]
    return logits_of(states, *output_head(chat.model)).softmax(-1)


def one_steps_loss(
    chat: ChatModel, teacher: Teacher, rollouts: Rollouts, config: DistillConfig
) -> tuple[float, torch.Tensor]:
    """The loss on answers that are there, and its gradient."""
    state = prepare_student(chat, teacher.direction, config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
        h_teacher = teacher_hidden(teacher, rollouts, config)
    weights = torch.full((len(h_teacher),), 1 / len(h_teacher))
    terms, _ = accumulate_gradient(state, teacher, Reading(rollouts, h_teacher, weights))
    return float(terms.loss), torch.cat([p.grad.flatten() for p in state.trained.values()])


@pytest.fixture(
    params=["tiny_llama", "tiny_qwen2", "tiny_gemma2", pytest.param("smollm2", marks=REAL)], scope="module"
)
def any_chat(request) -> ChatModel:
    """Each tiny model, and the real one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def shifted(any_chat, few) -> Direction:
    """A direction of the model that moves its outputs a lot."""
    candidates, layer = prefill_contrast(any_chat, few), int(0.6 * any_chat.n_layers)
    found = candidates.direction(any_chat, candidates.positions[-1], layer, prompts=few)
    return replace(found, coeff=2.0)


def test_first_tokens_have_nearly_the_same_probabilities(any_chat, few, shifted):
    for direction in (None, shifted):
        wide = first_token_probabilities(any_chat, few, direction)
        with in_precision(any_chat.model, torch.bfloat16):
            narrow = first_token_probabilities(any_chat, few, direction)
        variation = (wide - narrow).abs().sum(-1) / 2
        assert 0 < float(variation.max()) < VARIATION


def test_directions_are_nearly_parallel(any_chat, few):
    wide = prefill_contrast(any_chat, few).vectors
    with in_precision(any_chat.model, torch.bfloat16):
        narrow = prefill_contrast(any_chat, few).vectors
    assert not torch.equal(wide, narrow)
    assert float(torch.cosine_similarity(wide.double(), narrow.double(), dim=-1).min()) > COSINE


def test_the_same_answers_vote_for_nearly_the_same_tokens(any_chat, few, shifted, monkeypatch):
    answers, sample = [], sampling.generate_ids
    config = TokenConfig(k=30, horizon=3, n_samples=4)

    def recorded(*args, **options):
        answers.append(sample(*args, **options))
        return answers[-1]

    monkeypatch.setattr(sampling, "generate_ids", recorded)
    wide = select_tokens(any_chat, shifted, few.harmless, config)
    monkeypatch.setattr(sampling, "generate_ids", lambda *args, **options: answers.pop(0))
    with in_precision(any_chat.model, torch.bfloat16):
        narrow = select_tokens(any_chat, shifted, few.harmless, config)
    both = [{token.id for token in selected.tokens} for selected in (wide, narrow)]
    assert len(both[0] & both[1]) >= SHARED * 30


def test_a_step_has_nearly_the_same_loss(any_chat, few, shifted):
    """The gradient points where it did, too."""
    selected = select_tokens(any_chat, shifted, few.harmless[:2], TokenConfig(k=30, horizon=3))
    config = DistillConfig(**PASSES)
    drawn = StepPrompts.of(few.harmful, few.harmless, config, 0)
    rollouts = sample_rollouts(any_chat, drawn, config)
    wide, slope = one_steps_loss(any_chat.copy(), Teacher(any_chat, shifted, selected), rollouts, config)
    base, config = any_chat.copy(), replace(config, precision="bfloat16")
    cast_weights(base.model, torch.bfloat16)
    narrow, other = one_steps_loss(any_chat.copy(), Teacher(base, shifted, selected), rollouts, config)
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=LOSS)
    assert float(torch.cosine_similarity(slope.double(), other.double(), dim=0)) > 0.99
