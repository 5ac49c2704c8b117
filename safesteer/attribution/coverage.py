"""How much of what steering changes lies on S.

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
from safesteer.attribution.tracing import answer_ids
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.logits import generalized_kl_terms
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.sampling import AnswerStates, logp_rows

KS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200)  # sizes of S that curves run over
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
    """Shares (0..1) that the first K tokens of a family of sets carry, for each K.

    `kl_share` is that of KL(teacher || base); `mass_teacher` and `mass_base` are probabilities of the set.
    """

    name: str
    kl_share: Range
    mass_teacher: Range
    mass_base: Range


@dataclass(frozen=True)
class StepShare:
    """One step of the answers: KL per position (nats), and each family's share of it at K = |S|."""

    steps: str
    n_positions: int
    kl: float
    kl_share: dict[str, float]


@dataclass(frozen=True)
class TextCoverage:
    """Coverage on one kind of text, S having `k` tokens.

    `kl` is the mean KL(teacher || base) per position, in nats; `ks` are the sizes that the curves run over.
    """

    name: str
    k: int
    n_positions: int
    kl: float
    ks: tuple[int, ...]
    curves: tuple[SetCurve, ...]
    steps: tuple[StepShare, ...]

    def at_k(self, family: str) -> float:
        """Return the share of KL that a family of sets carries at the size of S."""
        curve = next(c for c in self.curves if c.name == family)
        return curve.kl_share.mean[self.ks.index(self.k)]


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
    texts: tuple[TextCoverage, ...]
    answer_shares: tuple[AnswerShare, ...]


@dataclass(frozen=True, eq=False)
class Controls:
    """How control sets are drawn: `n_sets` of each family.

    `candidates` are the tokens that selection could have chosen, `ordinary` all that are not special.
    """

    candidates: Bool[Tensor, " d_vocab"]
    ordinary: Bool[Tensor, " d_vocab"]
    n_sets: int = 8
    seed: int = 0


@torch.no_grad()
def read_answers(
    chat: ModelLike,
    direction: Direction,
    prompts: Sequence[PromptLike],
    answers: Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 32,
    batch_size: int = 8,
) -> AnswerStates:
    """Read existing answers with teacher and base, in the form that sampled answers have.

    Args:
        chat: The base model.
        direction: The direction whose addition makes the teacher.
        prompts: The requests.
        answers: One answer per prompt, as text or token ids; an answer without a token is left out.
        max_tokens: Tokens read per answer.
        batch_size: Prompts per forward pass.
    """
    chat = as_chat(chat)
    ids = [answer_ids(chat, answer, max_tokens) for answer in answers]
    texts = [prompt for prompt, row in zip(as_prompts(prompts), ids, strict=True) if row]
    ids = [row for row in ids if row]
    shape = (len(ids), max(map(len, ids), default=1))
    dtype = next(chat.model.parameters()).dtype
    teacher = torch.zeros((*shape, chat.d_model), dtype=dtype, device=chat.device)
    base, valid = torch.zeros_like(teacher), torch.zeros(shape, dtype=torch.bool)
    completion = torch.zeros(shape, dtype=torch.long)
    for rows, batch in chat.batched(texts, batch_size, continuations=ids):
        with steer(chat, direction):
            steered = final_hidden(chat.model, batch)
        unsteered = final_hidden(chat.model, batch)
        for at, row in enumerate(rows):
            n = len(ids[row])
            span = slice(-n - 1, -1)  # position t - 1 predicts token t
            teacher[row, :n], base[row, :n] = steered[at, span], unsteered[at, span]
            completion[row, :n], valid[row, :n] = torch.tensor(ids[row]), True
    return AnswerStates(teacher, base, completion.to(chat.device), valid.to(chat.device), tuple(texts))


@dataclass(frozen=True, eq=False)
class StepSums:
    """Sums over positions, by group of steps: KL parts (nats) and probabilities of every token."""

    kl: Float[Tensor, "steps d_vocab"]
    teacher: Float[Tensor, "steps d_vocab"]
    base: Float[Tensor, "steps d_vocab"]
    n: Int[Tensor, " steps"]


@torch.no_grad()
def sum_by_step(chat: ChatModel, sampled: AnswerStates) -> StepSums:
    """Add up KL parts and probabilities (step 1): one streaming pass, memory O(step groups x vocabulary)."""
    ends = torch.tensor(STEP_ENDS)
    step_group = torch.bucketize(torch.arange(sampled.valid.shape[1]) + 1, ends)
    n_groups = int(step_group.max()) + 1
    shape = (n_groups, chat.d_vocab)
    kl, teacher, base = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    n = torch.zeros(n_groups, dtype=torch.long)
    for _, step, logp_steered, logp_base in logp_rows(chat, sampled):
        group = step_group[step.cpu()]
        terms = generalized_kl_terms(logp_steered, logp_base).clamp(min=0)
        for g in group.unique().tolist():
            at = (group == g).to(terms.device)
            kl[g] += terms[at].sum(0, dtype=torch.float64).cpu()
            teacher[g] += logp_steered[at].exp().sum(0, dtype=torch.float64).cpu()
            base[g] += logp_base[at].exp().sum(0, dtype=torch.float64).cpu()
            n[g] += int(at.sum())
    return StepSums(kl, teacher, base, n)


def random_sets(
    allowed: Bool[Tensor, " d_vocab"], size: int, n_sets: int, seed: int
) -> list[Int[Tensor, " size"]]:
    """Draw sets of allowed tokens uniformly, without repetition."""
    pool, generator = allowed.nonzero()[:, 0], torch.Generator().manual_seed(seed)
    return [pool[torch.randperm(len(pool), generator=generator)[:size]] for _ in range(n_sets)]


