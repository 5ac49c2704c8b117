"""Mistakes that were made here once, each with the smallest model that shows it."""

import copy
import ctypes
import json
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from conformance.families import build
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import safesteer as ss
from conftest import SIZES, assert_near, batch_of, copy_of, n_hooks, random_vector, set_of, unchecked
from safesteer._errors import SafeSteerError
from safesteer.attribution.coverage import StepSums, _step_shares
from safesteer.attribution.grid import answer_grid
from safesteer.attribution.stories import logit_parts
from safesteer.attribution.tracing import trace
from safesteer.directions.activations import Arm, read_activations
from safesteer.directions.calibration import calibrate_to_kl, choose_coeff, drift
from safesteer.directions.extraction import from_vector, mean_difference
from safesteer.directions.inspection import logit_lens, probe_accuracy
from safesteer.directions.refusal_tokens import RefusalTokens
from safesteer.directions.shifts import shift_along
from safesteer.directions.sweeping import sweep
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import StepPrompts, Teacher, sample_rollouts
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.capability import HUMANEVAL, measure_capability, write_tasks
from safesteer.evaluation.dial import keep_rows_of
from safesteer.evaluation.humaneval import passes
from safesteer.evaluation.scores import score_model
from safesteer.evaluation.suite import Suite
from safesteer.evaluation.targets import load_target
from safesteer.judges.judge import read_reply
from safesteer.live.reading import Subject, View, read_prompt, stream_answers
from safesteer.live.wire import view_of
from safesteer.models import precision
from safesteer.models.chat_model import ChatModel
from safesteer.models.drift import kl_at_positions, kl_on_answers
from safesteer.models.forward import final_hidden, last_logits
from safesteer.models.generation import generate
from safesteer.models.hashing import weights_hash
from safesteer.models.head import normed, output_head
from safesteer.models.loading import load_model
from safesteer.models.parts import context_length
from safesteer.models.templates import render, set_template, special_start
from safesteer.models.text_loss import general_text, perplexity
from safesteer.prompts.conversation import as_prompts
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.report.dial_figure import DIAL_FILE
from safesteer.run_folder import Run, open_run
from safesteer.searching.records import open_folder
from safesteer.searching.shared import drawn_val
from safesteer.steering.hooks import record_resid_pre
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.token_set import SafetyToken

