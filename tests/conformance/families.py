"""Tiny random models of every causal family that transformers can build here, from its config with sizes cut.

A config's defaults stay but for the sizes: what makes a family different (windows, experts, state-space
layers, scales, tied heads) is what its own config says. `VARIANTS` add what the defaults leave out.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from conftest import chatml
from safesteer.models.chat_model import ChatModel

MOST_WEIGHTS = 8_000_000  # of a tiny model: more means that a size was not cut
N_VOCAB = 400

# Every name under which a family may keep a size. Only names that its config has are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "linear_num_value_heads", "linear_num_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24
    ),
    "moe_shared_expert_intermediate_size": 24,
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "linear_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8
    ),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("initializer_range", "init_std"), 0.15),  # answers that differ from prompt to prompt
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), None),
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size": N_VOCAB,
    "vocab_size_per_layer_input": N_VOCAB,
    "eos_token_id": 2,
}

# What single families need beside that: sizes that hang together, and as many layer types as layers.
ALL_HEADS = {"num_key_value_heads": 4}
LATENT = {**ALL_HEADS, "head_dim": 4}  # multi-head latent attention: the rotary part alone
# Few heads would all be cut off at 0 for many tokens, and which of those are taken is anybody's choice.
INDEXED = {**LATENT, "index_n_heads": 32, "index_head_dim": 8, "index_topk": 8}
SPECIAL_IDS = {"bos_token_id": 1, "pad_token_id": 0}
ATTENTION = "full_attention"
DELTA_NET = {"layer_types": [ATTENTION, "linear_attention", ATTENTION]}
NEEDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v2", "minicpm3", "glm4_moe_lite", "kimi_linear", "dots3_note_text"), ALL_HEADS
    ),
    **dict.fromkeys(("deepseek_v3", "axk1", "longcat_flash", "youtu"), LATENT),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2"), INDEXED),
    "bamba": {"attn_layer_indices": [1]},
    "cwm": SPECIAL_IDS,
    "modernbert-decoder": SPECIAL_IDS,
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "gptj": {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "dots1": {"layer_types": [ATTENTION] * 3, "n_shared_experts": 1, "n_routed_experts": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", ATTENTION, "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", ATTENTION, "conv"], "num_dense_layers": 1},
    "mamba2": {"hidden_size": 32, "expand": 2, "num_heads": 4, "head_dim": 16},
    "olmo_hybrid": DELTA_NET,
    "qwen3_next": DELTA_NET,
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": DELTA_NET,
    "zamba": {
        "num_hidden_layers": 5,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "attention_hidden_size": 64,
    },
    "qwen2_5_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"]},
}

# (family, settings beside the tiny ones): what the defaults of a family leave out.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, padded head": ("llama", {"vocab_size": 416}),
    "llama, bfloat16": ("llama", {}),
    "gemma 2, bfloat16": ("gemma2", {}),
    "gemma 2, soft caps": ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "mistral, window of 8": ("mistral", {"sliding_window": 8}),
    "gemma 3, window of 8": ("gemma3_text", {"sliding_window": 8}),
    "phi 3, window of 8": ("phi3", {"sliding_window": 8}),
    "qwen 2, window of 8": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "cohere, logit scale": ("cohere", {"logit_scale": 0.25}),
    "cohere 2, window of 8": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    "granite, scales": (
        "granite",
        {"logits_scaling": 8.0, "residual_multiplier": 0.3, "embedding_multiplier": 6.0},
    ),
    "falcon, old block": (
        "falcon",
        {"new_decoder_architecture": False, "parallel_attn": False, "alibi": True},
    ),
    "falcon, new block": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt-neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt-oss, window of 8": ("gpt_oss", {"sliding_window": 8}),
    "falcon h1, head multiplier": ("falcon_h1", {"lm_head_multiplier": 0.5}),
    "olmo 3, window of 8": ("olmo3", {"sliding_window": 8}),
}
# Models by name: what their published configs say beside the sizes; a window is cut to 8, below the prompts.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
SLIDING = {"sliding_window": 8}
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3 0.6B to 4B": ("qwen3", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "Qwen3 8B to 32B": ("qwen3", {"tie_word_embeddings": False, "use_sliding_window": False}),
    "Qwen3 30B-A3B": ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 1}),
    "Qwen3.5": ("qwen3_5_text", {"tie_word_embeddings": False}),
    "Qwen3-Next": ("qwen3_next", {"norm_topk_prob": True}),
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "Llama 3.2 1B, 3B": (
        "llama",
        {"rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "Gemma 3 1B": (
        "gemma3_text",
        {**SLIDING, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "Mistral 7B v0.1": ("mistral", SLIDING),
    "Mistral 7B v0.3, Nemo, Small": ("mistral", {"sliding_window": None}),
    "Phi-4": ("phi3", {"sliding_window": None, "tie_word_embeddings": False}),
    "Phi-4-mini": (
        "phi3",
        {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 16, "hidden_size": 64},
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {**YARN, "rope_theta": 1.5e5, "truncate": False},
        },
    ),
    "GLM-4.5": ("glm4_moe", {"use_qk_norm": True, "norm_topk_prob": True}),
    "GLM-4.5 Air": ("glm4_moe", {"use_qk_norm": False, "norm_topk_prob": True}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            **dict.fromkeys(("n_routed_experts", "num_local_experts"), 8),
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "rope_parameters": {
                **YARN,
                "factor": 40.0,
                "rope_theta": 1e4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
}
WRAPPERS = ("gemma3", "qwen2_5_vl", "mistral3", "qwen3_5")  # text inside a multimodal model

# Not language models that read from left to right, or (last row) not a model by itself.
NOT_CAUSAL = frozenset(
    [
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "marian",
        "mbart",
        "megatron-bert",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "musicgen",
        "musicgen_melody",
        "moshi",
        "git",
        "mllama",
        "fuyu",
        "emu3",
        "got_ocr2",
        "moss_transcribe_diarize",
        "phi4_multimodal",
        "gemma4_assistant",
        "gemma4_unified_assistant",
        "gpt-sw3",
    ]
)


def family_names() -> list[str]:
    """Every causal family by its model type, then variants and wrappers."""
    plain = [name for name in CAUSAL if name not in NOT_CAUSAL and not _is_wrapper(name)]
    return [*REAL, *plain, *VARIANTS, *(f"{name} (multimodal)" for name in WRAPPERS)]


def _is_wrapper(name: str) -> bool:
    """A config that holds a text config: its text part stands in the list by itself."""
    return f"{name}_text" in CAUSAL


def build(name: str) -> ChatModel:
    """Build the tiny model of a name from `family_names`, frozen, with the ChatML tokenizer."""
    if name.endswith(" (multimodal)"):
        config, auto = _wrapper_config(name.removesuffix(" (multimodal)")), AutoModelForImageTextToText
    else:
        kind, settings = (REAL | VARIANTS).get(name, (name, {}))
        config, auto = _text_config(CONFIG_MAPPING[kind](), settings, kind), AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{name} has {size:,} weights: a size is not cut")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    return _chat(model.bfloat16() if name.endswith("bfloat16") else model, name)


def _chat(model: PreTrainedModel, name: str) -> ChatModel:
    tokenizer = chatml()
    model.eval().requires_grad_(False)
    torch.manual_seed(1)
    for p in model.parameters():  # vectors that start at 0 or 1 (biases, norms) would hide a mistake
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape).to(p)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return ChatModel(model, tokenizer, name)


def _text_config(config: PretrainedConfig, settings: Mapping[str, Any], kind: str) -> PretrainedConfig:
    """Cut the sizes of a text config."""
    names = set(config.to_dict()) | set(config.attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in names}
    types = config.to_dict().get("layer_types")
    if isinstance(types, list):
        sizes["layer_types"] = _spread(types, 3)
    more = NEEDS.get(config.model_type, NEEDS.get(kind, {}))
    return type(config)(**{**sizes, **more, **settings})


def _spread(types: list[str], n: int) -> list[str]:
    """Take n layer types so that each kind that there is comes in, attention last."""
    kinds = sorted(set(types), key=types.index)
    return (kinds * n)[:n] if len(kinds) > 1 else types[:1] * n


def _wrapper_config(name: str) -> PretrainedConfig:
    """Cut a multimodal config: its text part as above, its vision part to almost nothing."""
    whole = CONFIG_MAPPING[name]()
    text = _text_config(whole.get_text_config(), {}, name)
    vision = whole.vision_config.to_dict()
    small = {
        k: v
        for k, v in {
            **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "embed_dim"), 32),
            **dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_heads"), 2),
            "image_size": 28,
            "num_position_embeddings": 16,
            "fullatt_block_indexes": [1],
            "deepstack_visual_indexes": [1],
            "global_head_dim": 16,
            "head_dim": 16,
            "num_key_value_heads": 2,
        }.items()
        if k in vision
    }
    kept = {k: v for k, v in vision.items() if k in ("model_type", "patch_size")}
    return type(whole)(text_config=text, vision_config={**kept, **small})
