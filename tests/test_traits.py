"""Short cuts are earned: whatever the family, a batch gives what single prompts give."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import PROMPTS, SIZES, _used, assert_near, random_vector
from safesteer.models.chat_model import ChatModel, blocks
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate, generate_ids, uniforms
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.traits import check_model, traits_of
from safesteer.steering.interventions import ablate

SMALL = {**SIZES, "vocab_size": 400, "num_hidden_layers": 3, "head_dim": 8, "bos_token_id": None}
WINDOW = {**SMALL, "sliding_window": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
MIXED = ["full_attention", "linear_attention", "full_attention"]
FAMILIES = {
    "llama": ("llama", SMALL, "all"),
    "mistral with a window": ("mistral", WINDOW, "no prefix"),
    "gemma 3 with a window": ("gemma3_text", WINDOW, "no prefix"),
    "phi 3 with a window": ("phi3", {**WINDOW, "pad_token_id": 0}, "no prefix"),
    "olmo 3 with a window": ("olmo3", WINDOW, "no prefix"),
    "cohere": ("cohere", {**SMALL, "logit_scale": 0.25}, "all"),
    "cohere 2 with a window": ("cohere2", {**WINDOW, "logit_scale": 0.25}, "no prefix"),
    "granite": ("granite", {**SMALL, "logits_scaling": 8.0, "residual_multiplier": 0.3}, "all"),
    "lfm 2": (
        "lfm2",
        {**SMALL, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        "",
    ),
    "qwen 3 next": (
        "qwen3_next",
        {
            **SMALL,
            "layer_types": MIXED,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        "",
    ),
    "jamba": (
        "jamba",
        {
            **SMALL,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        "",
    ),
    "falcon h1": ("falcon_h1", {**SMALL, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}, ""),
    "granite 4 h": (
        "granitemoehybrid",
        {**SMALL, **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "logits_scaling": 6.0},
        "",
    ),
    "mpt, which has ALiBi": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 400, "max_seq_len": 256},
        "no prefix",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request, chatml_tokenizer) -> tuple[ChatModel, str]:
    kind, sizes, expected = FAMILIES[request.param]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**sizes, eos_token_id=chatml_tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.generation_config.pad_token_id = chatml_tokenizer.pad_token_id
    return _used(ChatModel(model, chatml_tokenizer, request.param)), expected


@torch.no_grad()
def own_logits(chat: ChatModel, ids: list[int]) -> torch.Tensor:
    """The model's own forward pass on one prompt: no padding, no cache, nothing of ours."""
    return chat.model(torch.tensor([ids]), use_cache=False).logits[0]


def test_what_is_measured_is_what_the_family_does(family):
    chat, expected = family
    traits = traits_of(chat.model)
    assert traits.pads
    if expected:
        assert traits.shares_prefix == (expected == "all")
    assert list(check_model(chat).check) == ["logits", "padding", "shared prefix", "repeated cache"]


def test_batches_give_the_models_own_logits(family):
    chat, _ = family
    for rows, batch in chat.batched(PROMPTS, 4):
        with torch.no_grad():
            got = logits_of(final_hidden(chat.model, batch)[:, -1], *output_head(chat.model))
        for at, row in enumerate(rows):
            ids = next(b for _, b in chat.batched([PROMPTS[row]], 1)).prompt_ids[0].tolist()
            assert_near(got[at], own_logits(chat, ids)[-1], 1e-3)


def test_greedy_answers_in_a_batch_are_those_of_single_prompts(family):
    chat, _ = family
    together = generate(chat, PROMPTS, max_new_tokens=8)
    assert together == [generate(chat, [p], max_new_tokens=8)[0] for p in PROMPTS]
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids = next(b for _, b in chat.batched([prompt], 1)).prompt_ids[0].tolist()
        new: list[int] = []
        while len(new) < 8 and not (new and new[-1] in chat.eos_ids):
            new.append(int(own_logits(chat, [*ids, *new])[-1].argmax()))
        assert chat.decode_answer(new) == answer


def test_samples_do_not_depend_on_the_short_cuts(family):
    chat, _ = family
    (_, batch) = next(iter(chat.batched(PROMPTS[:2], 2)))
    drawn = torch.cat([uniforms((0, i), 2, 5) for i in range(2)])
    sampled = generate_ids(chat, batch, max_new_tokens=5, temperature=1.0, n_samples=2, uniform=drawn)
    assert sampled.shape[0] == 4
    for i, row in enumerate(sampled.tolist()):
        ids = batch.prompt_ids[i // 2][batch.attention_mask[i // 2].bool()].tolist()
        for step, token in enumerate(row):
            if step and row[step - 1] in chat.eos_ids:
                break
            cdf = own_logits(chat, [*ids, *row[:step]])[-1].double().softmax(-1).cumsum(-1)
            low = float(cdf[token - 1]) if token else 0.0
            assert low - 1e-4 <= float(drawn[i, step]) <= float(cdf[token]) + 1e-4


def test_ablation_leaves_nothing_of_the_direction(family):
    """Read by hooks of its own: what every block reads and what it returns."""
    chat, _ = family
    unit = random_vector(chat.d_model)
    unit = unit / unit.norm()
    left, handles = [], []

    def read(module, args, output):
        for h in (args[0] if args else None, output[0] if isinstance(output, tuple) else output):
            if isinstance(h, torch.Tensor) and h.shape[-1] == len(unit):
                left.append(float((h @ unit).abs().max() / h.norm(dim=-1).max()))

    with ablate(chat, unit):
        handles = [block.register_forward_hook(read) for block in blocks(chat.model)]
        for _, batch in chat.batched(PROMPTS, 4):
            with torch.no_grad():
                final_hidden(chat.model, batch)
    for handle in handles:
        handle.remove()
    assert len(left) >= 3
    assert max(left[1:]) < 1e-5
