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


def test_a_token_that_is_never_said_adds_the_teachers_probability():
    """0 log 0 is 0: of p log(p / q) - p + q the last is left."""
    h, t, never = normal(N, D), normal(N, D, seed=5), torch.zeros(V, dtype=torch.float64)
    never[3] = -torch.inf
    weight = normal(V, D, seed=1)
    heads_of_both = Head(weight, never), Head(weight, None)
    got = kl_outside_set(h, t, *heads_of_both, S)
    p, q = (logits_of(x, *head).log_softmax(-1) for x, head in zip((h, t), heads_of_both, strict=True))
    terms = (p.exp() * (p - q)).nan_to_num(0.0) - p.exp() + q.exp()
    assert 3 not in S.tolist()
    assert got == pytest.approx(float(terms[:, [v for v in range(V) if v not in S.tolist()]].sum(-1).mean()))


# --- half precision ---


def near_the_teacher(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, teacher's hidden, head): differences are small beside the rounding of a logit."""
    teacher = normal(64, 64, seed=5)
    hidden = teacher + 0.1 * normal(64, 64, seed=6)
    return hidden.to(dtype), teacher.to(dtype), (0.4 * normal(2500, 64, seed=7)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "reverse", "normalizer": "partial"},
        {"normalizer": "tail"},
        {"support": "full", "divergence": "reverse"},
        {"support": "topk"},
    ],
    ids=str,
)
def test_states_in_half_precision_give_the_loss_that_they_have_in_float64(settings, dtype):
    """The same states and heads: only the arithmetic differs."""
    config, ids = DistillConfig(**settings), torch.arange(10, 60)

    def loss_and_gradient(hidden, teacher, weight):
        leaf = hidden.clone().requires_grad_()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = torch.full((len(leaf),), 1 / len(leaf), dtype=wide)
        terms = divergence_loss(leaf, teacher, weights, Head(weight), Head(weight), ids, config)
        terms.loss.backward()
        return terms.loss.detach().double(), leaf.grad.double(), terms.divergence.abs().mean()

    hidden, teacher, weight = near_the_teacher(dtype)
    want, slope, size = loss_and_gradient(hidden.double(), teacher.double(), weight.double())
    got, narrow, _ = loss_and_gradient(hidden, teacher, weight)
    assert float((got - want).abs() / size) < 1e-5
    assert float((narrow - slope).norm() / slope.norm()) < 0.5 * torch.finfo(dtype).eps  # rounded once
    got, wide, _ = loss_and_gradient(hidden.float(), teacher, weight)
    assert float((got - want).abs() / size) < 1e-5
    assert float((wide - slope).norm() / slope.norm()) < 1e-5


def test_a_head_in_half_precision_is_never_widened_whole():
    hidden, teacher, weight = (t.bfloat16() for t in (normal(32, 64), normal(32, 64), normal(20_000, 64)))
    weights, head = torch.full((32,), 1 / 32), Head(weight)
    with LargestTensor() as seen:
        loss = divergence_loss(
            hidden.requires_grad_(), teacher, weights, head, head, S, DistillConfig(), chunk=8
        )
        loss.loss.backward()
    assert seen.largest == 8 * len(weight) < weight.numel()  # a chunk of logits
