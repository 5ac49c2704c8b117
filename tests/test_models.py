"""Forward passes and generation against plain Hugging Face calls; loading; the bridge."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from conftest import (
    PROMPTS,
    assert_near,
    batch_of,
    copy_of,
    naive_logits,
    plainly_padded,
    random_vector,
)
from safesteer._errors import SafeSteerError
from safesteer.models import generation
from safesteer.models.batch import PromptBatch, cut_at_eos
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, as_chat
from safesteer.models.forward import final_hidden, prefill
from safesteer.models.generation import generate, generate_ids
from safesteer.models.head import output_head
from safesteer.models.loading import load_model
from safesteer.models.logits import logits_of
from safesteer.models.parts import blocks, decoder, hf_model, is_bridge
from safesteer.models.templates import template_hash
from safesteer.steering import interventions as steering
from safesteer.steering.direction import Direction
from safesteer.steering.hooks import apply_hooks

LAYER, COEFF = 1, 3.0


def steered(chat: ChatModel):
    return steering.add(chat.model, random_vector(chat.d_model), LAYER, COEFF)


def last_logits(chat: ChatModel, batch: PromptBatch, **options) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(final_hidden(chat.model, batch, **options)[:, -1], *output_head(chat.model))


def plain_generate(chat: ChatModel, *, use_cache: bool, n_tokens: int) -> torch.Tensor:
    """Greedy answers by `generate` on the usual left-padded layout."""
    batch = plainly_padded(chat)
    out = hf_model(chat.model).generate(
        batch.prompt_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        max_new_tokens=n_tokens,
        use_cache=use_cache,
    )
    return out[:, batch.prompt_ids.shape[1] :]


# --- forward passes ---


def test_left_padded_batch_equals_single_prompts(chat):
    batched = last_logits(chat, batch_of(chat))
    singles = torch.cat([last_logits(chat, batch_of(chat, [p])) for p in PROMPTS])
    assert_near(batched, singles)
    assert (singles[0] - singles[1]).abs().max() > 0.1


def test_final_hidden_with_shared_prefix_equals_plain_forward(chat):
    """At every real column after the shared ones, not only at the last."""
    batch = batch_of(chat)
    n = batch.n_shared
    assert n > 0
    with torch.no_grad():
        got = logits_of(final_hidden(chat.model, batch), *output_head(chat.model))
    real = batch.attention_mask[:, n:].bool()
    assert_near(got[real], naive_logits(chat, batch)[:, n:][real])


@pytest.mark.parametrize("grad", [True, False])
def test_only_passes_with_a_gradient_leave_out_cudnns_attention(tiny_llama, grad):
    """Its gradient can be NaN (pytorch issue 196678); the pass over shared columns has one too."""
    model, seen = copy_of(tiny_llama).model, []
    blocks(model)[0].register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    with torch.set_grad_enabled(grad):
        final_hidden(model, batch_of(tiny_llama))
    assert seen == [not grad] * 2
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_layout_does_not_change_the_result(chat):
    assert_near(last_logits(chat, batch_of(chat)), naive_logits(chat, plainly_padded(chat))[:, -1])


@pytest.mark.parametrize("upto_from_end", [1, 3])
def test_prefill_then_rest_equals_one_pass(chat, upto_from_end):
    batch = batch_of(chat)
    upto = batch.prompt_ids.shape[1] - upto_from_end
    with torch.no_grad():
        cache = prefill(chat.model, batch, upto)
        assert cache.get_seq_length() == upto
        got = final_hidden(chat.model, batch, cache)
        want = final_hidden(chat.model, batch)
    assert got.shape[1] == upto_from_end
    assert_near(got[:, -1], want[:, -1])


def test_prefill_repeats_rows_in_order(tiny_llama):
    batch = batch_of(tiny_llama, PROMPTS[:2])
    width = batch.prompt_ids.shape[1]
    tails = torch.tensor([[5], [6], [7], [5], [6], [7]])
    full = batch.extended(tails)
    with torch.no_grad():
        cache = prefill(tiny_llama.model, batch, width - 1, times=3)
        got = final_hidden(tiny_llama.model, full, cache)
        assert_near(got, final_hidden(tiny_llama.model, full)[:, -2:])


def test_head_gives_the_models_own_logits(chat):
    batch = plainly_padded(chat)
    inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.no_grad():
        hidden = chat.model.get_decoder()(batch.prompt_ids, **inputs).last_hidden_state
    head = output_head(chat.model)
    assert head.weight.shape == (chat.d_vocab, chat.d_model)
    assert_near(logits_of(hidden, *head), naive_logits(chat, batch), 1e-5)


# --- generation ---


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("steer", [False, True])
def test_greedy_answers_equal_plain_generate(chat, use_cache, steer):
    def both():
        ours = generate_ids(chat, batch_of(chat), max_new_tokens=8)
        return ours, plain_generate(chat, use_cache=use_cache, n_tokens=8)

    base = generate_ids(chat, batch_of(chat), max_new_tokens=8)
    if steer:
        with steered(chat):
            got, want = both()
        assert not torch.equal(got, base)
    else:
        got, want = both()
    assert torch.equal(got, want)


def test_samples_of_a_prompt_stand_together(tiny_qwen2):
    batch = batch_of(tiny_qwen2)
    greedy = generate_ids(tiny_qwen2, batch, max_new_tokens=4)
    nearly = generate_ids(tiny_qwen2, batch, max_new_tokens=4, temperature=1e-5, n_samples=3)
    assert torch.equal(nearly, greedy.repeat_interleave(3, 0))
    assert len(greedy.unique(dim=0)) > 1


def test_sampling_is_pure(tiny_llama):
    """Nothing of the model's generation config leaks in; frequencies are those of softmax."""
    leaky = copy_of(tiny_llama)
    config = leaky.model.generation_config
    config.do_sample, config.top_k, config.top_p, config.temperature = True, 2, 0.1, 0.2
    config.repetition_penalty = 5.0
    batch, n = batch_of(leaky, PROMPTS[:1]), 2000
    torch.manual_seed(0)
    ids = generate_ids(leaky, batch, max_new_tokens=1, temperature=1.0, n_samples=n)[:, 0]
    logps = last_logits(tiny_llama, batch)[0].log_softmax(-1)
    surprise, entropy = -logps[ids].mean(), -(logps.exp() * logps).sum()
    spread = (logps.exp() * (logps + entropy) ** 2).sum().sqrt()
    assert len(ids.unique()) > 50
    assert float((surprise - entropy).abs()) < 5 * float(spread) / math.sqrt(n)
    greedy = generate_ids(leaky, batch_of(leaky), max_new_tokens=8)
    assert torch.equal(greedy, generate_ids(tiny_llama, batch_of(tiny_llama), max_new_tokens=8))


