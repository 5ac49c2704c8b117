"""A base in 4 bits: what its weights cannot do is said in a sentence, and an adapter learns on them."""

import copy
import json
from importlib.metadata import version
from importlib.util import find_spec

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_exporting import saved, weights_in
from test_pipeline import QUIET, SMALL
from torch import nn

from conftest import PROMPTS, assert_near, batch_of, copy_of, n_hooks, naive_logits
from safesteer._errors import SafeSteerError
from safesteer.alignment import align
from safesteer.directions.inspection import component_contributions
from safesteer.distillation.loop import Training, distill, training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.targets import load_target
from safesteer.exporting import check_reload, export
from safesteer.models import loading
from safesteer.models.adapter import shares_weights, without_adapter
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import as_chat
from safesteer.models.hashing import weights_hash
from safesteer.models.loading import load_model
from safesteer.models.logits import kl_divergence
from safesteer.models.parts import blocks, is_quantized
from safesteer.models.precision import weight_dtype
from safesteer.recipes import recipe
from safesteer.run_folder import STAGES
from safesteer.settings import DistillConfig
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import SafetyToken, TokenSet

ROUNDED = {
    **SMALL,
    "quantize": "4bit",
    "distill.lora_rank": 4,
    "distill.lr": 1e-2,
    "distill.keep_adapter": "true",
}
STEPS = {"n_steps": 2, "harmful_per_step": 2, "harmless_per_step": 2, "max_new_tokens": 3, "lr": 1e-2}


# --- sentences, which need no library ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantize": "8bit"}, "quantize is '4bit' or None, not '8bit'"),
        ({"name": "some/model.gguf", "quantize": "4bit"}, "come dequantized from a GGUF file"),
        ({"name": "smollm2-135m", "quantize": "4bit"}, "come dequantized from a GGUF file"),
        ({"quantize": "4bit"}, r"pip install 'safesteer\[quant\]'"),
    ],
)
def test_what_cannot_be_quantized_is_named(options, sentence, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda package: None)
    monkeypatch.setattr(loading, "named_source", lambda name, revision: "a folder made of a GGUF file")
    with pytest.raises(SafeSteerError, match=sentence):
        load_model(**{"name": "some/model", **options})


def test_weights_are_quantized_once(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda package: True)
    config = json.loads((saved(tiny_llama, tmp_path) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SafeSteerError, match="are quantized already: load it without quantize"):
        load_model(str(tmp_path), quantize="4bit")


@pytest.fixture
def tokens() -> TokenSet:
    """A few tokens, as S: which ones does not matter here."""
    chosen = tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in range(40, 48))
    return TokenSet(chosen, {}, {}, 1)


@pytest.fixture
def stored(tiny_llama):
    """A model that stores one weight as integers, as every library does."""
    chat = copy_of(tiny_llama)
    whole = blocks(chat.model)[2].self_attn.o_proj
    whole.weight = nn.Parameter(whole.weight.mul(10).to(torch.uint8), requires_grad=False)
    assert is_quantized(chat.model)
    assert not is_quantized(tiny_llama.model)
    return chat


def test_quantized_weights_train_under_an_adapter_only(stored, direction, tokens, few, tmp_path):
    with pytest.raises(SafeSteerError, match=r"set distill\.lora_rank"):
        prepare_student(stored, direction, DistillConfig())
    with pytest.raises(SafeSteerError, match=r"distill\.sharded cannot spread quantized weights"):
        prepare_student(stored, direction, DistillConfig(lora_rank=4, sharded=True))
    with pytest.raises(SafeSteerError, match="A quantized base needs `align`"):
        distill(stored, direction, tokens, few, DistillConfig(lora_rank=4), training=Training(tmp_path))


