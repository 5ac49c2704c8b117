"""What `gpu.py` measures: models with random weights in the shapes of known ones, and what their passes cost.

`roofline` compares a time with the longer of two: that of the operations of its matrix products at the rate
of a bare product, and that of the bytes it must read at the rate of a copy, both as this device reached them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

import safesteer as ss
from safesteer.distillation.rollouts import Teacher

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: LlamaConfig(**TINY),
    "tiny, as Qwen3": lambda: Qwen3Config(**TINY, head_dim=8),
    "0.5B, as Qwen2.5": lambda: Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "4B, as Qwen3": lambda: Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "8B, as Llama 3": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How much each section does."""

    losses: tuple[tuple[int, int, int], ...]  # positions, vocabulary, width
    middle: str  # shape of step, sweep and rollout
    large: tuple[str, ...]
    matmul: int  # rows of a square
    copied_mb: int
    sequences: int
    new_tokens: int
    read_rows: int  # of `large`
    read_tokens: int
    pairs: int
    timed: int  # candidates of the naive sweep
    repeats: int


FULL = Sizes(
    losses=((8192, 49152, 576), (2048, 151936, 1024), (8192, 151936, 2560), (8192, 128256, 4096)),
    middle="0.5B, as Qwen2.5",
    large=("4B, as Qwen3", "8B, as Llama 3"),
    matmul=8192,
    copied_mb=2048,
    sequences=32,
    new_tokens=64,
    read_rows=8,
    read_tokens=512,
    pairs=32,
    timed=8,
    repeats=5,
)
SMALL = Sizes(
    losses=((64, 1000, 32),),
    middle="tiny",
    large=("tiny, as Qwen3", "tiny"),
    matmul=256,
    copied_mb=16,
    sequences=4,
    new_tokens=4,
    read_rows=2,
    read_tokens=16,
    pairs=2,
    timed=3,
    repeats=3,
)


@cache
def tokenizer():
    return ss.load_model("smollm2-135m", device="cpu").tokenizer


def random_chat(shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> ss.ChatModel:
    """Make a model with random weights on the device; it has the tokenizer of SmolLM2."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype)
    ends = tokenizer().eos_token_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = ends
    return ss.ChatModel(model.eval().requires_grad_(False), tokenizer(), shape)


def float32_student(chat: ss.ChatModel) -> ss.ChatModel:
    """Copy a model into weights that train."""
    copied = chat.copy()
    return ss.ChatModel(copied.model.float(), copied.tokenizer, copied.name)


def random_teacher(chat: ss.ChatModel) -> Teacher:
    """Steer a model along a random direction, and select S by it."""
    vector = torch.randn(chat.d_model, generator=torch.Generator().manual_seed(1))
    direction = ss.Direction(vector=vector, layer=chat.n_layers // 3, position="-1", extraction="random")
    config = ss.TokenConfig(k=50, horizon=3, n_samples=1, min_steered_prob=0.0)
    prompts = ss.load_prompts().split("val").harmless[:8]
    return Teacher(chat, direction, ss.select_tokens(chat, direction, prompts, config))


@dataclass(frozen=True)
class Cost:
    """Weights of the blocks and of the head, and what a position costs beside them."""

    block_weights: int
    head_weights: int
    operations_per_key: int  # of attention, per position that reads and position that is read
    cache_bytes: int  # keys and values of one position
    weight_bytes: int  # per weight

    @classmethod
    def of(cls, chat: ss.ChatModel) -> "Cost":
        config, head = chat.config, chat.model.lm_head.weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        maps = (m for m in chat.model.model.layers.modules() if isinstance(m, nn.Linear))
        return cls(
            sum(m.weight.numel() for m in maps),
            head.numel(),
            4 * config.num_attention_heads * head_dim * config.num_hidden_layers,
            2 * config.num_key_value_heads * head_dim * config.num_hidden_layers * head.element_size(),
            head.element_size(),
        )

    def reading(self, rows: int, width: int) -> tuple[int, int]:
        """Return operations and bytes of one pass over whole rows, without the head."""
        keys = rows * width * (width + 1) // 2
        operations = 2 * self.block_weights * rows * width + self.operations_per_key * keys
        return operations, self.block_weights * self.weight_bytes

    def answering(self, lengths: list[int], n_new: int, n_shared: int = 0) -> tuple[int, int]:
        """Return operations and bytes of prompts, `n_shared` columns of them read once, and their answers."""
        read, passes = [self.reading(1, length)[0] for length in lengths], n_new - 1
        keys = sum(length * passes + passes * (passes + 1) // 2 for length in lengths)
        n_read = len(lengths) * passes - (len(lengths) - 1) * n_shared
        operations = sum(read) + 2 * self.block_weights * n_read
        operations += self.operations_per_key * keys + 2 * self.head_weights * len(lengths) * n_new
        weights = self.block_weights * (n_new + 1) + self.head_weights * n_new
        return operations, weights * self.weight_bytes + self.cache_bytes * keys


def roofline(cost: tuple[int, int], seconds: float, reached: dict) -> dict:
    """Say which limit a time is compared with, and the share of it that was reached."""
    limits = {
        "operations": cost[0] / (1e12 * reached["matmul_tflops"]),
        "bytes": cost[1] / (1e9 * reached["gb_per_s"]),
    }
    limit = max(limits, key=limits.__getitem__)
    return {
        "tflops": cost[0] / seconds / 1e12,
        "gb_per_s": cost[1] / seconds / 1e9,
        "limit": limit,
        "share_of_roofline": limits[limit] / seconds,
    }
