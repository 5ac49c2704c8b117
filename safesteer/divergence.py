"""Tensor maths of the method: scores, log-probabilities on a token set, localized divergences.

Algorithm (paper section 3.4; Eq. 5 and 6):
1. `logps_on`: for final hidden states h and output head W, return log softmax(W h) on a few
   token ids only. One logsumexp a position is all that is needed of the vocabulary, so it is
   formed in chunks of positions and no (position x vocabulary) tensor ever lives.
2. `localized_divergence`: compare student p and teacher q on those ids, one number a position.

Backward of step 1, with G = dL/dlogp on S and s = sum_S G:
    dL/dz_k = 1[k in S] G_k - s p_k,   so   dh = G W_S - s (p W)   and   dW = G^T h - (s p)^T h.
`p W` is formed in the forward pass; with a frozen head the backward never touches V again.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Divergence = Literal["reverse", "forward", "symmetric", "jsd"]
Normalizer = Literal["partial", "generalized", "tail", "renormalized"]

CHUNK = 256  # positions of logits alive at once: the knee between speed and memory on CPU,
CHUNK_LOGITS = 2**24  # or fewer, so that this many logits are (64 MiB in float32)


def refusal_score(
    logits: Float[Tensor, "*batch d_vocab"], refusal_ids: Int[Tensor, " n_refusal"]
) -> Float[Tensor, "*batch"]:
    """log P - log(1 - P) in nats, P = probability of the refusal tokens (Arditi et al. 2024, 2.3).

    Computed from two logsumexps, so it stays finite where P rounds to 0 or 1.
    """
    logps = logits.double().log_softmax(-1)
    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_refusal[refusal_ids] = True
    return logps[..., is_refusal].logsumexp(-1) - logps[..., ~is_refusal].logsumexp(-1)


def kl_divergence(
    p_logits: Float[Tensor, "*batch d_vocab"], q_logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats over the whole vocabulary. Tokens suppressed with -inf in p count as 0."""
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    terms = p.exp() * (p - q)
    return torch.where(p == -math.inf, torch.zeros_like(terms), terms).sum(-1)


