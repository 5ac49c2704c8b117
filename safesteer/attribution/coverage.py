"""How much of what steering changes lies on S: the referee's question.

1. One pass over the counting positions adds up, per token and per step, its part of the
   generalized KL(teacher || base) and its probability under both models: [steps x vocabulary].
   The parts are >= 0 and add up, so the share of any set is a sum over its columns.
2. Curves: the share carried by the first K of S; by the best K tokens there are (an upper bound);
   and by controls: K random candidates (tokens that selection could have chosen), K tokens matched
   one by one in base probability, K tokens of the whole vocabulary at random.
3. AnswerShare: in how many refusals, and in how many answers that comply with harmful prompts, does
   a token of S occur at all, against matched sets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safesteer._intervals import wilson
from safesteer.attribution.tracing import answer_ids, kl_terms
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.selection import AnswerStates, logp_rows

NEAREST = 40  # a matched token is drawn from this many neighbours in base probability
STEP_ENDS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128)  # steps are grouped as 1, 2, ..8, 9-16, ..


@dataclass(frozen=True)
class Range:
    """A curve with the lowest and highest value over repeated draws (equal for one draw)."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class SetCurve:
    """Shares (0..1) that the first K tokens of a family of sets carry, for each K."""

    name: str
    kl_share: Range
    mass_teacher: Range
    mass_base: Range


@dataclass(frozen=True)
class StepShare:
    """One step of the answers: KL a position (nats), and each family's share of it at K = |S|."""

    steps: str
    n_positions: int
    kl: float
    kl_share: dict[str, float]


@dataclass(frozen=True)
class TextCoverage:
    """Coverage on one kind of text, S having `k` tokens.

    `kl` is the mean KL(teacher || base) a position, in nats.
    """

    name: str
    k: int
    n_positions: int
    kl: float
    ks: tuple[int, ...]
    curves: tuple[SetCurve, ...]
    steps: tuple[StepShare, ...]


@dataclass(frozen=True)
class AnswerShare:
    """Share of `n` answers with a token of S in their first tokens; Wilson 95 % interval."""

    answers: str
    n: int
    share: float
    low: float
    high: float
    share_matched: float


@dataclass(frozen=True)
class Coverage:
    """`k` is the size of S; curves go past it along the ranking that selection would continue."""

    k: int
    sources: tuple[TextCoverage, ...]
    containing: tuple[AnswerShare, ...]


