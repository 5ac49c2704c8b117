"""The loss of a step, from final hidden states: on S, on the teacher's top k, or everywhere.

No function here forms more than a chunk of (position x vocabulary).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safesteer.divergence import (
    Divergence,
    Normalizer,
    full_divergence,
    localized_divergence,
    logits_of,
    logps_on,
    rows_a_chunk,
)
from safesteer.models import output_head

OFF_SET_POSITIONS = 128  # positions a step on which the divergence outside S is measured

Support = Literal["safety", "topk", "full"]


def loss_part(
    hidden: Float[Tensor, "n d_model"],
    h_teacher: Float[Tensor, "n d_model"],
    model: nn.Module,
    base_head: tuple,
    ids: Int[Tensor, " n_set"],
    here: Int[Tensor, "..."],
    support: Support,
    divergence: Divergence,
    normalizer: Normalizer,
    beta: float,
    whole: Bool[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Divergence at each position, and the student's mass on S (detached).

    `ids` is S; `here` the support's ids, one set for all positions or a row a position. Positions in
    `whole` are compared over the whole vocabulary, whatever the support.
    """
    head = output_head(model)
    if support == "full":
        part = full_divergence(hidden, h_teacher, head, base_head, divergence, beta)
    else:
        p = logps_on(hidden, head[0], here, bias=head[1], softcap=head[2])
        with torch.no_grad():
            q = logps_on(h_teacher, base_head[0], here, bias=base_head[1], softcap=base_head[2])
        part = localized_divergence(p, q, divergence, normalizer, beta)
        if whole is not None and bool(whole.any()):
            over_all = full_divergence(hidden[whole], h_teacher[whole], head, base_head, divergence, beta)
            part = part.index_put((whole.nonzero()[:, 0],), over_all)
    with torch.no_grad():
        if support != "safety":
            p = logps_on(hidden, head[0], ids, bias=head[1], softcap=head[2])
        return part, p.exp().sum(-1)


@torch.no_grad()
def topk_ids(h_teacher: Tensor, head: tuple, k: int) -> Int[Tensor, "n k"]:
    """The teacher's top-k ids at each position (the "teacher top-k" support)."""
    parts = h_teacher.split(rows_a_chunk(len(head[0])))
    return torch.cat([logits_of(h, *head).topk(k, -1).indices for h in parts])


@torch.no_grad()
def off_set(hidden: Tensor, h_teacher: Tensor, model: nn.Module, base_head: tuple, ids: Tensor) -> float:
    """Generalized KL(student || teacher) outside S, in nats a position, on a spread of positions."""
    at = torch.linspace(0, len(hidden) - 1, min(OFF_SET_POSITIONS, len(hidden))).long()
    p = logits_of(hidden[at], *output_head(model)).log_softmax(-1)
    q = logits_of(h_teacher[at], *base_head).log_softmax(-1)
    terms = p.exp() * (p - q) - p.exp() + q.exp()
    terms[:, ids] = 0
    return float(terms.sum(-1).mean())
