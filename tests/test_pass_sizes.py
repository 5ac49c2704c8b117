"""What the device decides: sizes of passes, shared columns, and products of two precisions."""

import pytest
import torch

import safesteer as ss
from conftest import PROMPTS
from safesteer.directions import scoring
from safesteer.models import logits, pass_sizes
from safesteer.models.batch import PromptBatch
from safesteer.models.logits import positions_per_chunk, wide_matmul


def test_settings_go_before_what_the_device_takes(tiny_llama, monkeypatch):
    asked = []

    def batches(tokenizer, texts, size):
        asked.append(size)
        return split(tokenizer, texts, size)

    split = scoring.batches
    monkeypatch.setattr(scoring, "batches", batches)
    monkeypatch.setattr(scoring, "sizes_on", lambda device: pass_sizes.PassSizes(prompts=5, tokens=100))
    pairs, vectors = ss.load_prompts().split("val").first(3), torch.ones(1, tiny_llama.d_model)
    for config in (ss.DirectionConfig(), ss.DirectionConfig(batch_size=3)):
        scoring.score(tiny_llama, vectors, [0], pairs, torch.tensor([1]), config)
    assert asked == [5, 5, 3, 3]


def test_a_gpu_takes_more_per_pass():
    assert pass_sizes.sizes_on("cpu") == pass_sizes.ON_CPU
    assert pass_sizes.sizes_on(torch.device("meta")) == pass_sizes.ON_GPU


def test_a_gpu_shares_columns_only_where_that_saves_many(tiny_llama, monkeypatch):
    batch = PromptBatch.of(tiny_llama.tokenizer, PROMPTS)
    saved = batch.n_shared * (len(PROMPTS) - 1)
    assert saved > 0
    on_gpu = PromptBatch.of(tiny_llama.tokenizer, PROMPTS, device="meta", keep_shared=True)
    assert on_gpu.n_shared == batch.n_shared
    assert PromptBatch.of(tiny_llama.tokenizer, PROMPTS, device="meta").n_shared == 0
    monkeypatch.setattr(pass_sizes, "SAVED", saved)
    assert PromptBatch.of(tiny_llama.tokenizer, PROMPTS, device="meta").n_shared == batch.n_shared


def test_more_positions_share_a_product_on_a_gpu():
    assert positions_per_chunk(torch.empty(49152, 8)) == 256
    assert positions_per_chunk(torch.empty(49152, 8, device="meta")) == 682
    assert positions_per_chunk(torch.empty(10**9, 1, device="meta")) == 1


@pytest.fixture
def wide_products(monkeypatch):
    """Multiply half precision into a wide result, as a GPU does, on a processor that cannot."""
    plain = torch.mm

    def mm(a, b, *, out_dtype=None):
        return plain(a, b) if out_dtype is None else plain(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(logits, "_multiplies_wide", lambda device, dtype: True)
    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_float32_factor_in_two_halves_loses_next_to_nothing(wide_products, transposed):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 64, generator=generator)
    weight = torch.randn(64, 64, generator=generator).to(torch.bfloat16)
    want = a.double() @ (weight.T if transposed else weight).double()
    got = wide_matmul(a, weight, transposed=transposed)
    rounded = wide_matmul(a.to(torch.bfloat16), weight, transposed=transposed)
    assert got.dtype == torch.float32
    assert float((got - want).abs().max()) < 2**-14 * float(want.std())
    assert float((rounded - want).abs().max()) > 2**-8 * float(want.std())