def test_what_reads_whole_weights_says_so(stored, direction, few, tmp_path):
    with pytest.raises(SafeSteerError, match="are quantized, and an export is not"):
        export(stored, tmp_path / "model")
    with pytest.raises(SafeSteerError, match="which are quantized here"):
        component_contributions(stored, direction, few)
    assert not list(tmp_path.iterdir())


def test_a_run_says_before_any_work_what_it_cannot_do(stored, tiny_llama, tmp_path):
    for chat, settings, sentence in (
        (stored, {}, r"set distill\.lora_rank"),
        (stored, {"distill.lora_rank": 4}, "pass the name of an unquantized model"),
        (tiny_llama, {"quantize": "4bit"}, "give them to load_model"),
    ):
        with pytest.raises(SafeSteerError, match=sentence):
            align(chat, tmp_path / "run", recipe(**SMALL, **settings), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_recipe_knows_one_word():
    assert recipe(quantize="4bit").source["quantize"] == "4bit"
    assert recipe(quantize="none").source["quantize"] is None
    with pytest.raises(SafeSteerError, match="quantize must be '4bit'"):
        recipe(quantize="8bit")


# --- with the library ---


needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None or find_spec("peft") is None,
    reason="bitsandbytes or peft is not installed (pip install 'safesteer[quant]')",
)


@pytest.fixture
def rounded(chat, tmp_path):
    """Each tiny model, saved and loaded in 4 bits."""
    return load_model(str(saved(chat, tmp_path / "whole")), device="cpu", quantize="4bit")


@pytest.fixture
def rounded_llama(tiny_llama, tmp_path):
    return load_model(str(saved(tiny_llama, tmp_path / "whole")), device="cpu", quantize="4bit")


def dequantized(chat):
    """The same model with its rounded weights in plain layers."""
    return type(chat)(copy.deepcopy(chat.model).dequantize(torch.float32), chat.tokenizer, chat.name)


@needs_library
def test_a_rounded_model_is_read_as_its_weights_say(rounded, chat):
    """By the same weights in plain layers: everything that is measured when a model is loaded is right."""
    assert is_quantized(rounded.model)
    assert not is_quantized(dequantized(rounded).model)
    assert weight_dtype(rounded.model) == torch.float32  # embedding and head are whole
    assert_near(
        naive_logits(rounded, batch_of(chat)), naive_logits(dequantized(rounded), batch_of(chat)), 1e-5
    )
    off = naive_logits(rounded, batch_of(chat)) - naive_logits(chat, batch_of(chat))
    assert off.abs().max() > 1e-2
    table, want = rounded.check(), chat.check()
    assert table.right.tolist() == want.right.tolist()
    assert rounded.fingerprint == chat.fingerprint
    assert weights_hash(rounded.model) == weights_hash(rounded.copy().model) != weights_hash(chat.model)
    assert n_hooks(rounded.model) == n_hooks(chat.model)


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_layers_compute_in_the_precision_of_the_rest(tiny_llama, tmp_path, dtype):
    folder = saved(tiny_llama, tmp_path, torch.bfloat16)
    half = load_model(str(folder), dtype=dtype, device="cpu", quantize="4bit")
    assert weight_dtype(half.model) == torch.bfloat16
    assert blocks(half.model)[0].self_attn.q_proj.compute_dtype == torch.bfloat16
    assert bool(half.check().right.all())


