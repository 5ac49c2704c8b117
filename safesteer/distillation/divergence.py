"""Tensor maths of the method: scores, log-probabilities on a token set, localized divergences.

1. `logps_on`: for final hidden states h and output head W, log softmax(W h) on a few token ids only.
   One logsumexp a position is all that is needed of the vocabulary, so it is formed in chunks of
   positions and no (position x vocabulary) tensor ever lives.
2. `localized_divergence` (paper section 3.4; Eq. 5 and 6): compare student p and teacher q on those
   ids, one number a position. `objective.compare` joins the two for a training step.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from safesteer.models.logits import generalized_kl_terms
from safesteer.settings import Divergence, Normalizer


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, clamped where the set carries (almost) the whole mass."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _kl_terms(p: Tensor, q: Tensor, generalized: bool) -> Tensor:
    """sum p (log p - log q), with the Bregman correction - p + q where asked. Arguments are logs."""
    terms = generalized_kl_terms(p, q) if generalized else p.exp() * (p - q)
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