@torch.no_grad()
def read_answers(
    base: ChatModel,
    direction: Direction,
    prompts: Sequence[str],
    answers: Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 32,
    batch_size: int = 8,
) -> AnswerStates:
    """Given answers read by teacher and base: the form that sampled rollouts have."""
    ids = [answer_ids(base.tokenizer, a, max_tokens) for a in answers]
    kept = [i for i, row in enumerate(ids) if row]
    shape = (len(kept), max((len(ids[i]) for i in kept), default=1))
    dtype = next(base.model.parameters()).dtype
    teacher = torch.zeros((*shape, base.d_model), dtype=dtype, device=base.device)
    plain, valid = torch.zeros_like(teacher), torch.zeros(shape, dtype=torch.bool)
    completion = torch.zeros(shape, dtype=torch.long)
    texts = [prompts[i] for i in kept]
    for rows in batches(base.tokenizer, texts, batch_size):
        tails = [ids[kept[r]] for r in rows]
        batch = PromptBatch.of(base.tokenizer, [texts[r] for r in rows], tails, device=base.device)
        with steer(base, direction):
            steered = final_hidden(base.model, batch)
        unsteered = final_hidden(base.model, batch)
        for at, (r, tail) in enumerate(zip(rows, tails, strict=True)):
            span = slice(-len(tail) - 1, -1)  # position t - 1 predicts token t
            teacher[r, : len(tail)], plain[r, : len(tail)] = steered[at, span], unsteered[at, span]
            completion[r, : len(tail)], valid[r, : len(tail)] = torch.tensor(tail), True
    device = base.device
    return AnswerStates(teacher, plain, completion.to(device), valid.to(device), tuple(texts))


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums over positions, by group of steps: KL parts (nats) and probabilities of every token."""

    kl: Float[Tensor, "steps d_vocab"]
    teacher: Float[Tensor, "steps d_vocab"]
    base: Float[Tensor, "steps d_vocab"]
    n: Int[Tensor, " steps"]


@torch.no_grad()
def totals(chat: ChatModel, sampled: AnswerStates) -> Totals:
    """Step 1: one streaming pass, memory O(step groups x vocabulary)."""
    ends = torch.tensor(STEP_ENDS)
    group_of = torch.bucketize(torch.arange(sampled.valid.shape[1]) + 1, ends)
    n_groups = int(group_of.max()) + 1
    shape = (n_groups, chat.d_vocab)
    kl, teacher, base = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    n = torch.zeros(n_groups, dtype=torch.long)
    for _, step, logp_t, logp_0 in logp_rows(chat, sampled):
        group, terms = group_of[step.cpu()], kl_terms(logp_t, logp_0)
        for g in group.unique().tolist():
            at = (group == g).to(terms.device)
            kl[g] += terms[at].sum(0, dtype=torch.float64).cpu()
            teacher[g] += logp_t[at].exp().sum(0, dtype=torch.float64).cpu()
            base[g] += logp_0[at].exp().sum(0, dtype=torch.float64).cpu()
            n[g] += int(at.sum())
    return Totals(kl, teacher, base, n)


def random_sets(
    allowed: Bool[Tensor, " d_vocab"], size: int, n_sets: int, seed: int
) -> list[Int[Tensor, " size"]]:
    """Uniform draws of allowed tokens, without repetition."""
    pool, generator = allowed.nonzero()[:, 0], torch.Generator().manual_seed(seed)
    return [pool[torch.randperm(len(pool), generator=generator)[:size]] for _ in range(n_sets)]


def matched_sets(
    ranking: Int[Tensor, " n"],
    k: int,
    p_base: Float[Tensor, " d_vocab"],
    ordinary: Bool[Tensor, " d_vocab"],
    n_sets: int,
    seed: int,
) -> list[Int[Tensor, " n_matched"]]:
    """For each ranked token, in order, an ordinary token of nearly its base probability.

    Drawn without repetition from the NEAREST neighbours in base probability, none of them one of
    the first `k` of `ranking` (S itself).
    """
    free = ordinary.clone()
    free[ranking[:k]] = False
    pool = free.nonzero()[:, 0]
    pool = pool[p_base[pool].argsort(stable=True)]
    places = torch.searchsorted(p_base[pool].contiguous(), p_base[ranking].contiguous()).tolist()
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(n_sets):
        taken: list[int] = []
        used: set[int] = set()
        for place in places:
            low = max(0, min(place - NEAREST // 2, len(pool) - NEAREST))
            near = [i for i in range(low, min(len(pool), low + NEAREST)) if i not in used]
            near = near or [i for i in range(len(pool)) if i not in used]
            if not near:
                break
            pick = near[int(torch.randint(len(near), (1,), generator=generator))]
            used.add(pick)
            taken.append(int(pool[pick]))
        found.append(torch.tensor(taken, dtype=torch.long))
    return found


def source_coverage(
    name: str,
    total: Totals,
    ranking: Int[Tensor, " n_ranked"],
    k: int,
    ks: Sequence[int],
    candidates: Bool[Tensor, " d_vocab"],
    ordinary: Bool[Tensor, " d_vocab"],
    *,
    n_sets: int = 8,
    seed: int = 0,
) -> TextCoverage:
    """Step 2 for one kind of text. `ranking` starts with S (its first `k` ids) and goes on.

    `candidates` are the tokens that selection could have chosen, `ordinary` all that are not
    special.
    """
    ks = sorted({x for x in ks if 1 <= x <= len(ranking)} | {min(k, len(ranking))})
    n, kl = int(total.n.sum()), total.kl.sum(0)
    p_base = (total.base.sum(0) / max(n, 1)).float()
    families = {
        "S": [ranking],
        "best possible": [kl.topk(min(max(ks), len(kl))).indices],
        "random candidates": random_sets(candidates, max(ks), n_sets, seed),
        "matched in base probability": matched_sets(ranking, k, p_base, ordinary, n_sets, seed),
        "random": random_sets(ordinary, max(ks), n_sets, seed),
    }
    curves = tuple(
        SetCurve(
            family,
            range_of([_shares(kl, s, ks, float(kl.sum())) for s in sets]),
            range_of([_shares(total.teacher.sum(0), s, ks, float(n)) for s in sets]),
            range_of([_shares(total.base.sum(0), s, ks, float(n)) for s in sets]),
        )
        for family, sets in families.items()
    )
    steps, start = [], 1
    for g, end in enumerate(STEP_ENDS[: len(total.n)]):
        count, whole = int(total.n[g]), float(total.kl[g].sum())
        if count:
            share = {
                family: sum(_shares(total.kl[g], s, [k], whole)[0] for s in sets) / len(sets)
                for family, sets in families.items()
            }
            label = str(end) if start == end else f"{start} to {end}"
            steps.append(StepShare(label, count, whole / count, share))
        start = end + 1
    return TextCoverage(
        name, min(k, len(ranking)), n, float(kl.sum()) / max(n, 1), tuple(ks), curves, tuple(steps)
    )


def _shares(
    per_token: Float[Tensor, " d_vocab"],
    ids: Int[Tensor, " n"],
    ks: Sequence[int],
    whole: float,
) -> list[float]:
    """What the first k ids carry of `whole`, for each k."""
    running = per_token[ids].cumsum(0)
    return [float(running[min(k, len(ids)) - 1]) / whole if whole > 0 and len(ids) else 0.0 for k in ks]


def range_of(curves: list[list[float]]) -> Range:
    columns = list(zip(*curves, strict=True))
    return Range(
        tuple(sum(c) / len(c) for c in columns),
        tuple(min(c) for c in columns),
        tuple(max(c) for c in columns),
    )


def containing(
    tokenizer,
    name: str,
    answers: Sequence[str],
    chosen: Int[Tensor, " n_set"],
    matched: Sequence[Int[Tensor, " n_matched"]],
    *,
    max_tokens: int = 32,
) -> AnswerShare:
    """Step 3 for one kind of answer: those with a token of S among their first `max_tokens`."""
    ids = [set(answer_ids(tokenizer, a, max_tokens)) for a in answers]

    def hits(token_set: Tensor) -> int:
        wanted = set(token_set.tolist())
        return sum(bool(row & wanted) for row in ids)

    n, found = len(ids), hits(chosen)
    others = sum(hits(s) for s in matched) / max(1, len(matched))
    low, high = wilson(found, n)
    return AnswerShare(name, n, found / max(1, n), low, high, others / max(1, n))