@needs_library
def test_gradients_pass_through_rounded_weights(rounded_llama, direction):
    """Those of an adapter on the same weights in plain layers, also after a pass without gradients."""
    config, ids = DistillConfig(lora_rank=4, train_layers="blocks"), torch.tensor([[5, 6, 7, 8]])
    grads = []
    for chat in (dequantized(rounded_llama), rounded_llama):
        with torch.no_grad():
            chat.model(ids)
        state = prepare_student(chat, direction, config)
        state.student.model(ids).logits.pow(2).sum().backward()
        grads.append({name: p.grad for name, p in state.trained.items() if "lora_B" in name})
    assert all(float(grad.abs().max()) > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert_near(grads[1][name], grad, 1e-4)


@needs_library
def test_an_adapter_learns_on_rounded_weights(rounded_llama, direction, tokens, few):
    base, before = rounded_llama, rounded_llama.copy()
    twin = dequantized(base)
    config, histories = DistillConfig(lora_rank=4, **STEPS), []
    for chat in (twin, base):
        state = prepare_student(chat, direction, config)
        assert shares_weights(chat, state.student)
        histories.append(list(training_steps(state, Teacher(chat, direction, tokens), few)))
    assert [r.step for r in histories[1]] == [1, 2]
    for got, want in zip(histories[1], histories[0], strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-4)
        assert got.mass_on_s_student == pytest.approx(want.mass_on_s_student, rel=1e-4)
    ids = batch_of(base, PROMPTS[:2])
    moved = naive_logits(state.student, ids)
    again = without_adapter(state.student)
    assert torch.equal(naive_logits(again, ids), naive_logits(before, ids))
    assert (moved - naive_logits(before, ids)).abs().max() > 1e-3


@needs_library
def test_a_bridge_reads_rounded_weights_and_is_not_copied(rounded_llama):
    bridge = as_chat(to_bridge(rounded_llama))
    ids = batch_of(rounded_llama, PROMPTS[:1])
    assert_near(bridge.model(ids.prompt_ids), naive_logits(rounded_llama, ids), 1e-4)
    with pytest.raises(SafeSteerError, match="cannot be copied: pass the plain model"):
        bridge.copy()


@needs_library
def test_a_run_trains_in_4_bits_and_exports_whole_weights(tiny_llama, tmp_path):
    folder = saved(tiny_llama, tmp_path / "whole", torch.bfloat16)
    run = align(str(folder), tmp_path / "run", recipe(**ROUNDED), stages=STAGES[:5], console=QUIET)
    manifest = json.loads((run / "manifest.json").read_text())
    assert list(manifest["stages"]) == list(STAGES[:5])
    assert manifest["recipe"]["quantize"] == "4bit"
    assert manifest["versions"]["bitsandbytes"] == version("bitsandbytes")
    assert check_reload(run / "model") < 1e-2
    card = (run / "model" / "README.md").read_text()
    assert "in 4 bits, nf4, while it was trained and measured" in card
    assert "The weights in this folder are not quantized" in card
    assert "quantization_config" not in json.loads((run / "model" / "config.json").read_text())
    looks = pd.read_csv(run / "looks.csv").query("split == 'test'")
    assert looks.weights.nunique() == 2  # base and student

    # The export is the base's own weights, as its files have them, and the adapter.
    whole, got = weights_in(folder), weights_in(run / "model")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    scale = DistillConfig().lora_alpha / 4
    n_merged = 0
    for name, weight in whole.items():
        low = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        want = weight.float()
        if f"{low}A.weight" in adapter:
            want, n_merged = (
                want + scale * adapter[f"{low}B.weight"] @ adapter[f"{low}A.weight"],
                n_merged + 1,
            )
        assert torch.equal(got[name], want.bfloat16()), name
    assert n_merged == 7 * (3 - Direction.load(run / "direction.safetensors").layer)

    # What is measured is the export, rounded as its base was: next to the student that was trained.
    peft = pytest.importorskip("peft")
    models = load_target(run, run)
    assert all(is_quantized(chat.model) for chat in models.values())
    base = naive_logits(models["base"], batch_of(tiny_llama))
    trained = type(tiny_llama)(
        peft.PeftModel.from_pretrained(models["base"].model, run / "adapter"), tiny_llama.tokenizer, ""
    )
    want, got = (
        naive_logits(trained, batch_of(tiny_llama)),
        naive_logits(models["student"], batch_of(tiny_llama)),
    )
    assert kl_divergence(want, got).mean() < 0.5 * kl_divergence(want, base).mean()
