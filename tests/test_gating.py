"""Gated steering: every row is what it is alone, steered where its prompt is open, the other where closed."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import PROMPTS, _chat, assert_near, batch_of, n_hooks, plainly_padded, random_vector
from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, as_chat
from safesteer.models.forward import earned, final_hidden, prefill
from safesteer.models.generation import generate, generate_ids
from safesteer.models.parts import blocks
from safesteer.models.passes import bare
from safesteer.models.templates import n_after_instruction
from safesteer.steering.direction import Direction, steer
from safesteer.steering.gating import closed_moves
from safesteer.steering.hooks import apply_hooks, record_resid_pre
from safesteer.steering.interventions import ablate, add
from safesteer.steering.reader import HarmfulnessReader

COEFF = 3.0


@pytest.fixture(scope="module")
def tiny_gpt2(chatml_tokenizer) -> ChatModel:
    """Learned positions: padding that shifts a row would show."""
    config = GPT2Config(
        vocab_size=400, n_embd=32, n_layer=3, n_head=4, n_positions=256, initializer_range=0.15
    )
    return _chat(GPT2LMHeadModel, config, chatml_tokenizer, "tiny-gpt2")


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "llama bridge", "gpt2 bridge"])
def chat(request, tiny_llama, tiny_qwen2, tiny_gpt2, bridges) -> ChatModel:
    if request.param == "gpt2 bridge":
        return as_chat(to_bridge(tiny_gpt2))
    models = {
        "llama": tiny_llama,
        "qwen2": tiny_qwen2,
        "gpt2": tiny_gpt2,
        "llama bridge": bridges["tiny-llama"],
    }
    return models[request.param]


def direction_of(chat: ChatModel, operation: str = "add") -> Direction:
    return Direction(random_vector(chat.d_model, seed=3), 1, "-1", "given", COEFF, operation)


def reader_of(chat: ChatModel, pooling: str = "prompt", layer: int = 2) -> HarmfulnessReader:
    """A random one that opens half of PROMPTS."""
    weight = random_vector(chat.d_model, seed=5)
    reader = HarmfulnessReader(weight, 0.5, layer, pooling, n_after=n_after_instruction(chat.tokenizer))
    return replace(reader, threshold=float(sorted(reader.scores(chat, PROMPTS))[1]) + 1e-4)


def with_band(chat: ChatModel, reader: HarmfulnessReader) -> HarmfulnessReader:
    """The same with one prompt of PROMPTS between open and closed."""
    low, middle, *_ = sorted(reader.scores(chat, PROMPTS))
    return replace(reader, clear_below=float(low + middle) / 2)


def alone(chat: ChatModel, prompt: str, reader: HarmfulnessReader, direction: Direction, closed: str):
    """What holds for a prompt by itself: steered, ablated or nothing."""
    score = reader.scores(chat, [prompt])[0]
    if score > reader.threshold:
        return steer(chat, direction)
    if score > reader.lower:
        return nullcontext()
    return ablate(chat, direction.vector) if closed == "ablate" else nullcontext()


def assert_same_answers(chat: ChatModel, got: list[list[int]], want: list[list[int]]) -> None:
    """Up to the end of each: batches are padded to their longest answer."""
    for a, b in zip(got, want, strict=True):
        n = min(len(a), len(b))
        assert a[:n] == b[:n]
        assert set(a[n:] + b[n:]) <= set(chat.eos_ids)


@pytest.mark.parametrize("closed", ["nothing", "ablate"])
@pytest.mark.parametrize("pooling", ["prompt", "instruction"])
def test_a_batch_answers_as_its_rows_do_alone(chat, pooling, closed):
    """A padded batch with a common system turn and a cache, one and two samples per prompt."""
    reader, direction = reader_of(chat, pooling), direction_of(chat)
    assert sorted(reader.is_harmful(chat, PROMPTS)) == [False, False, True, True]
    want, base = [], []
    for prompt in PROMPTS:
        with alone(chat, prompt, reader, direction, closed):
            want += generate_ids(chat, batch_of(chat, [prompt]), max_new_tokens=5).tolist()
        base += generate_ids(chat, batch_of(chat, [prompt]), max_new_tokens=5).tolist()
    before = n_hooks(chat.model)
    with steer(chat, direction, gate=reader, closed=closed):
        got = generate_ids(chat, batch_of(chat), max_new_tokens=5).tolist()
        twice = generate_ids(chat, batch_of(chat), max_new_tokens=5, n_samples=2).tolist()
        singles = [generate_ids(chat, batch_of(chat, [p]), max_new_tokens=5)[0].tolist() for p in PROMPTS]
    assert n_hooks(chat.model) == before
    assert_same_answers(chat, got, want)
    assert_same_answers(chat, twice, [answer for answer in want for _ in range(2)])
    assert_same_answers(chat, singles, want)
    changed = [a != b for a, b in zip(want, base, strict=True)]
    assert sum(changed) >= 2


@pytest.mark.parametrize("closed", ["nothing", "ablate"])
@pytest.mark.parametrize("operation", ["add", "clamp", "ablate"])
def test_teacher_forced_passes_are_those_of_single_rows(chat, operation, closed):
    """Answers of unequal length, with and without a cache; one prompt may lie between open and closed."""
    reader, direction = reader_of(chat), direction_of(chat, operation)
    reader = with_band(chat, reader) if closed == "ablate" else reader
    tails = ["I", "Here is a long answer to it", " Yes, and no", "No."]
    batch, want, base = PromptBatch.of(chat.tokenizer, PROMPTS, tails), [], []
    with torch.no_grad():
        for prompt, tail in zip(PROMPTS, tails, strict=True):
            single = PromptBatch.of(chat.tokenizer, [prompt], [tail])
            with alone(chat, prompt, reader, direction, closed):
                want.append(final_hidden(chat.model, single)[0, -1])
            base.append(final_hidden(chat.model, single)[0, -1])
        with steer(chat, direction, gate=reader, closed=closed):
            got = final_hidden(chat.model, batch)[:, -1]
            width = int(batch.answer_start.min())
            cache = prefill(chat.model, batch, width)
            continued = final_hidden(chat.model, batch, cache)[:, -1]
        assert batch.n_shared > 0
        assert earned(chat.model, batch).n_shared > 0  # shared again, outside
    assert_near(got, torch.stack(want), 1e-3)
    assert_near(continued, torch.stack(want), 1e-3)
    moved = (torch.stack(want) - torch.stack(base)).abs().amax(1) > 0.01
    assert int(moved.sum()) == (2 if closed == "nothing" else 3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pooling", ["prompt", "instruction"])
def test_the_models_own_generate_is_gated_too(chat, pooling, use_cache):
    reader, direction = reader_of(chat, pooling), direction_of(chat)
    with steer(chat, direction, gate=reader, closed="ablate"):
        want = generate_ids(chat, batch_of(chat), max_new_tokens=5)
    batch = plainly_padded(chat)
    width, inner = batch.prompt_ids.shape[1], getattr(chat.model, "original_model", chat.model)
    with steer(chat, direction, gate=reader, closed="ablate", prompt_width=width):
        got = inner.generate(
            batch.prompt_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
        )
    assert_same_answers(chat, got[:, width:].tolist(), want.tolist())


def test_scopes_confine_a_gate(tiny_llama):
    reader, direction = reader_of(tiny_llama), direction_of(tiny_llama)
    with steer(tiny_llama, direction, gate=reader, scope="answer"):
        got = generate(tiny_llama, PROMPTS, max_new_tokens=5)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        is_open = reader.is_harmful(tiny_llama, [prompt])[0]
        with steer(tiny_llama, direction, scope="answer") if is_open else nullcontext():
            assert answer == generate(tiny_llama, [prompt], max_new_tokens=5)[0]


def test_a_prompt_is_read_once_and_without_any_steering(tiny_llama):
    """An addition around the block that would close every row, and a scope that follows the columns."""
    reader, direction = reader_of(tiny_llama), direction_of(tiny_llama)
    closing, vector = -100 * reader.weight / reader.weight.norm(), random_vector(32, seed=9)
    prompts, sizes = [*PROMPTS, "Hi"], []
    handle = blocks(tiny_llama.model)[0].register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0]))
    )
    with (
        add(tiny_llama, closing, 1),
        add(tiny_llama, vector, 2, COEFF, scope="answer"),
        steer(tiny_llama, direction, gate=reader),
    ):
        got = generate(tiny_llama, prompts, max_new_tokens=4)
        assert generate(tiny_llama, prompts, max_new_tokens=4) == got
    handle.remove()
    assert sizes.count(4) == 1  # four prompts; the fifth is known
    for prompt, answer in zip(prompts, got, strict=True):
        is_open = reader.is_harmful(tiny_llama, [prompt])[0]
        with (
            add(tiny_llama, closing, 1),
            add(tiny_llama, vector, 2, COEFF, scope="answer"),
            steer(tiny_llama, direction) if is_open else nullcontext(),
        ):
            assert answer == generate(tiny_llama, [prompt], max_new_tokens=4)[0]


def test_bare_passes_know_no_hook_of_before(tiny_llama):
    batch = batch_of(tiny_llama)
    base = final_hidden(tiny_llama.model, batch)
    with add(tiny_llama, random_vector(32), 1, 5.0):
        steered = final_hidden(tiny_llama.model, batch)
        with bare():
            assert torch.equal(final_hidden(tiny_llama.model, batch), base)
            with apply_hooks(tiny_llama, {("resid_pre", 1): lambda h: h + 1}):
                inside = final_hidden(tiny_llama.model, batch)
        assert torch.equal(final_hidden(tiny_llama.model, batch), steered)
    assert not torch.equal(inside, base)
    assert not torch.equal(inside, steered)


def test_the_gate_reads_what_continues_in_a_cache_from_outside(tiny_llama):
    """The prompt is known by its ids, so that only what follows is steered."""
    reader, direction = reader_of(tiny_llama), direction_of(tiny_llama)
    tails = ["I cannot", " Yes", "No", " It is"]
    batch = earned(tiny_llama.model, PromptBatch.of(tiny_llama.tokenizer, PROMPTS, tails)).plain()
    is_open = torch.tensor(reader.is_harmful(tiny_llama, PROMPTS))
    with torch.no_grad(), record_resid_pre(tiny_llama, [1], lambda h: h[:, -1]) as base:
        final_hidden(tiny_llama.model, batch, prefill(tiny_llama.model, batch, 30))
    cache = prefill(tiny_llama.model, batch, 30)
    with (
        torch.no_grad(),
        steer(tiny_llama, direction, gate=reader),
        record_resid_pre(tiny_llama, [1], lambda h: h[:, -1]) as seen,
    ):
        final_hidden(tiny_llama.model, batch, cache)
    assert_near(seen[1] - base[1], is_open[:, None] * COEFF * direction.vector)


def test_gates_that_cannot_decide_are_refused(tiny_llama, tiny_qwen2):
    reader, direction, ids = reader_of(tiny_llama), direction_of(tiny_llama), torch.tensor([[1, 2, 3]])
    with pytest.raises(SafeSteerError, match="prompt_width"), steer(tiny_llama, direction, gate=reader):
        tiny_llama.model(ids)
    with (
        pytest.raises(SafeSteerError, match="see the whole prompt"),
        steer(tiny_llama, direction, gate=reader, prompt_width=4),
    ):
        tiny_llama.model(ids)
    batch = batch_of(tiny_llama)
    cache = prefill(tiny_llama.model, batch, batch.prompt_ids.shape[1])
    with (
        pytest.raises(SafeSteerError, match="did not see the prompt"),
        steer(tiny_llama, direction, gate=reader, prompt_width=3),
    ):
        tiny_llama.model(torch.ones((4, 1), dtype=torch.long), past_key_values=cache)
    for other in (replace(reader, layer=3), replace(reader, weight=torch.ones(8))):
        with (
            pytest.raises(SafeSteerError, match="fit a reader on this model"),
            steer(tiny_llama, direction, gate=other),
        ):
            pass
    with pytest.raises(SafeSteerError, match="closed must be nothing or ablate, not 'open'"):
        closed_moves(tiny_llama.model, direction.vector, "open")