def matched_sets(
    ranking: Int[Tensor, " n"], k: int, p_base: Float[Tensor, " d_vocab"], controls: Controls
) -> list[Int[Tensor, " n_matched"]]:
    """Draw for each ranked token, in order, an ordinary token of nearly its base probability.

    Without repetition, from the NEAREST neighbours in base probability, none of them one of
    the first `k` of `ranking` (S itself).
    """
    free = controls.ordinary.clone()
    free[ranking[:k]] = False
    pool = free.nonzero()[:, 0]
    pool = pool[p_base[pool].argsort(stable=True)]
    places = torch.searchsorted(p_base[pool].contiguous(), p_base[ranking].contiguous()).tolist()
    generator, sets = torch.Generator().manual_seed(controls.seed), []
    for _ in range(controls.n_sets):
        drawn: list[int] = []
        used: set[int] = set()
        for place in places:
            low = max(0, min(place - NEAREST // 2, len(pool) - NEAREST))
            near = [i for i in range(low, min(len(pool), low + NEAREST)) if i not in used]
            if not near:  # all used: the nearest that are left
                left = (i for i in range(len(pool)) if i not in used)
                near = sorted(left, key=lambda i: abs(i - place))[:NEAREST]
            if not near:
                break
            pick = near[int(torch.randint(len(near), (1,), generator=generator))]
            used.add(pick)
            drawn.append(int(pool[pick]))
        sets.append(torch.tensor(drawn, dtype=torch.long))
    return sets


def text_coverage(
    name: str,
    sums: StepSums,
    ranking: Int[Tensor, " n_ranked"],
    k: int,
    controls: Controls,
    ks: Sequence[int] = KS,
) -> TextCoverage:
    """Compute the curves of one kind of text (step 2).

    Args:
        name: What the text is, for display.
        sums: What `sum_by_step` returns for it.
        ranking: Token ids: S (the first `k`), then those that selection would take next.
        k: The size of S.
        controls: How the other sets are drawn.
        ks: Sizes of the sets; those beyond the ranking are left out.
    """
    ks = sorted({x for x in ks if 1 <= x <= len(ranking)} | {min(k, len(ranking))})
    n, kl, largest = int(sums.n.sum()), sums.kl.sum(0), max(ks)
    p_base = (sums.base.sum(0) / max(n, 1)).float()
    draws = controls.n_sets, controls.seed
    families = {
        "S": [ranking],
        "best possible": [kl.topk(min(largest, len(kl))).indices],
        "random candidates": random_sets(controls.candidates, largest, *draws),
        "matched in base probability": matched_sets(ranking, k, p_base, controls),
        "random": random_sets(controls.ordinary, largest, *draws),
    }
    curves = tuple(
        SetCurve(
            family,
            range_of([_shares(kl, s, ks, float(kl.sum())) for s in sets]),
            range_of([_shares(sums.teacher.sum(0), s, ks, float(n)) for s in sets]),
            range_of([_shares(sums.base.sum(0), s, ks, float(n)) for s in sets]),
        )
        for family, sets in families.items()
    )
    steps = _step_shares(sums, k, families)
    return TextCoverage(name, min(k, len(ranking)), n, float(kl.sum()) / max(n, 1), tuple(ks), curves, steps)


def _step_shares(sums: StepSums, k: int, families: dict[str, list[Tensor]]) -> tuple[StepShare, ...]:
    steps, start = [], 1
    for g in range(len(sums.n)):
        end = STEP_ENDS[g] if g < len(STEP_ENDS) else None
        count, total = int(sums.n[g]), float(sums.kl[g].sum())
        if count:
            share = {
                family: sum(_shares(sums.kl[g], s, [k], total)[0] for s in sets) / len(sets)
                for family, sets in families.items()
            }
            label = f"{start} on" if end is None else str(end) if start == end else f"{start} to {end}"
            steps.append(StepShare(label, count, total / count, share))
        start = (end or 0) + 1
    return tuple(steps)


def _shares(
    per_token: Float[Tensor, " d_vocab"],
    ids: Int[Tensor, " n"],
    ks: Sequence[int],
    total: float,
) -> list[float]:
    """Return the share of `total` that the first k ids carry, for each k."""
    running = per_token[ids].cumsum(0)
    return [float(running[min(k, len(ids)) - 1]) / total if total > 0 and len(ids) else 0.0 for k in ks]


def range_of(curves: list[list[float]]) -> Range:
    """Return mean, lowest and highest of several curves, point by point."""
    columns = list(zip(*curves, strict=True))
    return Range(
        tuple(sum(c) / len(c) for c in columns),
        tuple(min(c) for c in columns),
        tuple(max(c) for c in columns),
    )


def answer_share(
    chat: ChatModel,
    name: str,
    answers: Sequence[str],
    chosen: Int[Tensor, " n_set"],
    matched: Sequence[Int[Tensor, " n_matched"]],
    *,
    max_tokens: int = 32,
) -> AnswerShare:
    """Count the answers of one kind with a token of S among their first `max_tokens` (step 3).

    Args:
        chat: The model whose tokenizer reads the answers.
        name: What the answers are, for display.
        answers: Their texts.
        chosen: The ids of S.
        matched: Sets that are matched to S, for comparison.
        max_tokens: Tokens read per answer.
    """
    ids = [set(answer_ids(chat, answer, max_tokens)) for answer in answers]

    def hits(token_set: Tensor) -> int:
        wanted = set(token_set.tolist())
        return sum(bool(row & wanted) for row in ids)

    n, with_s = len(ids), hits(chosen)
    with_matched = sum(hits(s) for s in matched) / max(1, len(matched))
    low, high = wilson(with_s, n)
    return AnswerShare(name, n, with_s / max(1, n), low, high, with_matched / max(1, n))