def rows_a_chunk(d_vocab: int) -> int:
    """Positions whose logits are held at once."""
    return max(1, min(CHUNK, CHUNK_LOGITS // d_vocab))


def logits_of(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """softcap(weight @ h + bias) in float32 or wider: the output head on final hidden states."""
    # A strided slice of positions would be read by a batched product, many times slower.
    z = (h.reshape(-1, h.shape[-1]) @ weight.T).view(*h.shape[:-1], -1)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _softcap_slope(z: Tensor, softcap: float | None) -> Tensor | float:
    return 1.0 if softcap is None else 1 - (z / softcap) ** 2


class _LogpsOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, ids, softcap, chunk):
        n, rows = h.shape[0], ids.dim() == 2
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        logps = h.new_empty((n, ids.shape[-1]), dtype=wide)
        lse = h.new_empty((n,), dtype=wide)
        mean_row = torch.empty_like(h) if h.requires_grad else None  # p W
        for start in range(0, n, chunk):
            at = slice(start, start + chunk)
            z = logits_of(h[at], weight, bias, softcap)
            lse[at] = z.logsumexp(-1)
            logps[at] = (z.gather(-1, ids[at]) if rows else z[:, ids]) - lse[at, None]
            if mean_row is not None:
                slope = _softcap_slope(z, softcap)
                p = z.sub_(lse[at, None]).exp_()
                p = p if softcap is None else p * slope
                mean_row[at] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(h, weight, bias, ids, lse, mean_row, logps)
        ctx.softcap = softcap
        return logps

    @staticmethod
    def backward(ctx, *grad_outputs):  # type: ignore[override]
        h, weight, bias, ids, lse, mean_row, logps = ctx.saved_tensors
        grad, softcap, rows = grad_outputs[0], ctx.softcap, ids.dim() == 2
        total = grad.sum(-1)
        on_set = grad * _softcap_slope(logps + lse[:, None], softcap)
        grad_h = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            if rows:
                grad_h = torch.einsum("ns,nsd->nd", on_set.to(h.dtype), weight[ids])
            else:
                grad_h = on_set.to(h.dtype) @ weight[ids]
            grad_h.addcmul_(mean_row, total[:, None].to(h.dtype), value=-1)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_w, grad_b = _head_gradient(h, weight, bias, lse, total, softcap)
            flat_ids = ids.reshape(-1) if rows else ids
            if rows:
                of_ids = (on_set[..., None] * h[:, None]).reshape(-1, h.shape[-1])
                of_bias = on_set.reshape(-1)
            else:
                of_ids, of_bias = on_set.T.to(h.dtype) @ h, on_set.sum(0)
            grad_w.index_add_(0, flat_ids, of_ids.to(grad_w.dtype))
            if grad_b is not None:
                grad_b.index_add_(0, flat_ids, of_bias.to(grad_b.dtype))
        return grad_h, grad_w, grad_b, None, None, None


def _head_gradient(h, weight, bias, lse, total, softcap, block=2048):
    """-(s p)^T h, by blocks of the vocabulary: one matrix product a row block, no wide buffer."""
    grad_w = torch.empty_like(weight)
    grad_b = None if bias is None else torch.empty_like(bias)
    for start in range(0, weight.shape[0], block):
        at = slice(start, start + block)
        rows, row_sums = torch.zeros_like(weight[at]), h.new_zeros(len(weight[at]), dtype=lse.dtype)
        for first in range(0, h.shape[0], block):  # bounds the (position x row) buffer
            pos = slice(first, first + block)
            z = logits_of(h[pos], weight[at], None if bias is None else bias[at], softcap)
            slope = _softcap_slope(z, softcap)
            p = z.sub_(lse[pos, None]).exp_().mul_(-total[pos, None])
            p = p if softcap is None else p * slope
            rows += p.T.to(h.dtype) @ h[pos]
            row_sums += p.sum(0)
        grad_w[at] = rows
        if grad_b is not None:
            grad_b[at] = row_sums
    return grad_w, grad_b


def logps_on(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    ids: Int[Tensor, " n_set"] | Int[Tensor, "n n_set"],
    *,
    bias: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "n n_set"]:
    """Differentiable log softmax(weight @ hidden + bias) on `ids`, in nats, float32 or wider.

    `ids` is one set for all positions, or one row of ids a position (teacher top-k). `softcap` is
    Gemma's final_logit_softcapping. Peak memory is that of `chunk` x d_vocab logits, whatever n is.
    """
    chunk = chunk or rows_a_chunk(len(weight))
    if int(ids.min()) < 0 or int(ids.max()) >= weight.shape[0]:
        raise ValueError(f"Token ids must lie in 0..{weight.shape[0] - 1} (the output head's rows).")
    return _LogpsOn.apply(hidden, weight, bias, ids, softcap, chunk)  # type: ignore[return-value]


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, clamped where the set carries (almost) the whole mass."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _kl_terms(p: Tensor, q: Tensor, generalized: bool) -> Tensor:
    """sum p (log p - log q), with the Bregman correction - p + q where asked. Arguments are logs."""
    terms = p.exp() * (p - q)
    if generalized:
        terms = terms - p.exp() + q.exp()
    return torch.where(p == -math.inf, q.exp() if generalized else 0.0, terms).sum(-1)


def localized_divergence(
    student_logps: Float[Tensor, "*batch n_set"],
    teacher_logps: Float[Tensor, "*batch n_set"],
    divergence: Divergence = "reverse",
    normalizer: Normalizer = "partial",
    beta: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """Divergence of student p from teacher q on the token set, per position, in nats.

    "reverse" + "partial" is Eq. 6, sum p (log p - log q), as published: not a divergence (it can be
    negative; its minimum is p = q / e). "generalized" adds - p + q (zero only at p = q), "tail"
    adds one bucket for everything outside the set (a true KL), "renormalized" divides both by their
    mass on the set (the ablation of Table 5). "symmetric" is half reverse, half forward; "jsd" is
    the generalised Jensen-Shannon divergence with mixture beta q + (1 - beta) p (GKD), for which
    "partial" and "generalized" agree because the corrections cancel.
    """
    p, q = student_logps, teacher_logps
    if normalizer == "renormalized":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
    if normalizer == "tail":
        p = torch.cat([p, _log1mexp(p.logsumexp(-1, keepdim=True))], -1)
        q = torch.cat([q, _log1mexp(q.logsumexp(-1, keepdim=True))], -1)
    generalized = normalizer == "generalized"
    if divergence == "reverse":
        return _kl_terms(p, q, generalized)
    if divergence == "forward":
        return _kl_terms(q, p, generalized)
    if divergence == "symmetric":
        return 0.5 * _kl_terms(p, q, generalized) + 0.5 * _kl_terms(q, p, generalized)
    mixture = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return beta * _kl_terms(q, mixture, False) + (1 - beta) * _kl_terms(p, mixture, False)


def full_divergence(
    hidden: Float[Tensor, "n d_model"],
    teacher_hidden: Float[Tensor, "n d_model"],
    head: tuple[Tensor, Tensor | None, float | None],
    teacher_head: tuple[Tensor, Tensor | None, float | None],
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    chunk: int | None = None,
) -> Float[Tensor, " n"]:
    """Divergence over the whole vocabulary (the ablation of Table 4), in checkpointed chunks.

    All normalizers agree here, because the set carries the whole mass.
    """
    chunk = chunk or rows_a_chunk(len(head[0]))

    def of(h: Tensor, t: Tensor) -> Tensor:
        p, q = logits_of(h, *head).log_softmax(-1), logits_of(t, *teacher_head).log_softmax(-1)
        return localized_divergence(p, q, divergence, "partial", beta)

    parts = [
        checkpoint(of, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), teacher_hidden.split(chunk), strict=True)
    ]
    return torch.cat(parts)
