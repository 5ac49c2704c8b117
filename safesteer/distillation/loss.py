"""The loss of a step and its gradients from final hidden states, in one pass (Eq. 6 and its relatives).

For each chunk of positions, with student logits z = head(h) and p = softmax(z):
1. the teacher's log-probabilities on the support: S, the teacher's top k, or the whole vocabulary;
2. the weighted divergence there, and its slope g = dL / dlogp;
3. dL/dz_v = 1[v in support] g_v - p_v sum(g), and with it, while z is at hand, dL/dh = dL/dz W and,
   if the head is trained, dL/dW = (dL/dz)^T h.
No more than a chunk of (position x vocabulary) ever lives, and nothing is computed twice.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer._clock import count_product, timed
from safesteer.distillation.divergence import localized_divergence
from safesteer.models.head import Head
from safesteer.models.logits import generalized_kl_terms, logits_of, positions_per_chunk, wide_matmul
from safesteer.settings import DistillConfig, Support

CHUNKS = 3  # of positions_per_chunk: this pass holds one buffer of logits where others hold several
OFF_SET_POSITIONS = 128  # positions per step on which the divergence outside S is measured


class LossTerms(NamedTuple):
    """The loss, sum of weight x divergence, with a gradient; and one number per position, without."""

    loss: Float[Tensor, ""]
    divergence: Float[Tensor, " n"]
    student_mass: Float[Tensor, " n"]  # probability on S
    teacher_mass: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class _Fixed:
    """What the student is compared with, and the settings: nothing here gets a gradient."""

    h_teacher: Float[Tensor, "n d_model"]
    weights: Float[Tensor, " n"]
    softcap: float | None
    scale: float
    teacher_head: Head
    ids: Int[Tensor, " n_set"]
    config: DistillConfig
    chunk: int


@timed("loss")
def divergence_loss(
    hidden: Float[Tensor, "n d_model"],
    h_teacher: Float[Tensor, "n d_model"],
    weights: Float[Tensor, " n"],
    head: Head,
    teacher_head: Head,
    ids: Int[Tensor, " n_set"],
    config: DistillConfig,
    chunk: int | None = None,
) -> LossTerms:
    """Compare the student with its teacher at each position, on the support of `config`.

    The gradient reaches `hidden`, and the head's weight and bias where they require one. Over the whole
    vocabulary all normalizers agree, because the set carries the whole mass.

    Args:
        hidden: The student's final hidden states, [n, d_model].
        h_teacher: The teacher's at the same positions, [n, d_model].
        weights: Weight of each position in the loss, [n].
        head: The student's output head (`models.head.output_head`).
        teacher_head: The teacher's.
        ids: The safety tokens S, [n_set].
        config: Its support, divergence, normalizer, beta and n_topk count.
        chunk: Positions whose logits are held at once; None: what fits the usual buffer.

    Returns:
        The loss in nats; per position the divergence and both probabilities on S.
    """
    weight, bias, softcap, scale = head
    chunk = chunk or CHUNKS * positions_per_chunk(weight)
    fixed = _Fixed(h_teacher, weights, softcap, scale, teacher_head, ids, config, chunk)
    terms = cast(tuple[Tensor, ...], _ChunkedLoss.apply(hidden, weight, bias, fixed))
    return LossTerms(*terms)


class _ChunkedLoss(torch.autograd.Function):
    """`divergence_loss` with its gradient computed in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, fixed: _Fixed
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config, ids, softcap = fixed.config, fixed.ids, fixed.softcap
        support = config.support
        normalizer = "partial" if support == "full" else config.normalizer
        wide = torch.promote_types(h.dtype, torch.float32)
        wants_h, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_h = torch.empty_like(h, dtype=wide) if wants_h else None
        of_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        of_bias = None if bias is None or not wants_bias else torch.zeros_like(bias, dtype=wide)
        divergence, mass, teacher_mass = (h.new_empty(len(h), dtype=wide) for _ in range(3))
        for start in range(0, len(h), fixed.chunk):
            at = slice(start, start + fixed.chunk)
            q = logits_of(fixed.h_teacher[at], *fixed.teacher_head)
            on = q.topk(config.n_topk, -1).indices if support == "topk" else ids.expand(len(q), -1)
            q, in_s = _on_support(q, on, ids, support)[:2]  # its logits are let go before the student's
            teacher_mass[at] = in_s.exp().sum(-1)
            z = logits_of(h[at], weight, bias, softcap, fixed.scale)
            slope = None if softcap is None else 1 - (z / softcap) ** 2
            p, in_s, z, total = _on_support(z, on, ids, support)
            mass[at] = in_s.exp().sum(-1)
            with torch.enable_grad():
                p = p.detach().requires_grad_()
                parts = localized_divergence(p, q, config.divergence, normalizer, config.beta)
                (g,) = torch.autograd.grad((parts * fixed.weights[at]).sum(), p)
            divergence[at] = parts.detach()
            if not (wants_h or wants_weight or wants_bias):
                continue
            # A token suppressed with -inf stays suppressed, and 0 x inf is not a number.
            g = g.masked_fill(p == -torch.inf, 0.0)
            dz = z.mul_(-g.sum(-1, keepdim=True) / total)
            dz = dz.add_(g) if support == "full" else dz.scatter_add_(1, on, g)
            dz = dz if slope is None else dz.mul_(slope)
            dz = dz if fixed.scale == 1 else dz.mul_(fixed.scale)
            if of_h is not None:
                of_h[at] = wide_matmul(dz, weight)
            if of_weight is not None:
                count_product(len(dz), weight, wide, dz.device)
                of_weight.addmm_(dz.T, h[at].to(wide))
            if of_bias is not None:
                of_bias += dz.sum(0)
            del z, dz
        ctx.save_for_backward(of_h, of_weight, of_bias)
        ctx.dtypes = h.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(divergence, mass, teacher_mass)
        return (divergence * fixed.weights).sum(), divergence, mass, teacher_mass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        # A copy of the head's gradient is what this function exists to avoid.
        scaled = (g if g is None or float(scale) == 1 else g * scale for g in ctx.saved_tensors)
        grads = (g if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True))
        return *grads, None


def _on_support(
    z: Tensor, on: Tensor, ids: Tensor, support: Support
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities on the support and on S; exp(z - max), in the place of z; its row sums."""
    logits, in_s, top = z.gather(1, on), z[:, ids], z.amax(-1, keepdim=True)
    logits = z.clone() if support == "full" else logits
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    lse = top + total.log()
    return logits.sub_(lse), in_s - lse, z, total


@timed("loss")
@torch.no_grad()
def kl_outside_set(hidden: Tensor, h_teacher: Tensor, head: Head, teacher_head: Head, ids: Tensor) -> float:
    """Measure the generalized KL(student || teacher) outside S, in nats per position, on some positions."""
    at = torch.linspace(0, len(hidden) - 1, min(OFF_SET_POSITIONS, len(hidden))).long()
    p = logits_of(hidden[at], *head).log_softmax(-1)
    q = logits_of(h_teacher[at], *teacher_head).log_softmax(-1)
    # A token that the student never says: 0 log 0 is 0.
    terms = torch.where(p == -torch.inf, q.exp(), generalized_kl_terms(p, q))
    terms[:, ids] = 0
    return float(terms.sum(-1).mean())
