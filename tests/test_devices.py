"""A model whose blocks lie apart, on the CPU and on the disk, does all that a model on one device does."""

import json
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from conformance.families import build
from rich.console import Console
from safetensors.torch import load_file
from test_pipeline import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import assert_near, batch_of, copy_of, n_hooks, random_vector
from safesteer._errors import SafeSteerError
from safesteer._files import json_lines
from safesteer.alignment import align
from safesteer.attribution.explanation import explain
from safesteer.directions.finding import find_direction
from safesteer.directions.inspection import component_contributions, logit_lens
from safesteer.directions.reader_fitting import fit_reader
from safesteer.directions.shifts import shift_along
from safesteer.distillation.loop import distill, training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.scores import evaluate
from safesteer.models import placement
from safesteer.models.adapter import trained_weights
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import as_chat
from safesteer.models.forward import last_logits
from safesteer.models.generation import generate
from safesteer.models.hashing import weights_hash
from safesteer.models.loading import load_model
from safesteer.models.parts import blocks
from safesteer.models.precision import in_precision
from safesteer.recipes import recipe
from safesteer.settings import DirectionConfig, DistillConfig, EvaluateConfig, ExplainConfig, TokenConfig
from safesteer.steering.direction import Direction, steer
from safesteer.steering.interventions import ablate, ablate_placebo, gate
from safesteer.tokens.selection import select_tokens

QUIET = Console(quiet=True)
APART = {"": "disk", "model.layers.1": "cpu"}


def saved(chat, folder):
    chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return saved(tiny_llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def pair(chat, tmp_path):
    """A model of each family, on one device and apart."""
    name = saved(chat, tmp_path / "model")
    return load_model(name, device="cpu"), load_model(name, device_map=APART)


# --- where weights lie ---


def test_blocks_lie_where_the_map_says_and_all_else_on_the_first_device(pair):
    plain, apart = pair
    for layer, block in enumerate(blocks(apart.model)):
        assert {p.is_meta for p in block.parameters()} == {layer != 1}
    outside = [p for n, p in apart.model.named_parameters() if ".layers." not in n]
    assert {str(p.device) for p in outside} == {str(apart.device)} == {"cpu"}
    assert apart.fingerprint == plain.fingerprint
    assert weights_hash(apart.model) == weights_hash(plain.model)
    here, there = plain.check(), apart.check()
    assert there.drop(columns="deviation").equals(here.drop(columns="deviation"))
    # Sums of one product depend on where its numbers lie in memory, by the last bit.
    assert (there.deviation - here.deviation).abs().max() < 1e-5


def test_steering_is_that_of_one_device_and_leaves_nothing_behind(pair):
    vector, seen = random_vector(32, seed=3), []
    direction = Direction(vector=vector, layer=1, position="-1", extraction="given", coeff=2.0)
    for chat in pair:
        before, logits = n_hooks(chat.model), []
        steered = (
            steer(chat, direction),
            steer(chat, replace(direction, operation="clamp")),
            ablate(chat, vector),
            ablate(chat, vector, scope="answer"),
            ablate_placebo(chat, vector),
            gate(chat, vector, layer=1, threshold=0.0, gate_layer=0, coeff=2.0),
        )
        for intervention in steered:
            with intervention:
                logits.append(last_logits(chat, batch_of(chat)))
        with steer(chat, direction):
            answers = generate(chat, ["Hello", "How are tides made?"], max_new_tokens=20)
        seen.append((torch.stack(logits), answers))
        assert n_hooks(chat.model) == before
    assert_near(seen[1][0], seen[0][0], 1e-5)
    assert seen[1][1] == seen[0][1]


def test_stages_give_what_one_device_gives(pair, few):
    extraction = "instruction" if pair[0].config.model_type == "qwen2" else "prefill"
    found, selected, scored, explained = [], [], [], []
    for chat in pair:
        settings = DirectionConfig(
            extraction=extraction, n_train=4, n_val=2, coeff=2.0, max_kl=99, min_steering=-99
        )
        try:
            direction = find_direction(chat, config=settings)
        except SafeSteerError as error:  # no prompt passes the filter: on both, in the same words
            found.append(str(error))
            direction = Direction(
                vector=random_vector(32), layer=1, position="-1", extraction="given", coeff=2.0
            )
        else:
            found.append(direction.sweep.table)
        config = TokenConfig(k=8, horizon=3, n_samples=2, min_steered_prob=1e-4)
        tokens = select_tokens(chat, direction, few.harmless, config)
        selected.append(tokens.to_frame()[["id", "votes", "mean_delta", "p_base", "p_steered"]])
        evaluation = evaluate(
            chat,
            direction=direction,
            config=EvaluateConfig(n_prompts=3, max_new_tokens=3, perplexity_tokens=50),
        )
        scored.append(evaluation.to_frame())
        small = ExplainConfig(n_prompts=3, n_harmful=2, n_traces=2, max_tokens=4, n_sets=2, n_splits=2)
        explained.append(explain(chat, direction, tokens, prompts=few, config=small).to_frame())
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        pd.testing.assert_frame_equal(*found, rtol=1e-4, atol=1e-5)
    for one, other in (selected, scored, explained):
        pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-5)
    assert scored[0].loc["teacher", "kl_harmless"] > 0


