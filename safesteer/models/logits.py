"""The output head and what is read from its logits, without a (position x vocabulary) tensor.

`logits_of` is the head itself. `logps_on` gives log-probabilities on a few ids: positions go through the
head in chunks, each chunk leaves one logsumexp and the gathered ids, and the backward pass forms the
logits again. A head in half precision is multiplied and summed in float32 (`wide_matmul`): near the teacher,
rounded logits would be most of the difference. `refusal_score` and `kl_divergence` read logits of single
positions.
"""

import math
from functools import cache, reduce
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from safesteer._clock import count_product, timed

CHUNK = 256  # positions whose logits are alive at once: the knee between speed and memory on CPU
CHUNK_LOGITS = 2**24  # or fewer positions, so that at most this many logits are (64 MiB in float32)
GPU_CHUNK, GPU_CHUNK_LOGITS = 1024, 2**25  # a product of few positions leaves most of a GPU idle

WIDENED_ROWS = 2048  # rows of a head in half precision that are widened at once, where they have to be


@timed("logits")
def refusal_score(
    logits: Float[Tensor, "*batch d_vocab"], refusal_ids: Int[Tensor, " n_refusal"]
) -> Float[Tensor, "*batch"]:
    """Compute log P - log(1 - P), P = probability of the refusal tokens (Arditi et al. 2024, section 2.3).

    Args:
        logits: First-token logits, [*batch, d_vocab].
        refusal_ids: Ids of the tokens that start a refusal, [n_refusal].

    Returns:
        Scores in nats, [*batch], from two logsumexps: they stay finite where P rounds to 0 or 1.
    """
    logps = logits.double().log_softmax(-1)
    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_refusal[refusal_ids] = True
    return logps[..., is_refusal].logsumexp(-1) - logps[..., ~is_refusal].logsumexp(-1)