def test_sampling_depends_on_the_seed_only(tiny_llama):
    def sample(seed):
        torch.manual_seed(seed)
        return generate_ids(tiny_llama, batch_of(tiny_llama), max_new_tokens=5, temperature=1.0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_answers_end_at_any_eos_and_are_padded_with_the_first(tiny_llama):
    ender = copy_of(tiny_llama)
    first = generate_ids(ender, batch_of(ender), max_new_tokens=6)
    stop = int(first[0, 2])
    ender.model.generation_config.eos_token_id = [stop]
    assert ender.eos_ids == sorted({stop, ender.tokenizer.eos_token_id})
    ids = generate_ids(ender, batch_of(ender), max_new_tokens=6)
    at = first[0].tolist().index(stop)
    assert ids[0, : at + 1].tolist() == first[0, : at + 1].tolist()
    assert set(ids[0, at + 1 :].tolist()) <= {ender.eos_ids[0]}


@pytest.mark.parametrize("inside", ["none", "steered", "hooks of somebody"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_that_have_ended_leave_the_batch_and_change_nothing(
    tiny_llama, monkeypatch, temperature, inside
):
    """Hooks that may know a row by its place keep all rows where they are."""
    ender = copy_of(tiny_llama)
    batch, n, d_model = batch_of(ender), 2 * len(batch_of(ender).prompt_ids), ender.d_model
    drawn = torch.rand((n, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.ones(d_model)
    contexts = {
        "none": nullcontext,
        "steered": lambda: steering.add(ender, shift, 1, scope="answer"),
        "hooks of somebody": lambda: apply_hooks(ender, {("resid_pre", 1): lambda h: h + shift}),
    }

    def answered(together: int) -> tuple[torch.Tensor, list[int]]:
        sizes: list[int] = []
        monkeypatch.setattr(generation, "TOGETHER", together)
        count = decoder(ender.model).register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(args[0] if args else kwargs["input_ids"])),
            with_kwargs=True,
        )
        options = {"max_new_tokens": 12, "temperature": temperature, "n_samples": 2, "uniform": drawn}
        with contexts[inside]():
            ids = generate_ids(ender, batch, **options)
        count.remove()
        return ids, sizes[sizes.index(n) :] if n in sizes else sizes

    whole, _ = answered(100)
    ender.model.generation_config.eos_token_id = [int(whole[0, 1]), int(whole[1, 4])]
    want, together = answered(100)
    got, leaving = answered(2)
    assert torch.equal(got, want)
    assert len(set(together)) == 1
    assert leaving == sorted(leaving, reverse=True)
    assert (len(set(leaving)) == 1) == (inside == "hooks of somebody")


def test_generate_keeps_the_order_of_prompts(tiny_llama):
    together = generate(tiny_llama, PROMPTS, max_new_tokens=6, batch_size=3)
    alone = [generate(tiny_llama, [p], max_new_tokens=6)[0] for p in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize(
    ("keep_eos", "want"), [(True, [[5, 6, 2], [5, 7], [3]]), (False, [[5, 6], [5, 7], []])]
)
def test_cut_at_eos(keep_eos, want):
    answers = [[5, 6, 2, 2, 9], [5, 7], [3, 2]]
    assert [cut_at_eos(a, [2, 3], keep_eos=keep_eos) for a in answers] == want


# --- the bridge ---


def test_bridge_has_the_same_logits(chat_and_bridge):
    plain, wrapped = chat_and_bridge
    assert is_bridge(wrapped.model)
    assert not is_bridge(plain.model)
    assert_near(last_logits(wrapped, batch_of(plain)), last_logits(plain, batch_of(plain)))
    assert (wrapped.n_layers, wrapped.d_vocab) == (plain.n_layers, plain.d_vocab)
    assert wrapped.fingerprint == plain.fingerprint


def test_bridging_leaves_the_original_alone(tiny_llama, tmp_path):
    original = copy_of(tiny_llama)
    before = {k: v.clone() for k, v in original.model.state_dict().items()}
    with torch.no_grad():
        for p in to_bridge(original).parameters():
            p.zero_()
    after = original.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    original.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    reloaded = ChatModel(again.eval(), original.tokenizer, "again")
    assert (original.tokenizer.bos_token, original.tokenizer.padding_side) == (None, "right")
    batch = plainly_padded(original)
    assert torch.equal(naive_logits(reloaded, batch), naive_logits(tiny_llama, batch))


def test_a_bridge_is_the_same_chat_model(chat_and_bridge, tmp_path):
    """Name, weights and template agree, so a direction of one loads on the other."""
    plain, wrapped = chat_and_bridge
    bridge = wrapped.model
    again = as_chat(bridge)
    assert (again.name, again.fingerprint) == (plain.name, plain.fingerprint)
    assert again.tokenizer is plain.tokenizer
    assert template_hash(bridge.tokenizer) == template_hash(plain.tokenizer)
    direction = replace(
        Direction(random_vector(plain.d_model), 1, "-1", "by hand"),
        fingerprint=plain.fingerprint,
        template_hash=template_hash(plain.tokenizer),
    )
    direction.save(tmp_path / "direction.safetensors")
    assert Direction.load(tmp_path / "direction.safetensors", again).layer == 1


def test_a_bridge_reads_as_transformer_lens_does(chat_and_bridge):
    plain, wrapped = chat_and_bridge
    bridge = wrapped.model
    ids = plainly_padded(plain, PROMPTS[:1]).prompt_ids
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    assert_near(logits, naive_logits(plain, plainly_padded(plain, PROMPTS[:1])))
    assert cache["blocks.1.hook_resid_pre"].shape == (1, ids.shape[1], plain.d_model)


def test_a_bridge_is_not_bridged_again(chat_and_bridge):
    _, wrapped = chat_and_bridge
    assert to_bridge(wrapped) is to_bridge(wrapped.model) is wrapped.model
    named = ChatModel(wrapped.model, wrapped.tokenizer, "another name")
    assert as_chat(to_bridge(named)).name == "another name"
    to_bridge(wrapped)


def test_a_model_with_its_tokenizer_is_a_chat_model(tiny_llama):
    pair = as_chat((tiny_llama.model, tiny_llama.tokenizer))
    assert (pair.fingerprint, pair.name) == (tiny_llama.fingerprint, "LlamaForCausalLM")
    assert as_chat(tiny_llama) is tiny_llama
    assert generate((tiny_llama.model, tiny_llama.tokenizer), ["Hi"], max_new_tokens=3) == generate(
        tiny_llama, ["Hi"], max_new_tokens=3
    )
    with pytest.raises(SafeSteerError, match="no tokenizer here"):
        as_chat(tiny_llama.model)


def test_text_to_ids_and_back(chat):
    ids = chat.encode("Hello there")
    assert chat.decode(ids) == "Hello there"
    assert chat.decode_answer([*ids, chat.eos_ids[0], *ids]) == "Hello there"


def test_batches_carry_their_continuations(chat):
    tails = [chat.encode(f" {i}") for i in range(len(PROMPTS))]
    seen = {}
    for rows, batch in chat.batched(PROMPTS, 3, continuations=tails):
        for i, ids, completion in zip(rows, batch.prompt_ids, batch.completion_mask, strict=True):
            seen[i] = ids[completion].tolist()
    assert seen == dict(enumerate(tails))


# --- loading ---


@pytest.fixture
def folder(tiny_qwen2, tmp_path):
    tiny_qwen2.model.save_pretrained(tmp_path)
    tiny_qwen2.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_load_model_from_a_folder(folder, tiny_qwen2):
    loaded = load_model(str(folder), device="cpu")
    assert torch.equal(last_logits(loaded, batch_of(loaded)), last_logits(tiny_qwen2, batch_of(loaded)))
    assert loaded.fingerprint == tiny_qwen2.fingerprint
    assert loaded.eos_ids == tiny_qwen2.eos_ids
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_load_model_in_half_precision_keeps_the_fingerprint(folder, tiny_qwen2):
    loaded = load_model(str(folder), dtype="bfloat16", device="cpu")
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert loaded.fingerprint == tiny_qwen2.fingerprint


def test_fingerprint_tells_models_apart(tiny_llama, tiny_qwen2):
    other = copy_of(tiny_llama)
    other.model.get_input_embeddings().weight.data[0, 0] += 1
    assert len({c.fingerprint for c in (tiny_llama, tiny_qwen2, other)}) == 3


def test_load_model_names_a_missing_model():
    with pytest.raises(SafeSteerError, match="Cannot load the model '/nowhere/model'"):
        load_model("/nowhere/model")


def test_load_model_needs_a_chat_template(folder):
    for path in folder.glob("*chat_template*"):
        path.unlink()
    with pytest.raises(SafeSteerError, match="no chat template"):
        load_model(str(folder), device="cpu")


def test_load_model_refuses_an_encoder_decoder(tmp_path, tiny_llama):
    sizes = {"vocab_size": 400, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    tiny_llama.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SafeSteerError):
        load_model(str(tmp_path), device="cpu")


# --- the embedded model ---


@pytest.mark.model
def test_smollm2_loads_and_saves(smollm2, tmp_path):
    assert (smollm2.n_layers, smollm2.d_model, smollm2.d_vocab) == (30, 576, 49152)
    again = load_model("smollm2-135m", device="cpu")
    assert again.fingerprint == smollm2.fingerprint
    smollm2.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 5e8


@pytest.mark.model
def test_smollm2_batch_equals_single_prompts(smollm2):
    prompts = ["Hi", "What is the capital of France, and why?"]
    batch = batch_of(smollm2, prompts)
    assert batch.n_shared > 10
    singles = torch.cat([last_logits(smollm2, batch_of(smollm2, [p])) for p in prompts])
    assert_near(last_logits(smollm2, batch), singles, 1e-3)
    assert "Paris" in generate(smollm2, prompts[1:], max_new_tokens=12)[0]
