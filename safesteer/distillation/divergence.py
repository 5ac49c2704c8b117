"""Localized divergences: student against teacher on a few tokens (paper section 3.4; Eq. 5 and 6).

`localized_divergence` compares log-probabilities on the set, one number per position. A training step forms
them from hidden states, chunk by chunk, in `loss.divergence_loss`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from safesteer.models.logits import generalized_kl_terms
from safesteer.settings import Divergence, Normalizer


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, clamped where the set carries (almost) the whole mass."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _kl(p: Tensor, q: Tensor, generalized: bool) -> Tensor:
    """Sum p (log p - log q), `generalized` by the Bregman correction - p + q. Arguments are logs."""
    terms = generalized_kl_terms(p, q) if generalized else p.exp() * (p - q)
    return torch.where(p == -math.inf, q.exp() if generalized else 0.0, terms).sum(-1)


def localized_divergence(
    student_logps: Float[Tensor, "*batch n_set"],
    teacher_logps: Float[Tensor, "*batch n_set"],
    divergence: Divergence = "reverse",
    normalizer: Normalizer = "partial",
    beta: float = 0.5,
) -> Float[Tensor, "*batch"]:
    """Compute the divergence of student p from teacher q on the token set.

    Args:
        student_logps: Log-probabilities of the student on the set, in nats, [*batch, n_set].
        teacher_logps: The teacher's.
        divergence: "reverse" is sum p (log p - log q), "forward" the same with p and q exchanged,
            "symmetric" the mean of both; "jsd" is the generalized Jensen-Shannon divergence with the
            mixture beta q + (1 - beta) p (GKD).
        normalizer: What becomes of the mass outside the set. "partial" leaves it out: with "reverse" that
            is Eq. 6 as published, which is not a divergence (it can be negative; its minimum is p = q / e).
            "generalized" adds - p + q (zero only at p = q), "tail" adds one bucket for everything outside
            the set (a true KL), "renormalized" divides both by their mass on the set (the ablation of
            Table 5). For "jsd" the corrections of "generalized" cancel, so it agrees with "partial".
        beta: Mixture of "jsd".

    Returns:
        One divergence per position, in nats, [*batch].

    Example:
        >>> import torch
        >>> from safesteer.distillation.divergence import localized_divergence
        >>> p, q = torch.tensor([0.25]).log(), torch.tensor([0.5]).log()
        >>> print(f"{localized_divergence(p, q):.4f}")  # 0.25 log(0.25 / 0.5)
        -0.1733
        >>> print(f"{localized_divergence(p, q, normalizer='generalized'):.4f}")  # ... - 0.25 + 0.5
        0.0767
    """
    p, q = student_logps, teacher_logps
    if normalizer == "renormalized":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
    if normalizer == "tail":
        p = torch.cat([p, _log1mexp(p.logsumexp(-1, keepdim=True))], -1)
        q = torch.cat([q, _log1mexp(q.logsumexp(-1, keepdim=True))], -1)
    generalized = normalizer == "generalized"
    if divergence == "reverse":
        return _kl(p, q, generalized)
    if divergence == "forward":
        return _kl(q, p, generalized)
    if divergence == "symmetric":
        return 0.5 * _kl(p, q, generalized) + 0.5 * _kl(q, p, generalized)
    mixture = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return beta * _kl(q, mixture, False) + (1 - beta) * _kl(p, mixture, False)