@timed("logits")
def kl_divergence(
    p_logits: Float[Tensor, "*batch d_vocab"], q_logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Compute KL(p || q) in nats over the whole vocabulary. Tokens suppressed with -inf in p count as 0."""
    p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    terms = p.exp() * (p - q)
    return torch.where(p == -math.inf, torch.zeros_like(terms), terms).sum(-1)


def mean_over(
    values: Float[Tensor, "*batch n"], counting: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """Average the values that count."""
    return torch.where(counting, values, 0).sum(-1) / counting.sum(-1)


def generalized_kl_terms(
    logp: Float[Tensor, "*batch d_vocab"], logq: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch d_vocab"]:
    """Return each token's part of the generalized KL(p || q): p (log p - log q) - p + q, in nats.

    The sum over the vocabulary is KL(p || q). No part is negative (up to rounding), so the share of a set of
    tokens is a sum over its columns.
    """
    return logp.exp() * (logp - logq) - logp.exp() + logq.exp()


def positions_per_chunk(weight: Float[Tensor, "d_vocab d_model"]) -> int:
    """Return the number of positions whose logits are held at once, for a head or an embedding."""
    most, n_logits = (CHUNK, CHUNK_LOGITS) if weight.device.type == "cpu" else (GPU_CHUNK, GPU_CHUNK_LOGITS)
    return max(1, min(most, n_logits // len(weight)))


@cache
def _multiplies_wide(device: str, dtype: torch.dtype) -> bool:
    """Say whether the device multiplies half precision into a float32 result; tried once."""
    narrow = torch.ones((16, 16), dtype=dtype, device=device)
    try:
        torch.mm(narrow, narrow, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def _halves(a: Float[Tensor, "n k"]) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into bfloat16 ones and what these leave, which add up to them within 2**-16."""
    high = a.to(torch.bfloat16)
    return high, (a - high).to(torch.bfloat16)


def wide_matmul(
    a: Float[Tensor, "n k"], weight: Float[Tensor, "rows cols"], *, transposed: bool = False
) -> Float[Tensor, "n m"]:
    """Compute a @ weight, or a @ weight.T, with products and sums in float32 or wider.

    No wide copy of `weight` is made. Where the device multiplies bfloat16 into a float32 result, a float32
    `a` is taken as the sum of two bfloat16 numbers, which keeps 16 of its 24 bits: many times faster there
    than products in float32. Elsewhere rows of `weight` are widened a few at a time.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, weight.dtype), torch.float32)
    if a.dtype == weight.dtype == wide:
        count_product(len(a), weight, wide, a.device)
        return a @ (weight.T if transposed else weight)
    splits = a.dtype == torch.float32 and weight.dtype == torch.bfloat16
    if (splits or a.dtype == weight.dtype) and _multiplies_wide(str(a.device), weight.dtype):
        parts = _halves(a) if splits else (a,)
        count_product(len(parts) * len(a), weight, weight.dtype, a.device)
        factor = weight.T if transposed else weight
        return reduce(Tensor.add_, (torch.mm(part, factor, out_dtype=wide) for part in parts))
    count_product(len(a), weight, wide, a.device)
    a = a.to(wide)
    out = a.new_zeros((len(a), weight.shape[0 if transposed else 1]))
    for start in range(0, len(weight), WIDENED_ROWS):
        part = slice(start, start + WIDENED_ROWS)
        if transposed:
            out[:, part] = a @ weight[part].to(wide).T
        else:
            out.addmm_(a[:, part], weight[part].to(wide))
    return out


class _WideHead(torch.autograd.Function):
    """hidden @ weight.T by `wide_matmul`; so are its gradients, which are rounded once, at the end."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return wide_matmul(hidden, weight, transposed=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        (grad,), (wants_hidden, wants_weight) = grad_outputs, ctx.needs_input_grad
        of_hidden = wide_matmul(grad, weight).to(hidden.dtype) if wants_hidden else None
        of_weight = (grad.T @ hidden.to(grad.dtype)).to(weight.dtype) if wants_weight else None
        return of_hidden, of_weight


@timed("logits")
def logits_of(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None,
    softcap: float | None,
    scale: float = 1.0,
) -> Float[Tensor, "*batch d_vocab"]:
    """Put the head on final hidden states: softcap(scale (weight @ hidden + bias)), in float32 or wider."""
    # A strided slice of positions would be read by a batched product, many times slower.
    flat = hidden.reshape(-1, hidden.shape[-1])
    exact = flat.dtype == weight.dtype and weight.dtype in (torch.float32, torch.float64)
    z = wide_matmul(flat, weight, transposed=True) if exact else cast(Tensor, _WideHead.apply(flat, weight))
    z = z.view(*hidden.shape[:-1], -1)
    z = z if bias is None else z + bias
    z = z if scale == 1 else scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logps_on(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    ids: Int[Tensor, " n_set"] | Int[Tensor, "n n_set"],
    *,
    bias: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "n n_set"]:
    """Compute log softmax(weight @ hidden + bias) on `ids`; differentiable.

    Args:
        hidden: Final hidden states, [n, d_model].
        weight: The output head, [d_vocab, d_model].
        ids: One set for all positions, [n_set], or one row per position, [n, n_set].
        bias: The head's bias, [d_vocab].
        softcap: Gemma's final_logit_softcapping.
        scale: The factor of Cohere, Granite and others.
        chunk: Positions per chunk. Peak memory is that of chunk x d_vocab logits, whatever n is; the
            backward pass forms them again.

    Returns:
        Log-probabilities in nats, [n, n_set], in float32 or wider.

    Raises:
        ValueError: For an id that the head has no row for.
    """
    chunk = chunk or positions_per_chunk(weight)
    if int(ids.min()) < 0 or int(ids.max()) >= weight.shape[0]:
        raise ValueError(f"Token ids must lie in 0..{weight.shape[0] - 1} (the output head's rows).")

    def on(h: Tensor, at: Tensor) -> Tensor:
        z = logits_of(h, weight, bias, softcap, scale)
        return z.gather(-1, at) - z.logsumexp(-1, keepdim=True)

    parts = zip(hidden.split(chunk), ids.expand(len(hidden), -1).split(chunk), strict=True)
    return torch.cat([checkpoint(on, h, at, use_reentrant=False) for h, at in parts])
