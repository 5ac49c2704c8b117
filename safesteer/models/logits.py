"""TODO models.logits."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def positions_per_chunk(d_vocab: int) -> int:
    """Positions whose logits are held at once."""
    return max(1, min(CHUNK, CHUNK_LOGITS // d_vocab))


def logits_of(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """softcap(weight @ h + bias) in float32 or wider: the output head on final hidden states."""
    # A strided slice of positions would be read by a batched product, many times slower.
    z = (h.reshape(-1, h.shape[-1]) @ weight.T).view(*h.shape[:-1], -1)
    z = z if z.dtype == torch.float64 else z.float()
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logps_on(
    hidden: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    ids: Int[Tensor, " n_set"] | Int[Tensor, "n n_set"],
    *,
    bias: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "n n_set"]:
    """log softmax(weight @ hidden + bias) on `ids`, in nats, float32 or wider; differentiable.

    `ids` is one set for all positions, or one row of ids a position. `softcap` is Gemma's
    final_logit_softcapping. Peak memory is that of `chunk` x d_vocab logits, whatever n is; the
    backward pass forms them again.
    """
    chunk = chunk or positions_per_chunk(len(weight))
    if int(ids.min()) < 0 or int(ids.max()) >= weight.shape[0]:
        raise ValueError(f"Token ids must lie in 0..{weight.shape[0] - 1} (the output head's rows).")

    def on(h: Tensor, at: Tensor) -> Tensor:
        z = logits_of(h, weight, bias, softcap)
        return z.gather(-1, at) - z.logsumexp(-1, keepdim=True)

    parts = zip(hidden.split(chunk), ids.expand(len(hidden), -1).split(chunk), strict=True)
    return torch.cat([checkpoint(on, h, at, use_reentrant=False) for h, at in parts])
