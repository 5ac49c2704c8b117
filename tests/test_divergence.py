"""Every formula against a reference in plain float64 probabilities, every gradient numerically."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LargestTensor, assert_near, reference_divergence
from safesteer.distillation.divergence import localized_divergence
from safesteer.models.logits import kl_divergence, logps_on, refusal_score

DIVERGENCES = ("reverse", "forward", "symmetric", "jsd")
NORMALIZERS = ("partial", "generalized", "tail", "renormalized")
WORDS = list(product(DIVERGENCES, NORMALIZERS))
N, D, V = 5, 3, 9
BETA = 0.3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("divergence", "normalizer"), WORDS)
def test_divergence_equals_reference(divergence, normalizer):
    p, q = (normal(4, V, seed=s).softmax(-1)[:, [1, 4, 6]] for s in (1, 2))
    got = localized_divergence(p.log(), q.log(), divergence, normalizer, BETA)
    want = [
        reference_divergence(a, b, divergence, normalizer, BETA)
        for a, b in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert_near(got, torch.tensor(want, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("chunk", [2, 256])
def test_logps_on_value_and_gradient(trained, with_bias, softcap, rows, chunk):
    h = normal(N, D).requires_grad_(trained != "head")
    weight = normal(V, D, seed=1).requires_grad_(trained != "hidden")
    bias = normal(V, seed=2).requires_grad_(trained != "hidden") if with_bias else None
    ids = torch.tensor([5, 0, 7])
    if rows:
        ids = torch.tensor([[5, 0, 7], [1, 1, 2], [8, 0, 3], [4, 5, 6], [0, 1, 2]])

    def f(h, weight, bias):
        return logps_on(h, weight, ids, bias=bias, softcap=softcap, chunk=chunk)

    z = h @ weight.T + (0 if bias is None else bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    index = ids if rows else ids.expand(N, -1)
    assert_near(f(h, weight, bias), z.log_softmax(-1).gather(-1, index), 1e-12)
    assert torch.autograd.gradcheck(f, (h, weight, bias))


def test_logps_on_float32_is_close_to_float64():
    h, weight = normal(40, 16), normal(300, 16, seed=1)
    ids = torch.tensor([3, 299, 17])
    got = logps_on(h.float(), weight.float(), ids, chunk=7)
    assert got.dtype == torch.float32
    assert_near(got, logps_on(h, weight, ids), 1e-5)


def test_logps_on_returns_float32_for_bfloat16_weights():
    h, weight = normal(4, 16).bfloat16(), normal(30, 16, seed=1).bfloat16()
    got = logps_on(h, weight, torch.tensor([1, 2]))
    assert got.dtype == torch.float32
    assert_near(got, logps_on(h.double(), weight.double(), torch.tensor([1, 2])), 0.05)


@pytest.mark.parametrize("ids", [[-1, 2], [0, V]])
def test_logps_on_refuses_ids_outside_the_head(ids):
    with pytest.raises(ValueError, match=f"0..{V - 1}"):
        logps_on(normal(N, D), normal(V, D), torch.tensor(ids))


def test_logps_on_forms_no_position_by_vocabulary_tensor():
    n, d_vocab, chunk = 64, 500, 4
    h, weight = normal(n, 8).requires_grad_(), normal(d_vocab, 8, seed=1)
    with LargestTensor() as seen:
        logps_on(h, weight, torch.tensor([1, 2, 3]), chunk=chunk).sum().backward()
    assert seen.largest <= weight.numel() < n * d_vocab


log_masses = st.lists(st.floats(-12, 3), min_size=3, max_size=3)


@settings(max_examples=200, deadline=None)
@given(p=log_masses, q=log_masses, outside=st.floats(-3, 3))
def test_signs_and_minima(p, q, outside):
    """Partial reverse is lowest at p = q / e; true divergences are >= 0, and 0 exactly at p = q."""

    def on_set(logits):
        return torch.tensor([*logits, outside], dtype=torch.float64).log_softmax(-1)[:3]

    p, q = on_set(p), on_set(q)
    assert localized_divergence(q - 1, q) == pytest.approx(-float(q.exp().sum()) / math.e)
    assert localized_divergence(p, q) >= localized_divergence(q - 1, q) - 1e-12
    for divergence, normalizer in product(DIVERGENCES, ("generalized", "tail")):
        assert float(localized_divergence(q, q, divergence, normalizer)) == pytest.approx(0, abs=1e-12)
        value = float(localized_divergence(p, q, divergence, normalizer))
        assert value >= -1e-12
        if float((p - q).abs().max()) > 0.1:
            assert value > 0


def test_partial_reverse_has_no_slope_at_q_over_e():
    q = normal(6).log_softmax(-1)[:3]
    p = (q - 1).requires_grad_()
    localized_divergence(p, q).backward()
    assert_near(p.grad, torch.zeros(3), 1e-15)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_jsd_is_symmetric_at_one_half(normalizer):
    p, q = (normal(4, V, seed=s).log_softmax(-1)[:, :3] for s in (1, 2))
    there = localized_divergence(p, q, "jsd", normalizer, 0.5)
    assert_near(there, localized_divergence(q, p, "jsd", normalizer, 0.5), 1e-12)
    assert (there - localized_divergence(p, q, "jsd", normalizer, 0.2)).abs().min() > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_renormalized_ignores_the_mass_on_the_set(divergence):
    p, q = (normal(4, V, seed=s).log_softmax(-1)[:, :3] for s in (1, 2))
    value = localized_divergence(p, q, divergence, "renormalized")
    assert_near(localized_divergence(p - 2, q - 5, divergence, "renormalized"), value, 1e-12)
    moved = localized_divergence(p - 2, q, divergence, "partial")
    assert (moved - localized_divergence(p, q, divergence, "partial")).abs().max() > 1e-2


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_divergence_and_gradient_are_finite_at_the_edges(divergence, normalizer):
    """A token without any mass, and a set that carries all of it."""
    p = torch.tensor([[-200.0, -1e-9], [-30.0, -40.0]], requires_grad=True)
    q = torch.tensor([[-0.5, -1.0], [-1e-9, -60.0]])
    value = localized_divergence(p, q, divergence, normalizer)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(p.grad).all()


def test_refusal_score_equals_naive():
    logits, ids = normal(2, 3, V), torch.tensor([0, 4])
    mass = logits.softmax(-1)[..., ids].sum(-1)
    assert_near(refusal_score(logits, ids), mass.log() - (1 - mass).log(), 1e-12)


@pytest.mark.parametrize("gap", [1e3, -1e3])
def test_refusal_score_is_finite_at_the_extremes(gap):
    logits = torch.tensor([gap, 0.0, 0.0])
    assert float(refusal_score(logits, torch.tensor([0]))) == pytest.approx(gap - math.log(2))


def test_kl_divergence_with_suppressed_tokens():
    p = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, 1.0]])
    q = torch.tensor([[1.0, 1.0, 3.0], [0.0, 1.0, 0.5]])
    a, b = p.double().softmax(-1), q.double().softmax(-1)
    want = [
        sum(x * math.log(x / y) for x, y in zip(row_a, row_b, strict=True) if x > 0)
        for row_a, row_b in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert_near(kl_divergence(p, q), want, 1e-6)
    assert float(kl_divergence(p[0], p[0])) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logps_on_multiplies_half_precision_wide(dtype):
    """Value and gradient as in float64 on the same states, but for the rounding of the gradient itself."""
    generator = torch.Generator().manual_seed(0)
    states, head = ((0.5 * torch.randn(n, 64, generator=generator)).to(dtype) for n in (40, 5000))
    ids, results = torch.randint(5000, (40, 3), generator=generator), []
    for cast_to in (torch.float64, dtype):
        hidden, weight = (t.to(cast_to).requires_grad_() for t in (states, head))
        logps = logps_on(hidden, weight, ids, chunk=7)
        logps.sum().backward()
        results.append((logps.detach().double(), hidden.grad.double(), weight.grad.double()))
    (want, *slopes), (got, *gradients) = results
    assert got.sub(want).abs().max() < 1e-5
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient - slope).norm() < 0.5 * torch.finfo(dtype).eps * slope.norm()
