"""Models and tokenizers that are built differently: the whole method on each, or one clear sentence."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from conftest import SIZES, _bpe, _chat, copy_of, naive_logits, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions.extraction import mean_difference
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.exporting import check_reload, export
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate
from safesteer.models.head import output_head
from safesteer.models.loading import load_model
from safesteer.settings import DistillConfig, TokenConfig
from safesteer.tokens.selection import select_tokens

PLAIN = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


def tokenizer_of(**changes) -> PreTrainedTokenizerFast:
    """No BOS, and one token that ends answers and pads, unless changed."""
    special = ["<|user|>", "<|assistant|>", "<|end|>", "<|start|>"]
    options = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": PLAIN, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=_bpe(special), **options)


def llama(tokenizer, **changes) -> ChatModel:
    options = {"vocab_size": 400, "num_hidden_layers": 3, "bos_token_id": None, **changes}
    return _chat(LlamaForCausalLM, LlamaConfig(**SIZES, **options), tokenizer, "odd")


def untied(tokenizer):
    return llama(tokenizer, tie_word_embeddings=False)


def padded_vocabulary(tokenizer):
    return llama(tokenizer, vocab_size=448)


def bias_in_the_head(tokenizer):
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    shape = {"vocab_size": 400, "num_hidden_layers": 3, "bos_token_id": None, "partial_rotary_factor": 0.5}
    config = PhiConfig(**sizes, **shape)
    chat = _chat(PhiForCausalLM, config, tokenizer, "odd")
    chat.model.lm_head.bias.data.normal_()
    return chat


def added_tokens(tokenizer):
    tokenizer.add_tokens(["refusenik", "safetyword"])
    chat = llama(tokenizer)
    chat.model.resize_token_embeddings(len(tokenizer))
    return chat


TOKENIZERS = {
    "pad is eos, no BOS": {},
    "no pad token": {"pad_token": None},
    "unknown token": {"unk_token": "<|start|>"},
    "pads on the right": {"padding_side": "right"},
    "truncates on the left": {"truncation_side": "left"},
}


def whole_method(chat: ChatModel, few, tmp_path) -> None:
    """Direction, tokens, two steps, export: numbers are finite, the export is the student."""
    candidates = mean_difference(chat, few)
    direction = candidates.direction(chat, candidates.positions[-1], 1, prompts=few)
    direction = replace(direction, vector=random_vector(32, seed=3), coeff=2.0)
    config = TokenConfig(k=6, k_vote=8, horizon=2, n_samples=2, min_steered_prob=0.0, batch_size=2)
    tokens = select_tokens(chat, direction, few.harmless[:3], config)
    n_real = len(chat.tokenizer)
    assert max(tokens.ids.tolist()) < n_real
    assert not set(tokens.ids.tolist()) & set(chat.tokenizer.all_special_ids)
    options = {"n_steps": 2, "harmful_per_step": 2, "harmless_per_step": 1, "max_new_tokens": 3, "lr": 1e-2}
    settings = DistillConfig(**options)
    state = prepare_student(copy_of(chat), direction, settings)
    records = list(training_steps(state, Teacher(chat, direction, tokens), few))
    assert all(math.isfinite(r.loss) and r.grad_norm > 0 for r in records)
    export(state.student, tmp_path / "model")
    assert check_reload(tmp_path / "model") < 1e-5
    assert len(generate(state.student, few.harmful[:2], max_new_tokens=3)) == 2


@pytest.mark.parametrize("build", [untied, padded_vocabulary, bias_in_the_head, added_tokens])
def test_models_built_otherwise(build, few, tmp_path):
    chat = build(tokenizer_of())
    batch = PromptBatch.of(chat.tokenizer, few.harmful[:3])
    _, bias, softcap, _ = output_head(chat.model)
    assert (bias is not None) == (build is bias_in_the_head)
    assert softcap is None
    assert bool(naive_logits(chat, batch).isfinite().all())
    whole_method(chat, few, tmp_path)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_built_otherwise(name, few, tmp_path):
    whole_method(llama(tokenizer_of(**TOKENIZERS[name])), few, tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only in pairs') }}", "only in pairs"),
        ("{{ nothing.at.all }}", "failed"),
        ("{% if %}", "failed"),
        (None, "no chat template"),
    ],
)
def test_templates_that_fail_are_one_sentence(template, message, few):
    chat = llama(tokenizer_of(chat_template=template))
    with pytest.raises(SafeSteerError, match=message) as error:
        generate(chat, few.harmful[:1])
    assert "Traceback" not in str(error.value)


def load_as_quantized(tmp_path, **quantization) -> tuple[ChatModel, ChatModel]:
    """(a model, what loads from its folder once its config calls the same plain weights quantized)."""
    chat = llama(tokenizer_of())
    chat.model.save_pretrained(tmp_path)
    chat.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    return chat, load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("quantization", "package", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes",
            "weights of .* cannot be read",
        ),
        ({"quant_method": "gptq", "bits": 4}, "optimum", "Cannot load the model"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel", "Cannot load the model"),
    ],
)
def test_a_quantized_model_that_cannot_be_read_is_one_sentence(quantization, package, message, tmp_path):
    """The weights are not in the form that the config says, or what reads that form is missing."""
    is_there = find_spec(package) is not None
    if is_there != (package == "bitsandbytes"):
        pytest.skip(f"what is said depends on {package}, which is {'' if is_there else 'not '}installed")
    with pytest.raises(SafeSteerError, match=message) as error:
        load_as_quantized(tmp_path, **quantization)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quantization_that_transformers_does_not_know_leaves_the_weights_as_they_are(tmp_path):
    chat, loaded = load_as_quantized(tmp_path, quant_method="made-up", bits=4)
    want, got = chat.model.state_dict(), loaded.model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], weight) for name, weight in want.items())


def test_a_prompt_longer_than_the_context_is_one_sentence(tiny_llama):
    long = "word " * 100_000
    with pytest.raises(SafeSteerError, match=r"tokens, and the model reads 256: shorten it"):
        generate(tiny_llama, [long, "short"], max_new_tokens=2)