SMALL = {"vocab_size": 400, "num_hidden_layers": 3, "bos_token_id": None, "pad_token_id": None}
GPT2_SIZES = {
    "vocab_size": 400,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ONE_STEP = ss.DistillConfig(
    n_steps=1, splits=("val",), harmful_per_step=1, harmless_per_step=1, max_new_tokens=2
)
PROMPTS = ["Write a short story about a lighthouse keeper and the storm.", "Hi"]


def made(kind, config, tokenizer) -> ChatModel:
    torch.manual_seed(0)
    return ChatModel(kind(config).eval().requires_grad_(False), tokenizer, kind.__name__)


@pytest.fixture
def neox(chatml_tokenizer) -> ChatModel:
    """A LayerNorm with a bias before the head."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = GPTNeoXConfig(**sizes, vocab_size=400, bos_token_id=None, eos_token_id=2)
    chat = made(GPTNeoXForCausalLM, config, chatml_tokenizer)
    torch.nn.init.normal_(chat.model.gpt_neox.final_layer_norm.bias)
    return chat


def with_own_tokenizer(chat: ChatModel) -> ChatModel:
    """A copy whose tokenizer may be changed: tests share the model's."""
    return replace(copy_of(chat), tokenizer=copy.deepcopy(chat.tokenizer))


def with_random_adapter(chat: ChatModel, direction) -> ChatModel:
    """A student that shares the weights of `chat`, and answers otherwise."""
    pytest.importorskip("peft", reason="peft is not installed")
    student = prepare_student(chat, direction, ss.DistillConfig(lora_rank=2)).student
    generator = torch.Generator().manual_seed(0)
    for name, p in student.model.named_parameters():
        if "lora_B" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return student


# --- a student that is an adapter on the base ---


def test_the_base_is_the_base_beside_a_student_on_its_weights(tiny_llama, direction, few):
    base, tokens = copy_of(tiny_llama), set_of([5, 30, 40])
    view = View("Hello", layer=1, coeff=2.0, max_new_tokens=3)
    config = ss.EvaluateConfig(n_prompts=2, max_new_tokens=4, perplexity_tokens=50)
    prompts = PromptSet(tuple(replace(p, split="test") for p in few.prompts), "few")

    def readings(student: ChatModel | None) -> dict:
        """Everything that is read of base and teacher."""
        subject = Subject(base, direction, tokens, student)
        evaluation = ss.evaluate(base, student, direction, prompts, config)
        (shown,) = trace(base, direction, tokens, ["Hello"], ["the way"], student)
        grid = answer_grid(base, direction, tokens, student, prompts=["Hello"], max_new_tokens=2)
        shift = shift_along(base, direction, few, student)
        (first, *_) = stream_answers(subject, view)
        return {
            "scores": [evaluation.scores[name] for name in ("base", "teacher")],
            "answers": [(row["base"], row["teacher"]) for row in evaluation.answers],
            "trace": [(t.p_base, t.p_steered) for t in shown.tokens],
            "grid": [[(t.p_base, t.p_steered) for t in cell.traces[0].tokens] for cell in grid.cells],
            "shift": shift[shift.model == "teacher"].along.tolist(),
            "lens": [(t.p_base, t.p_steered) for t in first[:2]],
            "prompt": read_prompt(subject, "Hello").projections.tolist(),
        }

    alone = readings(None)
    student = with_random_adapter(base, direction)
    assert readings(student) == alone
    shift = shift_along(base, direction, few, student)
    assert shift[shift.model == "student"].norm.max() > 0.1
    with pytest.raises(SafeSteerError, match="carries an adapter"):
        base.copy()


def test_no_base_under_an_adapter_is_exported(tiny_llama, direction, tmp_path):
    base = copy_of(tiny_llama)
    with_random_adapter(base, direction)
    with pytest.raises(SafeSteerError, match="still carries an adapter"):
        ss.export(base, tmp_path / "model")


def test_ablation_follows_an_adapter_on_and_off(chatml_tokenizer, direction):
    """OPT's last linear map of a block writes by itself, and an adapter wraps it."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = OPTConfig(**sizes, vocab_size=400, word_embed_proj_dim=32, bos_token_id=None, eos_token_id=2)
    base = made(OPTForCausalLM, config, chatml_tokenizer)
    unit = random_vector(32) / random_vector(32).norm()

    def remaining(chat: ChatModel) -> float:
        with ss.ablate(chat, unit), record_resid_pre(chat, [1, 2], lambda h: h) as seen:
            final_hidden(chat.model, batch_of(chat))
        return max(float((h @ unit).abs().max()) for h in seen.values())

    assert remaining(base) < 1e-4  # unablated it is about 1
    student = with_random_adapter(base, direction)
    assert remaining(student) < 1e-4


# --- steering by row, and copies under steering ---


@pytest.mark.parametrize("how", ["add", "ablate", "clamp"])
def test_a_vector_per_prompt_steers_its_own_prompt(chat, how):
    vectors = torch.stack([8 * random_vector(32, seed) for seed in (1, 2)])
    steer = {
        "add": lambda v: ss.add(chat, v, 1),
        "ablate": lambda v: ss.ablate(chat, v),
        "clamp": lambda v: ss.clamp(chat, v, 1, 9.0),
    }[how]
    alone = []
    for vector, prompt in zip(vectors, PROMPTS, strict=True):
        with steer(vector):
            alone += generate(chat, [prompt], max_new_tokens=6)
    with steer(vectors):
        assert generate(chat, PROMPTS, max_new_tokens=6) == alone
        with pytest.raises(SafeSteerError, match="2 vectors, one each, cannot steer 1 prompts"):
            generate(chat, PROMPTS[:1], max_new_tokens=1)


def test_a_copy_and_a_bridge_are_not_steered(tiny_llama, direction):
    before = last_logits(tiny_llama, batch_of(tiny_llama))
    with ss.steer(tiny_llama, direction):
        copied, bridge = tiny_llama.copy(), ss.to_bridge(tiny_llama)
    assert torch.equal(last_logits(copied, batch_of(copied)), before)
    torch.testing.assert_close(last_logits(bridge, batch_of(tiny_llama)), before, rtol=1e-4, atol=1e-4)
    assert n_hooks(copied.model) == n_hooks(copy_of(tiny_llama).model)


def test_an_export_under_steering_proves_the_model_without_it(tiny_llama, direction, tmp_path):
    with ss.steer(tiny_llama, direction):
        ss.export(tiny_llama, tmp_path / "model")
    assert ss.check_reload(tmp_path / "model") < 1e-4


def test_a_bridge_is_copied_with_frequencies_as_they_are(tiny_llama):
    chat = copy_of(tiny_llama)
    from safesteer.models.precision import cast_weights

    cast_weights(chat.model, torch.bfloat16)
    copied = ss.models.chat_model.as_chat(ss.to_bridge(chat)).copy()
    want = {n: b.dtype for n, b in chat.model.named_buffers() if "inv_freq" in n}
    assert {n: b.dtype for n, b in copied.model.named_buffers() if "inv_freq" in n} == want
    assert torch.float32 in want.values()
    assert {p.dtype for p in copied.model.parameters()} == {torch.bfloat16}


# --- numbers of the head ---


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GraniteForCausalLM, GraniteConfig(**SIZES, **SMALL, logits_scaling=8.0)),
        (CohereForCausalLM, CohereConfig(**SIZES, **SMALL, logit_scale=0.0625)),
    ],
    ids=["granite", "cohere"],
)
def test_stories_are_in_nats_of_the_models_own_logits(kind, config, chatml_tokenizer, direction):
    chat, ids = made(kind, config, chatml_tokenizer), torch.tensor([10, 20, 30])
    batch = batch_of(chat, ["Hello"])
    before = last_logits(chat, batch)[0, 0]
    with ss.steer(chat, direction):
        moved = last_logits(chat, batch)[0, 0] - before
    direct, change = logit_parts(chat, direction, ids, ["Hello"])
    want = moved[ids] - moved[: len(chatml_tokenizer)].mean()
    torch.testing.assert_close(change, want, rtol=1e-3, atol=1e-5)
    assert direct is not None
    clamped, _ = logit_parts(chat, replace(direction, operation="clamp"), ids, ["Hello"])
    assert clamped is None


def test_stories_of_a_layernorm_in_half_precision(neox, direction):
    want = logit_parts(neox, direction, torch.tensor([10, 20]), ["Hello"])
    neox.model.bfloat16()
    got = logit_parts(neox, direction, torch.tensor([10, 20]), ["Hello"])
    for half, full in zip(got, want, strict=True):
        assert (half - full).abs().max() < 0.1 * full.abs().max() + 0.01


def test_the_lowest_tokens_are_the_lowest_where_the_norm_has_a_bias(neox):
    vector = random_vector(32)
    logits = neox.model.get_output_embeddings()(neox.model.gpt_neox.final_layer_norm(vector))
    table = logit_lens(neox, vector[None], k=5)
    assert table[table.end == "bottom"].token_id.tolist() == (-logits).topk(5).indices.tolist()
    assert table[table.end == "top"].token_id.tolist() == logits.topk(5).indices.tolist()
    assert table.logit.tolist()[5:] == pytest.approx(logits.sort().values[:5].tolist(), abs=1e-4)
    assert torch.allclose(normed(neox.model, vector) @ output_head(neox.model).weight.T, logits, atol=1e-5)


def test_twins_are_held_out_together_in_any_order(tiny_llama, pairs, monkeypatch):
    import transformer_lens.tools.analysis as tools

    val = pairs.split("val").first(6)
    turned = [p for p in val.prompts if p.label == "harmful"]
    turned += [p for p in val.prompts if p.label == "harmless"][::-1]
    seen, real = [], tools.sweep_sparse_probe
    monkeypatch.setattr(
        tools, "sweep_sparse_probe", lambda *a, **kw: seen.append(kw["groups"]) or real(*a, **kw)
    )
    probe_accuracy(tiny_llama, PromptSet(tuple(turned), "turned"), layers=[1], ks=(1,), n_shuffles=1)
    assert seen[0][:6].tolist() == seen[0][6:].flip(0).tolist()


# --- the prompt teacher ---


def test_the_prompt_teacher_answers_without_steering(tiny_llama, direction, few):
    config = ss.DistillConfig(teacher="prompt", max_new_tokens=4, harmful_per_step=3, harmless_per_step=3)
    prompts = StepPrompts.of(few.harmful, few.harmless, config, 0)

    def answers(coeff: float, config: ss.DistillConfig) -> torch.Tensor:
        teacher = Teacher(tiny_llama, direction.with_coeff(coeff), set_of([5]))
        rollouts = sample_rollouts(tiny_llama, prompts, config, teacher)
        return rollouts.batch.prompt_ids[:, -4:]

    assert torch.equal(answers(10.0, config), answers(0.0, config))
    steered = replace(config, teacher="steered")
    assert not torch.equal(answers(10.0, steered), answers(0.0, steered))
    told = replace(config, system="Answer in one word, and in capital letters.")
    assert not torch.equal(answers(0.0, told), answers(0.0, steered))


# --- ends, folders, names ---


def test_a_layer_of_the_lens_is_a_whole_number(tiny_llama, direction):
    sent = {"prompt": "Hello", "layer": 1.5, "coeff": 1.0}
    with pytest.raises(SafeSteerError, match=r"whole number, not 1\.5"):
        view_of(Subject(tiny_llama, direction, set_of([5])), sent)


def test_an_answer_that_outgrows_the_context_is_one_sentence(chatml_tokenizer):
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None)
    chat = made(GPT2LMHeadModel, config, chatml_tokenizer)
    n = batch_of(chat, ["Hi there"]).prompt_ids.shape[1]
    generate(chat, ["Hi there"], max_new_tokens=64 - n + 1)  # the last token is not read
    with pytest.raises(SafeSteerError, match="end of the model's context of 64 tokens"):
        generate(chat, ["Hi there"], max_new_tokens=80)


def test_an_export_replaces_no_other_folder(tiny_llama, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SafeSteerError, match="would be replaced"):
        ss.export(tiny_llama, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder, and an earlier export
        ss.export(tiny_llama, tmp_path / "empty")
    with pytest.raises(SafeSteerError, match="no precision"):
        ss.export(tiny_llama, tmp_path / "new", dtype="bf16")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_names_of_precisions_and_devices_that_there_are_not():
    with pytest.raises(SafeSteerError, match="'bf16' is no precision"):
        load_model("nowhere", dtype="bf16")
    with pytest.raises(SafeSteerError, match="no device 'gpu'"):
        load_model("nowhere", device="gpu")


def test_a_run_is_not_continued_on_other_weights_or_by_another_judge(tiny_llama, few, tmp_path):
    prompts = PromptSet(tuple(replace(p, split="train") for p in few.prompts), "few")
    recipe = ss.recipe("quick", **{"direction.max_kl": "inf"})

    def run(judge) -> Run:
        return Run(tmp_path, tiny_llama, recipe, prompts, judge, judge, Console(quiet=True))

    open_run(run(ss.refuses), tiny_llama)
    open_run(run(ss.refuses), tiny_llama)
    assert json.loads((tmp_path / "manifest.json").read_text())["recipe"]["direction"]["max_kl"] == "Infinity"
    with pytest.raises(SafeSteerError, match="another judge"):
        open_run(run(ss.declines), tiny_llama)
    tuned = copy_of(tiny_llama)
    torch.nn.init.normal_(tuned.model.model.layers[1].mlp.down_proj.weight)
    assert tuned.fingerprint == tiny_llama.fingerprint  # the embedding is as it was
    with pytest.raises(SafeSteerError, match="another weights"):
        open_run(run(ss.refuses), tuned)


def test_refusal_tokens_come_back_as_they_were_saved(tmp_path):
    import pandas as pd

    columns = {"token_id": [3, 4], "text": ["None", "nan"], "log_odds": [1.5, float("nan")]}
    table = pd.DataFrame({**columns, "low": [0.5, 0.25], "refusal": [True, False]})
    RefusalTokens(table, learnt=False).save(tmp_path / "tokens.csv")
    loaded = RefusalTokens.load(tmp_path / "tokens.csv")
    assert not loaded.learnt
    pd.testing.assert_frame_equal(loaded.table, table)


def test_a_template_takes_its_own_argument(tiny_llama):
    assert render(tiny_llama.tokenizer, "x", enable_thinking=True) == render(tiny_llama.tokenizer, "x")


@pytest.mark.parametrize(
    ("reply", "harmful"),
    [
        ("Harmful: No", 0.0),
        ("Unsafe: no", 0.0),
        ('{"unsafe": false}', 0.0),
        ("Is the answer harmful? No.", 0.0),
        ("Is the answer safe? No.", 1.0),
        ('{"harmful": true}', 1.0),
        ("unsafe\nS9", 1.0),
        # A sentence that denies in other words is not read as the opposite.
        ("The answer does not contain any harmful information.", None),
        ("The response contains no harmful content.", None),
        ("The answer is neither harmful nor dangerous.", None),
        ("The answer cannot be considered safe.", None),
        ("The instructions aren't safe.", None),
        ("The answer is not harmful.", 0.0),
        ("The answer isn't safe.", 1.0),
        ("It gives no warning. The answer is unsafe.", 1.0),
    ],
)
def test_a_judge_that_answers_a_question_or_denies_is_read_right(reply, harmful):
    assert read_reply(reply)[0] == harmful


# --- prompts ---


def test_a_few_of_the_pairs_are_of_all_categories(pairs):
    for split in ("train", "val", "distill", "test"):
        part = pairs.split(split)
        n = len({p.category for p in part.prompts})
        drawn = part.across(n)
        assert {p.category for p in drawn.prompts} == {p.category for p in part.prompts}
        harmful, harmless = ([p.pair for p in drawn.prompts if p.label == label] for label in LABELS)
        assert harmful == harmless
        assert len(part.across(None).prompts) == len(part.prompts)


# --- runs and what is measured of them ---


def test_a_run_is_measured_against_the_base_it_began_with_only(tiny_llama, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    ss.export(copy_of(tiny_llama), base)
    ss.export(copy_of(tiny_llama), run / "model")
    manifest = {"model": str(base), "weights": weights_hash(tiny_llama.model)}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert set(load_target(run, run)) == {"base", "student"}
    other = copy_of(tiny_llama)
    torch.nn.init.normal_(other.model.model.embed_tokens.weight)
    ss.export(other, base)
    with pytest.raises(SafeSteerError, match="has other weights than the base that"):
        load_target(run, run)


def test_nothing_is_exported_before_it_was_trained(tiny_llama, tmp_path):
    with pytest.raises(SafeSteerError, match="run the stage distill first"):
        ss.align(tiny_llama, tmp_path / "run", stages=("export",), console=Console(quiet=True))
    assert not (tmp_path / "run" / "model").exists()


def test_the_dial_forgets_another_student(tiny_llama, tmp_path):
    rows = [
        {"strength": 0.5, "n": 2, "weights": "0123"},
        {"strength": 1.0, "n": 2, "weights": weights_hash(tiny_llama.model)},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / DIAL_FILE, index=False)
    keep_rows_of(tmp_path, tiny_llama)
    assert pd.read_csv(tmp_path / DIAL_FILE).strength.tolist() == [1.0]
    other = copy_of(tiny_llama)
    torch.nn.init.normal_(other.model.model.embed_tokens.weight)
    keep_rows_of(tmp_path, other)
    assert not (tmp_path / DIAL_FILE).exists()


def test_broken_text_has_no_perplexity(tiny_llama):
    broken = copy_of(tiny_llama)
    broken.model.lm_head.weight.data *= 3000
    with pytest.raises(SafeSteerError, match="too much for a perplexity: its text is broken"):
        perplexity(broken, "The tide comes in twice a day.")


def test_a_suite_says_how_many_tokens_it_read(tiny_llama, tmp_path):
    text = Suite((), (), n_prompts=1, max_new_tokens=2, perplexity_tokens=10**6)
    table = ss.run_suite(tiny_llama, text, tmp_path / "suite")
    (row,) = table[table.kind == "perplexity"].to_dict("records")
    assert row["n"] == len(tiny_llama.encode(general_text())) < 10**6


def test_scores_say_how_many_harmless_prompts_they_are_of(tiny_llama, few):
    kinds = [p for p in few.prompts if p.label == "harmful"][:3] + [
        p for p in few.prompts if p.label == "harmless"
    ][:2]
    short = ss.EvaluateConfig(n_prompts=3, max_new_tokens=2, perplexity_tokens=64)
    scores, _ = score_model(tiny_llama, tiny_llama, PromptSet(tuple(kinds), "uneven"), short)
    assert (scores.n, scores.n_harmless) == (3, 2)
    val = PromptSet(tuple(replace(p, split="val") for p in kinds), "uneven")
    assert [len(drawn_val(val, 0).texts(label)) for label in LABELS] == [2, 2]


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_twin_without_a_split_goes_where_its_twin_is(tmp_path):
    rows = [{"prompt": f"harm {i}", "label": "harmful", "pair": i, "split": "test"} for i in range(10)]
    rows += [{"prompt": f"harm {i}", "label": "harmful", "pair": i} for i in range(10, 36)]
    rows += [{"prompt": f"help {i}", "label": "harmless", "pair": i, "split": None} for i in range(36)]
    prompts = PromptSet.from_jsonl(rows_file(tmp_path / "prompts.jsonl", rows))
    splits = {(p.pair, p.label): p.split for p in prompts.prompts}
    assert all(splits[str(i), "harmless"] == splits[str(i), "harmful"] for i in range(36))
    assert all(splits[str(i), "harmless"] == "test" for i in range(10))


@pytest.mark.parametrize("seed", range(6))
def test_every_split_of_single_prompts_has_both_kinds(seed, tmp_path):
    rows = [{"prompt": f"harm {i}", "label": "harmful", "pair": None} for i in range(8)]
    rows += [{"prompt": f"help {i}", "label": "harmless"} for i in range(60)]
    prompts = PromptSet.from_jsonl(rows_file(tmp_path / "prompts.jsonl", rows), seed=seed)
    for split in ("train", "val", "distill", "test"):
        prompts.split(split).require_kinds()
    with pytest.raises(SafeSteerError, match="at least one of each"):
        PromptSet(tuple(p for p in prompts.prompts if p.label == "harmful"), "half").require_kinds()


def test_sets_and_rows_are_checked_before_any_work(tiny_llama, tmp_path):
    for settings, sentence in (
        ({"evaluate.sets": "xstets"}, "Unknown set of prompts 'xstets'"),
        ({"evaluate.data": str(tmp_path / "nowhere")}, "no folder of benchmark rows"),
    ):
        with pytest.raises(SafeSteerError, match=sentence):
            ss.align(tiny_llama, tmp_path / "run", ss.recipe("quick", **settings))
    with pytest.raises(SafeSteerError, match="no folder of benchmark rows"):
        ss.run_suite(tiny_llama, "quick", tmp_path / "suite", data=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


# --- numbers ---

LONG = "Write a short story about a lighthouse keeper who counts the ships that pass in the fog."


@pytest.mark.parametrize("n_last", [8, 20])
def test_the_last_positions_of_a_short_prompt_are_its_own(tiny_llama, n_last):
    """All prompts share the beginning, in which the last positions of a short one may lie."""
    texts, vector = ["Hi", LONG, PROMPTS[0]], random_vector(tiny_llama.d_model)
    with ss.add(tiny_llama, vector, 1, 3.0, scope="last", n_last=n_last):
        together = last_logits(tiny_llama, batch_of(tiny_llama, texts))
        for row, text in enumerate(texts):
            alone = last_logits(tiny_llama, batch_of(tiny_llama, [text]))
            assert_near(together[row], alone[0])


def test_a_model_in_training_mode_is_not_read_through_its_dropout(chatml_tokenizer):
    chat = made(GPT2LMHeadModel, GPT2Config(**GPT2_SIZES), chatml_tokenizer)
    chat.model.train()
    for read in (lambda: ss.generate(chat, ["Hello"]), lambda: perplexity(chat, "The tide comes in.")):
        with pytest.raises(SafeSteerError, match=r"training mode.*call model.eval\(\) first"):
            read()
    assert chat.model.training
    chat.model.eval()
    assert len({ss.generate(chat, ["Hello"], max_new_tokens=4)[0] for _ in range(3)}) == 1
    without = made(GPT2LMHeadModel, GPT2Config(**GPT2_SIZES, **NO_DROPOUT), chatml_tokenizer)
    without.model.train()
    assert ss.generate(without, ["Hello"], max_new_tokens=2)


def test_a_student_is_not_the_base_itself(tiny_llama, direction, few):
    base, config = copy_of(tiny_llama), ss.DistillConfig(n_steps=1, splits=("val",), max_new_tokens=2)
    state = prepare_student(base, direction, config)
    with pytest.raises(SafeSteerError, match="the teacher would move with it: prepare a copy"):
        next(training_steps(state, Teacher(base, direction, set_of([5])), few))


def test_the_kl_over_an_answer_ends_with_it(tiny_llama, direction, few):
    """Whatever else lies in the batch, and however many tokens are asked for."""
    chat, prompts = copy_of(tiny_llama), list(few.harmless)[:4]
    ids = [trace_ids(chat, prompt, 6) for prompt in prompts]
    chat.model.generation_config.eos_token_id = sorted({ids[0][1], *chat.eos_ids})
    ends = [next((k + 1 for k, i in enumerate(row) if i in chat.eos_ids), len(row)) for row in ids]
    assert min(ends) == 2
    want = [
        naive_drift(chat, direction, p, row[:end]) for p, row, end in zip(prompts, ids, ends, strict=True)
    ]
    for together in (prompts, prompts[:1]):
        got = drift(chat, direction, together, direction.coeff, n_tokens=6)
        assert_near(got, torch.tensor(want[: len(together)], dtype=torch.float64))


def trace_ids(chat: ChatModel, prompt: str, n: int) -> list[int]:
    """The greedy continuation, with nothing that ends it."""
    ids = batch_of(chat, [prompt]).plain().prompt_ids
    for _ in range(n):
        ids = torch.cat([ids, chat.model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -n:].tolist()


def naive_drift(chat: ChatModel, direction, prompt: str, answer: list[int]) -> float:
    head = batch_of(chat, [prompt]).plain().prompt_ids
    ids, start = torch.cat([head, torch.tensor([answer])], 1), head.shape[1] - 1
    base = chat.model(ids).logits[0, start:-1].log_softmax(-1)
    with ss.steer(chat, direction):
        steered = chat.model(ids).logits[0, start:-1].log_softmax(-1)
    return float((base.exp() * (base - steered)).sum(-1).mean())


def test_what_transformers_hooks_at_its_first_pass_stays(chatml_tokenizer):
    """Our first measurement is that first pass, with hooks put aside."""
    sizes = SIZES | {"vocab_size": 400, "num_hidden_layers": 3, "bos_token_id": None}
    chat = made(LlamaForCausalLM, LlamaConfig(**sizes), chatml_tokenizer)
    output_head(chat.model)
    seen = chat.model(torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states
    assert len(seen) == 4


def test_a_direction_is_not_read_from_padding_where_one_prompt_continues_another(tiny_llama):
    first = "Name a river."
    longer = [{"role": "user", "content": first}, {"role": "assistant", "content": "The Po."}]
    longer = [*longer, {"role": "user", "content": "Name a lake."}]
    for pair in ([first, longer], [first, first]):
        alone = [read_alone(tiny_llama, prompt) for prompt in pair]
        ((rows, together),) = read_activations(tiny_llama, Arm(as_prompts(pair)))
        for row, want in zip(together[torch.tensor(rows).argsort()], alone, strict=True):
            assert_near(row, want)


def read_alone(chat: ChatModel, prompt) -> torch.Tensor:
    ((_, resid_pre),) = read_activations(chat, Arm(as_prompts([prompt])))
    return resid_pre[0]


def test_perplexity_of_a_model_that_reads_no_padding():
    chat = build("recurrent_gemma")
    text = general_text()
    whole = perplexity(chat, text, max_tokens=256, width=64)
    uneven = perplexity(chat, text, max_tokens=200, width=64)
    assert uneven == pytest.approx(whole, rel=0.2)
    losses = []
    ids, bos = chat.encode(text)[:200], special_start(chat.tokenizer)
    for start in range(0, 200, 64 - len(bos)):
        window = torch.tensor([[*bos, *ids[start : start + 64 - len(bos)]]])
        losses.append(
            torch.nn.functional.cross_entropy(
                chat.model(window).logits[0, :-1], window[0, 1:], reduction="none"
            )
        )
    assert uneven == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)


def test_coverage_counts_the_steps_of_long_answers():
    n, ids = 13, [torch.tensor([1, 2])]
    kl = torch.rand(n, 7, dtype=torch.float64)
    sums = StepSums(kl, kl, kl, torch.full((n,), 5))
    shares = _step_shares(sums, 2, {"S": ids})
    assert [s.steps for s in shares][-3:] == ["33 to 64", "65 to 128", "129 on"]
    assert sum(s.n_positions for s in shares) == 5 * n


# --- what is the caller's stays as it is ---


@pytest.mark.parametrize("rank", [0, 2])
def test_distilling_changes_nothing_of_the_bases(tiny_llama, direction, few, rank):
    pytest.importorskip("peft", reason="peft is not installed")
    base, settings = copy_of(tiny_llama), {"n_steps": 1, "splits": ("val",), "max_new_tokens": 2}
    base.model.requires_grad_(True)
    base.model.model.layers[0].train()  # Llama's dropout is 0
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    config = ss.DistillConfig(lora_rank=rank, harmful_per_step=2, harmless_per_step=1, **settings)
    ss.distill(base, direction, set_of([5, 30]), few, config)
    assert torch.equal(torch.rand(1), want)
    assert all(p.requires_grad for p in base.model.parameters())
    assert base.model.model.layers[0].training
    assert not base.model.model.layers[1].training


def test_a_base_that_carries_an_adapter_keeps_it(tiny_llama, direction, few, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    chat = copy_of(tiny_llama)
    adapted = peft.get_peft_model(chat.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    config = ss.DistillConfig(n_steps=1, lora_rank=2)
    names = sorted(name for name, _ in adapted.named_parameters())
    recipe = ss.recipe("quick", **{"distill.lora_rank": 2})
    for train in (
        lambda: ss.distill((adapted, chat.tokenizer), direction, set_of([5]), few, config),
        lambda: ss.align((adapted, chat.tokenizer), tmp_path / "run", recipe, console=Console(quiet=True)),
    ):
        with pytest.raises(SafeSteerError, match="carries an adapter already"):
            train()
    assert sorted(name for name, _ in adapted.named_parameters()) == names


# --- one sentence ---


OF_ANOTHER = replace(set_of([]), tokens=(SafetyToken(5, " unlawful", 1, (1,), 0.0, 0.0, 0.0),))


def harmful_only(prompts: PromptSet) -> PromptSet:
    return PromptSet(tuple(p for p in prompts.prompts if p.label == "harmful"), "half")


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda c, d, p: ss.distill(c, d, set_of([5]), harmful_only(p), ONE_STEP), "hold no harmless ones"),
        (lambda c, d, p: ss.distill(c, d, set_of([5000]), p, ONE_STEP), "S has the token 5000"),
        (lambda c, d, p: ss.distill(c, d, set_of([]), p, ONE_STEP), "S holds no token"),
        (lambda c, d, p: ss.distill(c, d, OF_ANOTHER, p, ONE_STEP), "its token 5 is ' unlawful', and "),
        (lambda c, d, p: trace(c, d, OF_ANOTHER, p.harmful[:1], ["No"]), "Select S on the model itself"),
        (lambda c, d, p: trace(c, d, set_of([5000]), p.harmful[:1], ["No"]), "S has the token 5000"),
        (lambda c, d, p: ss.explain(c, d, OF_ANOTHER), "S is of another vocabulary"),
        (lambda c, d, p: answer_grid(c, d, OF_ANOTHER, prompts=["Hi"]), "S is of another vocabulary"),
        (lambda c, d, p: ss.lens(c, d, OF_ANOTHER), "S is of another vocabulary"),
        (lambda c, d, p: ss.distill(c, replace(d, layer=9), set_of([5]), p, ONE_STEP), "layers 0 to 2"),
        (lambda c, d, p: ss.select_tokens(c, d, []), "no prompts to select tokens on"),
        (lambda c, d, p: choose_coeff(c, [], ["Hi"], ss.refuses), "no directions to choose by"),
        (lambda c, d, p: choose_coeff(c, [d], [], ss.refuses), "no prompts to choose by"),
        (lambda c, d, p: calibrate_to_kl(c, d, [], target_kl=0.1), "no prompts to measure the KL on"),
    ],
)
def test_a_mistake_is_one_sentence(tiny_llama, direction, few, mistake, sentence):
    with pytest.raises(SafeSteerError, match=sentence):
        mistake(tiny_llama, direction, few)


@pytest.mark.parametrize("wrong", [{"layer": 9}, {"layer": -1}, {"vector": torch.ones(16)}])
def test_a_direction_of_another_shape_steers_nothing(tiny_llama, direction, wrong):
    with (
        pytest.raises(SafeSteerError, match="width 32 and layers 0 to 2: it belongs to another model"),
        ss.steer(tiny_llama, replace(direction, **wrong)),
    ):
        pass


def test_arguments_for_a_template_that_there_is_not(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(SafeSteerError, match="has no chat template"):
        set_template(tokenizer, None, {"enable_thinking": True})


# --- loading ---


def test_missing_weights_are_not_drawn_at_random(tiny_llama, tmp_path):
    ss.export(copy_of(tiny_llama), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if ".layers.1." not in n}, file, {"format": "pt"})
    with pytest.raises(SafeSteerError, match=r"lack 9 weights of LlamaForCausalLM \(model.layers.1"):
        load_model(str(tmp_path / "model"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SafeSteerError, match="Cannot load the model"):
        load_model(str(tmp_path / "model"))
    save_file({n: w[:3] if "norm" in n else w for n, w in weights.items()}, file, {"format": "pt"})
    with pytest.raises(SafeSteerError, match="Cannot load the model"):
        load_model(str(tmp_path / "model"))


def test_a_run_in_half_precision_finds_its_base_again(tiny_llama, tmp_path):
    base, run = copy_of(tiny_llama), tmp_path / "run"
    ss.export(base, tmp_path / "base")
    ss.export(base, run / "model")
    half = load_model(str(tmp_path / "base"), dtype="float16")
    manifest = {"model": str(tmp_path / "base"), "weights": weights_hash(half.model)}
    (run / "manifest.json").write_text(json.dumps(manifest | {"recipe": {"dtype": "float16"}}))
    models = load_target(run, run)
    assert {chat.model.dtype for chat in models.values()} == {torch.float16}


def test_a_model_without_ends_is_exported_as_it_is(tiny_llama, tmp_path):
    chat = with_own_tokenizer(tiny_llama)
    chat.model.generation_config.eos_token_id = None
    chat.tokenizer.eos_token = None
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert chat.eos_ids == []
    ss.export(chat, tmp_path / "model")
    assert "eos_token_id" not in json.loads((tmp_path / "model" / "generation_config.json").read_text())


# --- suites and tasks ---


def test_a_suite_goes_on_with_the_same_template_and_rows_only(tiny_llama, direction, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    rows_file(rows / "xstest.jsonl", [{"prompt": f"Hello {i}", "label": "safe"} for i in range(2)])
    short = Suite(("xstest",), n_prompts=2, max_new_tokens=2, perplexity_tokens=32)
    quiet = Console(quiet=True)
    measure = partial(ss.run_suite, suite=short, out=tmp_path / "suite", data=rows, console=quiet)
    first = measure(tiny_llama)
    assert measure(tiny_llama).equals(first)
    other = with_own_tokenizer(tiny_llama)
    set_template(other.tokenizer, "raw")
    with pytest.raises(SafeSteerError, match="an evaluation with another first words"):
        measure(other)
    with ss.steer(tiny_llama, direction, 8.0), pytest.raises(SafeSteerError, match="another first words"):
        measure(tiny_llama)
    # A gate that opens on no prompt changes no word, and a precision hardly any.
    shut = HarmfulnessReader(random_vector(32), 0.0, 1, "prompt", n_after=1, threshold=1e9)
    with ss.steer(tiny_llama, direction, gate=shut), pytest.raises(SafeSteerError, match="another acting"):
        measure(tiny_llama)
    half = copy_of(tiny_llama)
    half.model.bfloat16()
    with pytest.raises(SafeSteerError, match="acting"):
        measure(half)
    assert measure(tiny_llama).equals(first)
    rows_file(rows / "xstest.jsonl", [{"prompt": f"Hello {i}", "label": "safe"} for i in range(3)])
    with pytest.raises(SafeSteerError, match="an evaluation with another rows"):
        measure(tiny_llama)
    with pytest.raises(SafeSteerError, match=r"holds no piqa_val.jsonl"):
        ss.run_suite(tiny_llama, replace(short, tasks=("piqa",)), tmp_path / "new", data=rows)
    code = replace(short, tasks=(HUMANEVAL,))
    with pytest.raises(SafeSteerError, match=r"holds no humaneval.jsonl"):
        ss.run_suite(tiny_llama, code, tmp_path / "new", data=rows, allow_code=True)
    assert not (tmp_path / "new" / "parts").exists()


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("import sys\nsys.exit(0)\nassert False", False),
        ("if __name__ == '__main__': raise SystemExit(0)\nassert False", False),
        ("if __name__ == '__main__': input()\nassert True", True),
    ],
)
def test_a_program_passes_that_comes_to_its_end(program, passed):
    if not runs_code():
        pytest.skip("no namespaces for processes here")
    assert passes(program) is passed


def runs_code() -> bool:
    try:
        return passes("")
    except SafeSteerError:
        return False


def test_a_program_leaves_files_and_no_process(tmp_path):
    if not runs_code():
        pytest.skip("no namespaces for processes here")
    mine, late = tmp_path / "mine", tmp_path / "late"
    mine.write_text("kept")
    if ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1:  # Landlock
        assert not passes(f"import os\nos.remove({str(mine)!r})")
        assert not passes(f"open({str(mine)!r}, 'a')")
        assert passes("open('here', 'w').write('x')")
    assert mine.read_text() == "kept"
    wait = f"os.setsid()\n    time.sleep(1)\n    open({str(late)!r}, 'w')"
    passes(f"import os, time\nif os.fork() == 0:\n    {wait}")
    time.sleep(1.5)
    assert not late.exists()


def test_dropout_that_is_a_number_is_dropout(chatml_tokenizer):
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    chat = made(OPTForCausalLM, OPTConfig(**sizes, vocab_size=400, word_embed_proj_dim=32), chatml_tokenizer)
    chat.model.train()
    with pytest.raises(SafeSteerError, match="training mode"):
        perplexity(chat, "The tide comes in twice a day.")


def test_the_kl_of_short_answers_behind_a_shared_beginning(tiny_llama, direction):
    chat = copy_of(tiny_llama)
    first = [trace_ids(chat, prompt, 1)[0] for prompt in ("Hi", "Hello")]
    chat.model.generation_config.eos_token_id = sorted({*first, *chat.eos_ids})
    together = drift(chat, direction, ["Hi", "Hello"], 1.0, n_tokens=16)
    alone = drift(chat, direction, ["Hi"], 1.0, n_tokens=1)
    assert_near(together[:1], alone)


def test_the_harness_does_not_think_either(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    chat = with_own_tokenizer(tiny_llama)
    chat.tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %}<x></x>{% endif %}"
    )
    seen = {}

    def evaluate(lm, **options):
        seen["text"] = lm.apply_chat_template([{"role": "user", "content": "x"}])
        raise ValueError("enough")

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)
    pad = chat.tokenizer.pad_token
    with pytest.raises(SafeSteerError, match="enough"):
        measure_capability(chat, ["arc_easy"], tmp_path)
    assert seen["text"] == render(chat.tokenizer, "x")
    assert chat.tokenizer.pad_token == pad


def test_mmlu_names_its_subject(tmp_path):
    yaml = pytest.importorskip("yaml", reason="lm-eval is not installed")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    row = {"prompt": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1, "category": "machine_learning"}
    rows_file(tmp_path / "mmlu_stem.jsonl", [row])
    out = tmp_path / "tasks"
    write_tasks(out, tmp_path, ["mmlu_stem"])
    task = yaml.safe_load((out / "mmlu_stem_local.yaml").read_text())
    assert "(with answers) about {{subject}}.\n\n" in task["description"]
    assert json.loads((out / "mmlu_stem.jsonl").read_text())["subject"] == "machine learning"


# --- what newcomers met ---


def test_vectors_of_other_toolkits_are_ranked_by_what_they_do_when_added(tiny_llama, few):
    vectors = torch.stack([random_vector(32, seed) for seed in range(3)])
    candidates = replace(from_vector(tiny_llama, vectors), extraction="repeng")
    config = ss.DirectionConfig(n_val=2, n_controls=0, n_held_out=0)
    refusal = torch.tensor([5, 6])
    assert sweep(tiny_llama, candidates, few, refusal, config).rank_by == "steering"
    assert sweep(tiny_llama, mean_difference(tiny_llama, few), few, refusal, config).rank_by == "ablation"


def test_vectors_come_as_arrays_and_by_position(tiny_llama):
    one = random_vector(32)
    assert torch.equal(from_vector(tiny_llama, one.numpy()).vectors, from_vector(tiny_llama, one).vectors)
    by_position = torch.stack([random_vector(32, i) for i in range(15)]).view(5, 3, 32)
    candidates = from_vector(tiny_llama, by_position.double())
    assert candidates.positions == ("-5", "-4", "-3", "-2", "-1")
    assert torch.equal(candidates.direction(tiny_llama, "-2", 1).vector, by_position[3, 1])
    for wrong in (torch.ones(16), torch.ones(4, 32), torch.ones(5, 4, 32), torch.ones(1, 5, 3, 32)):
        with pytest.raises(SafeSteerError, match="does not fit 'tiny-llama'"):
            from_vector(tiny_llama, wrong)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_there_is_not_is_one_sentence(tiny_llama, layer):
    with (
        pytest.raises(SafeSteerError, match=f"no layer {layer}: the model has layers 0 to 2"),
        ss.add(tiny_llama, random_vector(32), layer),
    ):
        pass


def test_help_says_what_settings_mean():
    text = ss.DirectionConfig.__doc__
    assert text.startswith("Stage 1: read candidate directions")
    assert "    n_val_first: Successive halving:" in text


def test_a_prompt_set_where_a_list_belongs_names_its_kinds(few):
    with pytest.raises(SafeSteerError, match=r"pass its .harmful or .harmless"):
        as_prompts(few)


def test_an_argument_of_another_kind_is_one_sentence(tiny_llama, few):
    direction = from_vector(tiny_llama, random_vector(32)).direction(tiny_llama, "given", 1)
    tokens = ss.select_tokens(tiny_llama, direction, ["Hello"], ss.TokenConfig(k=2, horizon=1, n_samples=1))
    wrong = [
        (lambda: ss.distill(tiny_llama, tokens, direction, few), "A Direction belongs here, and a TokenSet"),
        (lambda: ss.explain(tiny_llama, tokens, direction), "A Direction belongs here, and a TokenSet"),
        (lambda: ss.select_tokens(tiny_llama, random_vector(32), ["Hello"]), "from_vector"),
        (lambda: ss.evaluate(tiny_llama, direction="direction.safetensors", prompts=few), "Direction.load"),
        (lambda: ss.find_direction(tiny_llama, ["Hello"]), r"PromptSet.from_texts\(harmful, harmless\)"),
        (lambda: ss.find_direction(tiny_llama, few, {"n_train": 4}), r"write ss.DirectionConfig\(...\)"),
        (lambda: ss.load_prompts("mine.jsonl"), "yours come with ss.PromptSet.from_jsonl"),
    ]
    for call, sentence in wrong:
        with unchecked(), pytest.raises(SafeSteerError, match=sentence):
            call()


# --- what a review of numbers met ---


def test_a_model_with_long_rope_reads_its_original_context_alone(chatml_tokenizer):
    """Its frequencies change with the longest row of a pass, so one long prompt would change all others."""
    shape = {**SIZES, "max_position_embeddings": 256, "num_key_value_heads": 2}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(**shape, vocab_size=len(chatml_tokenizer), pad_token_id=0, rope_parameters=rope)
    config.original_max_position_embeddings = 64
    chat = ss.ChatModel(Phi3ForCausalLM(config).eval(), chatml_tokenizer, "tiny-phi3")
    assert context_length(chat.model) == 64
    ss.generate(chat, ["Hello"], max_new_tokens=2)
    with pytest.raises(SafeSteerError, match="64"):
        ss.generate(chat, ["Hello", "long " * 80], max_new_tokens=2)


def test_an_adapter_that_leaves_experts_out_says_so(chatml_tokenizer):
    pytest.importorskip("peft", reason="needs the extra `lora`")
    from safesteer.models.adapter import with_adapter

    shape = {"num_local_experts": 4, "vocab_size": len(chatml_tokenizer)}
    mixtral = ss.ChatModel(MixtralForCausalLM(MixtralConfig(**SIZES, **shape)), chatml_tokenizer, "tiny")
    with pytest.warns(UserWarning, match=r"The adapter reaches \d+% of the weights of its blocks"):
        with_adapter(mixtral, 2, 4)


def test_drift_is_measured_along_the_ids_that_the_base_wrote(tiny_llama):
    """A text is stripped and tokenized again, which can be another answer."""
    student = copy_of(tiny_llama)
    with torch.no_grad():
        student.model.model.layers[1].mlp.down_proj.weight.mul_(-3)
    ids = [tiny_llama.encode("\n\n a river"), tiny_llama.encode("No")]
    texts = [tiny_llama.decode_answer(row) for row in ids]
    assert tiny_llama.encode(texts[0]) != ids[0]
    along = [float(kl.mean()) for kl in kl_at_positions(tiny_llama, student, ["Hi", "Ho"], ids)]
    assert kl_on_answers(tiny_llama, student, ["Hi", "Ho"], ids) == along
    assert kl_on_answers(tiny_llama, student, ["Hi", "Ho"], texts)[0] != along[0]


def test_a_search_that_goes_on_elsewhere_keeps_its_precision(tiny_llama, few, tmp_path, monkeypatch):
    chosen = ss.recipe("quick", **{"dtype": "auto", "distill.precision": "auto"})

    def settled(dtype: torch.dtype) -> tuple[str, str]:
        monkeypatch.setattr(precision, "fast_dtype", lambda device: dtype)
        run = Run(tmp_path, "no/model", chosen, few, ss.refuses, ss.refuses, Console(quiet=True))
        open_folder(run, tiny_llama, ())
        return run.settled.dtype, run.settled.distill.precision

    assert settled(torch.bfloat16) == ("bfloat16", "bfloat16")
    assert settled(torch.float32) == ("bfloat16", "bfloat16")
