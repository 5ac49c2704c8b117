"""Short cuts are earned: what is measured when a model is loaded, and samples that do not depend on it."""

import copy
from dataclasses import replace

import pytest
import torch
from conformance.checks import own_logits
from conformance.families import build

from conftest import PROMPTS, _used, copy_of
from safesteer.models import generation, traits
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate_ids, uniforms
from safesteer.models.head import logit_shape
from safesteer.models.parts import hf_model
from safesteer.models.traits import CHECKS, traits_of

# (pads, shares_prefix, repeats_cache, decodes_cached)
EARNED = {
    "llama": (True, True, True, True),
    "mistral, window of 8": (True, False, True, True),
    "gemma 3, window of 8": (True, False, True, True),
    "olmo 3, window of 8": (True, False, True, True),
    "cohere, logit scale": (True, True, True, True),
    "mpt": (True, False, True, True),  # ALiBi counts columns, padding too
    "cpmant": (True, False, False, False),  # transformers decodes otherwise with a cache than without
    "recurrent_gemma": (False, False, False, True),
    **dict.fromkeys(("lfm2", "qwen3_next", "jamba", "falcon_h1", "mamba"), (True, False, False, True)),
}


@pytest.fixture(scope="module", params=EARNED)
def family(request) -> ChatModel:
    return _used(build(request.param))


def test_what_is_measured_is_what_the_family_does(family):
    table = family.check()
    assert tuple(table.check) == ("logits", *CHECKS, "writes")
    assert tuple(table.right[1:-1]) == EARNED[family.name]
    assert all(table.remark[~table.right])


def test_samples_do_not_depend_on_the_short_cuts(family, monkeypatch):
    """Nor on who has left the batch: half of the tokens end an answer, and rows may leave after each two."""
    monkeypatch.setattr(generation, "TOGETHER", 2)
    monkeypatch.setattr(hf_model(family.model).generation_config, "eos_token_id", list(range(200)))
    prompts = PROMPTS[:2] if traits_of(family.model).pads else ["Hello", "Hello"]
    (_, batch) = next(iter(family.batched(prompts, 2)))
    drawn = torch.cat([uniforms((0, i), 2, 5) for i in range(2)])
    sampled = generate_ids(family, batch, max_new_tokens=5, temperature=1.0, n_samples=2, uniform=drawn)
    assert sampled.shape[0] == 4
    for i, row in enumerate(sampled.tolist()):
        ids = batch.prompt_ids[i // 2][batch.attention_mask[i // 2].bool()].tolist()
        for step, token in enumerate(row):
            if step and row[step - 1] in family.eos_ids:
                break
            with torch.no_grad():
                logits = own_logits(family, family.model, [*ids, *row[:step]])[-1]
            cdf = logits.double().softmax(-1).cumsum(-1)
            low = float(cdf[token - 1]) if token else 0.0
            assert low - 1e-4 <= float(drawn[i, step]) <= float(cdf[token]) + 1e-4


def test_mixed_precision_is_put_aside_while_a_model_is_measured(tiny_llama):
    plain, mixed = copy_of(tiny_llama), copy_of(tiny_llama)
    with torch.autocast("cpu", torch.bfloat16):
        measured = traits_of(mixed.model)
    assert measured == traits_of(plain.model)
    assert logit_shape(mixed.model) == logit_shape(plain.model)


@pytest.mark.parametrize(
    "name", ["llama", "cpmant", "recurrent_gemma", "mpt", "rwkv", "mamba", "mistral, window of 8"]
)
def test_half_precision_earns_what_float32_earns(name):
    """Rounding is not taken for a wrong layout, nor a wrong layout for rounding."""
    model = build(name).model.float()
    wide = traits_of(model)
    half = traits_of(copy.deepcopy(model).bfloat16())
    assert replace(half, deviations=()) == replace(wide, deviations=())


def test_a_few_huge_elements_cost_no_short_cut():
    """Qwen2's states have elements of 15 spreads; bfloat16 moves them by a quarter of one."""
    want = torch.randn(2, 2, 896, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want[..., 3] = 15
    got = want.to(torch.bfloat16).double()
    got[..., 3] += 0.24
    assert traits._misfit(got, want, torch.bfloat16) < traits.HALF_TOLERANCE
    assert traits._misfit(got, want, torch.float32) > 0.2


def test_a_model_that_amplifies_rounding_keeps_its_short_cuts(monkeypatch):
    """An 8B of random weights is off by more than the usual limit on a GPU, where kernels round otherwise."""
    model = build("llama").model.bfloat16()
    usual = traits._misfit
    monkeypatch.setattr(traits, "HALF_TOLERANCE", 0.0)
    monkeypatch.setattr(traits, "_misfit", lambda *args: usual(*args) + 1e-6)
    rows = [[5, 6, 7, 8], [5, 6, 7, *range(20, 31)]]
    texts = [PromptBatch.from_ids([row], [[]]) for row in rows]
    padded = PromptBatch.from_ids(rows, [[], []], share=False)
    with torch.no_grad():
        limit = traits._rounding_limit(model, texts, padded, traits._ends(model, texts))
    assert 1e-5 < limit < 0.2
    assert traits_of(model).pads
    assert traits_of(model).decodes_cached


def test_rounding_excuses_no_model_that_reads_its_padding(monkeypatch):
    model = build("llama").model.bfloat16()
    monkeypatch.setattr(model.model, "forward", _without_mask(model.model.forward))
    assert not traits_of(model).pads


def _without_mask(forward):
    def read(*args, attention_mask=None, **kwargs):
        mask = None if attention_mask is None else torch.ones_like(attention_mask)
        return forward(*args, attention_mask=mask, **kwargs)

    return read