def test_readers_and_shifts_are_those_of_one_device(pair, few):
    scores, shifts = [], []
    direction = Direction(vector=random_vector(32), layer=1, position="-1", extraction="given")
    for chat in pair:
        reader = fit_reader(chat, few)
        scores.append(reader.scores(chat, [*few.harmful, *few.harmless]))
        shifts.append(shift_along(chat, direction, few))
    assert_near(scores[1], scores[0], 1e-4)
    pd.testing.assert_frame_equal(*shifts, rtol=1e-4, atol=1e-6)


# --- training ---


def test_an_adapter_trains_on_blocks_that_lie_apart(folder, few, direction):
    pytest.importorskip("peft")
    config = DistillConfig(
        n_steps=3, lora_rank=4, lr=1e-2, harmful_per_step=2, harmless_per_step=2, max_new_tokens=3
    )
    histories, trained = [], []
    for options in ({"device": "cpu"}, {"device_map": APART}):
        chat = load_model(folder, **options)
        tokens = select_tokens(chat, direction, few.harmless, TokenConfig(k=8, min_steered_prob=0.0))
        state = prepare_student(chat, direction, config)
        forwards = [vars(block).get("forward") for block in blocks(chat.model)]
        records = [asdict(record) for record in training_steps(state, Teacher(chat, direction, tokens), few)]
        timed = ("rollout_s", "teacher_s", "student_s", "val_refused")
        histories.append([{k: v for k, v in record.items() if k not in timed} for record in records])
        trained.append({n: p.detach() for n, p in state.trained.items()})
        assert [vars(block).get("forward") for block in blocks(chat.model)] == forwards
    for one, other in zip(*histories, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert trained[0].keys() == trained[1].keys()
    for name, weight in trained[0].items():
        assert_near(trained[1][name], weight, 1e-3)


@pytest.mark.slow
def test_one_command_gives_the_run_of_one_device(folder, tmp_path):
    pytest.importorskip("peft")
    settings = {**SMALL, "distill.lora_rank": 4, "direction.extraction": "prefill"}
    runs = [
        align(folder, tmp_path / name, recipe(**settings, device_map=word), console=QUIET)
        for name, word in (("one", None), ("apart", "disk"))
    ]
    exported = [load_file(run / "model" / "model.safetensors") for run in runs]
    base = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert exported[0].keys() == exported[1].keys()
    for name, weight in exported[0].items():
        assert_near(exported[1][name], weight, 1e-4)
    assert any(not torch.equal(weight, base[name]) for name, weight in exported[1].items())
    for one, other in zip(*(json_lines(run / "history.jsonl") for run in runs), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    scores = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    for name in ("base", "teacher", "student"):
        for measure in ("refusal_rate_harmful", "kl_harmless", "perplexity"):
            assert scores[1][name][measure] == pytest.approx(scores[0][name][measure], rel=1e-3, abs=1e-6)
    assert (runs[1] / "report.html").exists()


# --- what cannot be ---


def test_weights_that_lie_apart_do_not_train_in_full(folder, direction, tmp_path):
    apart = load_model(folder, device_map=APART)
    with pytest.raises(SafeSteerError, match="cannot train: train an adapter"):
        prepare_student(apart, direction, DistillConfig())
    with pytest.raises(SafeSteerError, match="cannot train: train an adapter"):
        align(folder, tmp_path / "run", recipe(**SMALL, device_map="disk"), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_model_that_lies_apart_is_not_copied(folder, direction, tokens_of, tmp_path):
    apart = load_model(folder, device_map=APART)
    for use in (apart.copy, lambda: to_bridge(apart), lambda: distill(apart, direction, tokens_of(apart))):
        with pytest.raises(SafeSteerError, match="cannot be copied"):
            use()
    with pytest.raises(SafeSteerError, match="cannot be copied"):
        align(apart, tmp_path / "run", recipe(**SMALL), console=QUIET)
    with pytest.raises(SafeSteerError, match="keep the precision"), in_precision(apart.model, torch.bfloat16):
        pass


@pytest.fixture
def tokens_of(direction, few):
    def select(chat):
        return select_tokens(chat, direction, few.harmless, TokenConfig(k=8, min_steered_prob=0.0))

    return select


def test_a_map_and_shares_of_processes_exclude_each_other(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("safesteer.alignment.require_processes", lambda: None)
    settings = {**SMALL, "distill.sharded": True, "distill.lora_rank": 4, "device_map": "disk"}
    with pytest.raises(SafeSteerError, match="choose one"):
        align(folder, tmp_path / "run", recipe(**settings), console=QUIET)


def test_a_setting_holds_a_map_as_json(folder):
    chat = load_model(folder, device_map=recipe(device_map=json.dumps(APART)).device_map)
    assert {p.is_meta for p in blocks(chat.model)[1].parameters()} == {False}
    assert {p.is_meta for p in blocks(chat.model)[2].parameters()} == {True}
    with pytest.raises(SafeSteerError, match="leave out quantize or device_map"):
        load_model(folder, device_map="disk", quantize="4bit")


def test_what_reads_weights_directly_reads_those_on_the_disk(folder, few):
    plain, apart = load_model(folder, device="cpu"), load_model(folder, device_map=APART)
    direction = Direction(vector=random_vector(32), layer=1, position="-1", extraction="given")
    tables = [component_contributions(chat, direction, few) for chat in (plain, apart)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5, atol=1e-7)
    lenses = [logit_lens(chat, direction.vector[None]) for chat in (plain, apart)]
    pd.testing.assert_frame_equal(*lenses, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_merged_for_an_engine_from_the_disk(folder, direction):
    pytest.importorskip("peft")
    merged_weights = []
    for options in ({"device": "cpu"}, {"device_map": APART}):
        state = prepare_student(load_model(folder, **options), direction, DistillConfig(lora_rank=4))
        with torch.no_grad():
            for weight in state.trained.values():
                weight.fill_(0.1)
        merged_weights.append(dict(trained_weights(state.student)))
    assert merged_weights[0].keys() == merged_weights[1].keys()
    for name, weight in merged_weights[0].items():
        assert torch.equal(merged_weights[1][name], weight)


@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ("everywhere", "must be one of auto, disk"),
        ('{"": "cpu", "model.layers.9": "disk"}', "names 'model.layers.9', which is no part"),
        ({"model.layers.0": "cpu"}, "no place for 'model.layers.1'"),
        ({"": "cpu", "model.layers.9": "disk"}, "names 'model.layers.9', which is no part"),
        ({"": "cpu", "model.layers.1.mlp": "disk"}, "blocks are placed whole"),
    ],
)
def test_a_wrong_map_is_one_sentence(folder, device_map, says):
    with pytest.raises(SafeSteerError, match=says):
        load_model(folder, device_map=device_map)


def test_a_map_of_another_loader_may_part_the_embedding_from_its_device(folder, tiny_llama):
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"})
    with pytest.raises(SafeSteerError, match="device_map='auto'"):
        generate((theirs, tiny_llama.tokenizer), ["Hello"])


def test_blocks_that_read_past_their_modules_are_refused(tmp_path):
    name = saved(build("jetmoe"), tmp_path / "jetmoe")
    with pytest.raises(SafeSteerError, match="JetMoeForCausalLM does not run with blocks"):
        load_model(name, device="cpu", device_map="disk")


# --- "auto" ---


def empty(n_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        vocab_size=1000,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def places(monkeypatch, memory: dict, device: str = "cuda:0", n_layers: int = 8) -> list:
    """The places of the blocks on a machine with so much free memory, in blocks."""
    model = empty(n_layers)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    near = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".layers." not in n)
    free = {place: size * block / placement.ROOM for place, size in memory.items()}
    first = 0 if device.startswith("cuda") else device
    free[first] = free.get(first, 0) + near / placement.ROOM
    monkeypatch.setattr(placement, "get_max_memory", lambda: free)
    result = placement.spread(model, "auto", torch.device(device))
    assert {result[name] for name in ("model.embed_tokens", "model.norm", "lm_head")} == {first}
    return [result[f"model.layers.{i}"] for i in range(n_layers)]


def test_auto_fills_gpus_evenly_then_the_cpu_then_the_disk(monkeypatch):
    assert places(monkeypatch, {0: 20, 1: 20, "cpu": 99}) == [0] * 4 + [1] * 4
    assert places(monkeypatch, {0: 10, 1: 30, "cpu": 99}) == [0] * 2 + [1] * 6
    assert places(monkeypatch, {0: 3, 1: 2, "cpu": 2}) == [0] * 3 + [1] * 2 + ["cpu"] * 2 + ["disk"]
    assert places(monkeypatch, {0: 20, "cpu": 2}, device="cpu") == ["cpu"] * 2 + ["disk"] * 6


def test_processes_divide_gpus_and_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert places(monkeypatch, {0: 2, 1: 9, 2: 2, 3: 9, "cpu": 6}) == [0] * 2 + [2] * 2 + ["cpu"] * 3 + [
        "disk"
    ]


def test_a_model_that_fits_one_place_is_not_spread(folder, tiny_llama):
    chat = load_model(folder, device="cpu", device_map="auto")
    assert not placement.is_spread(chat.model)
    assert generate(chat, ["Hello"]) == generate(tiny_llama, ["Hello"])


def test_weights_of_other_folders_come_from_a_folder_of_their_own(tmp_path):
    """Experts are merged while they are loaded, so they lie on the disk once more."""
    name = saved(build("mixtral"), tmp_path / "mixtral")
    plain, apart = (load_model(name, device="cpu", device_map=word) for word in (None, "disk"))
    assert_near(last_logits(apart, batch_of(apart)), last_logits(plain, batch_of(plain)), 1e-5)
    assert as_chat(copy_of(plain)).fingerprint == apart.fingerprint
