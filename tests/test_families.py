"""Chat formats of six families, each on a tiny random model of its architecture.

The templates are written here; what they must produce is each family's documented chat format.
Nothing in the package knows these formats: positions are found by rendering.
"""

from dataclasses import dataclass

import pytest
import torch
from tokenizers import processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import PROMPTS, SIZES, _bpe, assert_near, batch_of, naive_logits, plainly_padded, random_vector
from safesteer.directions.extraction import mean_difference, system_contrast
from safesteer.directions.sweeping import sweep
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, as_chat
from safesteer.models.generation import generate, generate_ids
from safesteer.models.templates import render, suffix_length
from safesteer.settings import DirectionConfig
from safesteer.steering.interventions import ablate, add


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple[str, ...]
    config: type
    model: type
    before: str  # what the format writes before the user's words, and after them
    after: str
    eos: str
    bos: str | None = None  # written by the tokenizer as well: the second one must not appear
    system: bool = True


def chatml(default_system: str, after: str = "") -> str:
    system = f"<|im_start|>system\n{default_system}<|im_end|>\n" if default_system else ""
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '" + system.replace("\n", "\\n") + "' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + after + "{% endif %}"
    )


THINKING_OFF = "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
CHATML = ("<|im_start|>", "<|im_end|>")
TURN = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA_PARTS = (
    "<bos><start_of_turn>user\n",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<end_of_turn>",
    "<bos>",
    False,
)
GEMMA_SPECIAL = ("<bos>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "llama-3": Family(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
        " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        LlamaConfig,
        LlamaForCausalLM,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "qwen2.5": Family(
        chatml(QWEN),
        CHATML,
        Qwen2Config,
        Qwen2ForCausalLM,
        f"<|im_start|>system\n{QWEN}<|im_end|>\n{TURN[0]}",
        TURN[1],
        "<|im_end|>",
    ),
    "qwen3": Family(
        chatml("", THINKING_OFF),
        (*CHATML, "<think>", "</think>"),
        Qwen3Config,
        Qwen3ForCausalLM,
        TURN[0],
        f"{TURN[1]}<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "gemma-2": Family(GEMMA, GEMMA_SPECIAL, Gemma2Config, Gemma2ForCausalLM, *GEMMA_PARTS),
    "gemma-3": Family(GEMMA, GEMMA_SPECIAL, Gemma3TextConfig, Gemma3ForCausalLM, *GEMMA_PARTS),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ '[INST] ' + m['content'] + '\\n\\n' }}{% elif messages[0]['role'] == 'system' %}"
        "{{ m['content'] + '[/INST]' }}{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
        "{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        MistralConfig,
        MistralForCausalLM,
        "<s>[INST] ",
        "[/INST]",
        "</s>",
        "<s>",
    ),
    "smollm2": Family(
        chatml(SMOL),
        CHATML,
        LlamaConfig,
        LlamaForCausalLM,
        f"<|im_start|>system\n{SMOL}<|im_end|>\n{TURN[0]}",
        TURN[1],
        "<|im_end|>",
    ),
}


def build(name: str) -> ChatModel:
    family = FAMILIES[name]
    bpe = _bpe(list(family.special))
    if family.bos:
        bos = (family.bos, bpe.token_to_id(family.bos))
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        chat_template=family.template,
    )
    extra = {"head_dim": 8} if family.config is not LlamaConfig else {}
    extra |= {"pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    model = family.model(family.config(**SIZES, vocab_size=400, num_hidden_layers=3, **extra))
    model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return ChatModel(model, tokenizer, name)


@pytest.fixture(scope="module", params=list(FAMILIES))
def member(request) -> tuple[Family, ChatModel]:
    return FAMILIES[request.param], build(request.param)


def test_rendered_text_is_the_familys_format(member):
    family, chat = member
    assert render(chat.tokenizer, "Hello you") == f"{family.before}Hello you{family.after}"


def test_post_instruction_positions_are_the_formats_last_tokens(member):
    family, chat = member
    n = suffix_length(chat.tokenizer)
    ids = batch_of(chat, ["What is a tide?"]).prompt_ids[0].tolist()
    assert chat.tokenizer.decode(ids[-n:]) == family.after
    assert n == len(chat.tokenizer(family.after, add_special_tokens=False).input_ids)


def test_there_is_one_bos(member):
    family, chat = member
    ids = batch_of(chat, ["What is a tide?"]).prompt_ids[0].tolist()
    assert ids.count(chat.tokenizer.bos_token_id) == (1 if family.bos else 0)


def test_a_padded_batch_equals_single_prompts(member):
    _, chat = member
    together = naive_logits(chat, plainly_padded(chat))[:, -1]
    for row, prompt in enumerate(PROMPTS):
        assert_near(together[row], naive_logits(chat, batch_of(chat, [prompt]))[0, -1])
    answers = generate(chat, PROMPTS, max_new_tokens=4)
    assert answers == [generate(chat, [p], max_new_tokens=4)[0] for p in PROMPTS]


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_a_bridge_steers_alike(member, operation):
    _, chat = member
    vector, answers = random_vector(32), []
    for each in (chat, as_chat(to_bridge(chat))):
        how = add(each.model, vector, 1, 3.0) if operation == "add" else ablate(each.model, vector)
        with how:
            answers.append(generate_ids(each, batch_of(each), max_new_tokens=4).tolist())
    assert answers[0] == answers[1]


def test_directions_and_scores_come_out(member, few):
    _, chat = member
    found = mean_difference(chat, few)
    assert len(found.positions) == suffix_length(chat.tokenizer)
    table = sweep(chat, found, few.first(2), torch.tensor([7, 40, 90]), DirectionConfig(controls=())).table
    assert table[table.layer < 2].steering_refusal.notna().all()


def test_a_system_prompt_reaches_every_template(member, few):
    family, chat = member
    text = render(chat.tokenizer, "Hello you", system="Be kind.")
    assert text.count("Be kind.") == 1
    if not family.system:
        assert text == f"{family.before}Be kind.\n\nHello you{family.after}"
    assert system_contrast(chat, few.first(2)).vectors.abs().max() > 0
