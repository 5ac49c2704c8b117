"""The loss of a step in one pass against full logits in float64, its gradients numerically."""

from itertools import product
from typing import get_args

import pytest
import torch

from conftest import LargestTensor, assert_near, reference_divergence
from safesteer.distillation.divergence import localized_divergence
from safesteer.distillation.loss import divergence_loss, kl_outside_set
from safesteer.models.head import Head
from safesteer.models.logits import logits_of
from safesteer.settings import DistillConfig, Divergence, Normalizer, Support

N, D, V, BETA = 5, 3, 9, 0.3
S = torch.tensor([5, 0, 7])
W = torch.tensor([0.5, 0.0, 1.0, 2.0, 0.25], dtype=torch.float64)
WAYS = [
    (support, divergence, normalizer)
    for support, divergence, normalizer in product(*map(get_args, (Support, Divergence, Normalizer)))
    if support != "full" or normalizer == "partial"
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(with_bias: bool, softcap: float | None, trained: bool = True):
    weight, base_weight = normal(V, D, seed=1).requires_grad_(trained), normal(V, D, seed=2)
    bias = normal(V, seed=3).requires_grad_(trained) if with_bias else None
    return Head(weight, bias, softcap, 0.5), Head(
        base_weight, normal(V, seed=4) if with_bias else None, softcap
    )


def on_support(logps, q, support: str) -> tuple[torch.Tensor, torch.Tensor]:
    if support == "full":
        return logps, q
    on = q.topk(3, -1).indices if support == "topk" else S.expand(len(q), -1)
    return logps.gather(1, on), q.gather(1, on)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("support", "divergence", "normalizer"), WAYS)
def test_value_and_gradients_equal_full_logits(support, divergence, normalizer, softcap):
    h, t = normal(N, D).requires_grad_(), normal(N, D, seed=5)
    head, base_head = heads(True, softcap)
    config = DistillConfig(support=support, divergence=divergence, normalizer=normalizer, beta=BETA, n_topk=3)
    got = divergence_loss(h, t, W, head, base_head, S, config, chunk=2)
    logps, q = logits_of(h, *head).log_softmax(-1), logits_of(t, *base_head).log_softmax(-1)
    want = [
        reference_divergence(a, b, divergence, normalizer, BETA)
        for a, b in zip(*(x.exp().tolist() for x in on_support(logps, q, support)), strict=True)
    ]
    assert_near(got.divergence, torch.tensor(want, dtype=torch.float64), 1e-12)
    assert_near(got.student_mass, logps[:, S].exp().sum(-1).detach(), 1e-12)
    assert_near(got.teacher_mass, q[:, S].exp().sum(-1), 1e-12)
    naive = (localized_divergence(*on_support(logps, q, support), divergence, normalizer, BETA) * W).sum()
    assert_near(got.loss, naive, 1e-12)
    leaves = (h, head[0], head[1])
    for a, b in zip(
        torch.autograd.grad(3.0 * got.loss, leaves), torch.autograd.grad(3.0 * naive, leaves), strict=True
    ):
        assert_near(a, b, 1e-12)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("support", get_args(Support))
def test_gradient_is_the_slope(support, trained, with_bias):
    h, t = normal(N, D).requires_grad_(), normal(N, D, seed=5)
    (weight, bias, softcap, scale), base_head = heads(with_bias, 2.0, trained)
    config = DistillConfig(support=support, divergence="symmetric", normalizer="generalized", n_topk=3)

    def loss(h, weight, bias):
        return divergence_loss(
            h, t, W, Head(weight, bias, softcap, scale), base_head, S, config, chunk=2
        ).loss

    assert torch.autograd.gradcheck(loss, (h, weight, bias))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("support", get_args(Support))
def test_no_position_by_vocabulary_tensor_is_formed(support, trained):
    n, d_vocab = 64, 500
    h, weight = normal(n, 8).requires_grad_(), normal(d_vocab, 8, seed=1).requires_grad_(trained)
    head = Head(weight)
    with LargestTensor() as seen:
        weights = torch.ones(n).double()
        config = DistillConfig(support=support)
        divergence_loss(h, normal(n, 8, seed=2), weights, head, head, S, config, chunk=4)
    assert seen.largest <= weight.numel() < n * d_vocab


@pytest.mark.parametrize("support", get_args(Support))
def test_a_suppressed_token_does_not_poison_the_gradient(support):
    """Both heads give token 7 of S a logit of -inf."""
    bias = torch.zeros(V, dtype=torch.float64)
    bias[7] = -torch.inf
    h = normal(N, D).requires_grad_()
    head = Head(normal(V, D, seed=1).requires_grad_(), bias)
    config = DistillConfig(support=support, divergence="symmetric", normalizer="generalized", n_topk=3)
    got = divergence_loss(h, normal(N, D, seed=5), W, head, head, S, config)
    got.loss.backward()
    assert got.divergence.isfinite().all()
    assert h.grad.isfinite().all()
    assert head[0].grad.isfinite().all()


def test_half_precision_goes_in_and_the_sums_are_wide():
    h, t, weight = normal(40, 16), normal(40, 16, seed=5), normal(300, 16, seed=1)
    w, config = torch.full((40,), 1 / 40), DistillConfig(divergence="reverse", normalizer="partial")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf, head = h.to(dtype).requires_grad_(), Head(weight.to(dtype).requires_grad_())
        got = divergence_loss(leaf, t.to(dtype), w, head, head, S, config, chunk=7)
        got.loss.backward()
        assert got.loss.dtype == torch.float32
        assert (leaf.grad.dtype, head[0].grad.dtype) == (dtype, dtype)
        results.append((got.loss.detach(), leaf.grad.float(), head[0].grad.float()))
    for wide, narrow in zip(*results, strict=True):
        assert float((wide - narrow).norm() / wide.norm()) < 0.05


def test_off_set_leaves_the_set_out():
    h, t = normal(N, D), normal(N, D, seed=5)
    head, base_head = heads(True, None, trained=False)
    p, q = (logits_of(x, *y).log_softmax(-1) for x, y in ((h, head), (t, base_head)))
    terms = p.exp() * (p - q) - p.exp() + q.exp()
    outside = [v for v in range(V) if v not in S.tolist()]
    want = float(terms[:, outside].sum(-1).mean())
    assert kl_outside_set(h, t, head, base_head, S) == pytest.approx(want)
