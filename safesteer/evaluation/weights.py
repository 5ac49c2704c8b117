"""How much of a model hangs on a refusal: refusals left after changes of its weights, made in memory alone.

1. The model's best refusal direction, ablated: found anew on this model, by the package's own sweep.
2. Its main directions, ablated together: principal components of the difference vectors of the positions and
   layers that pass the sweep's thresholds.
3. What training has changed, at a lower rank: of each matrix base + the first r singular directions of
   (student - base); rank 0 is the base. An open adapter is taken off.

Each has its cost beside it: KL(before || after) along the model's own answers to harmless prompts. Every
change is a context manager that puts the model back; no direction, weight or answer is kept.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._intervals import bootstrap
from safesteer.evaluation.depth import BATCH, Cell, cell
from safesteer.evaluation.rows import row
from safesteer.judges.judge import Judge, judge_all, outcomes
from safesteer.judges.sentences import declines
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate, greedy_ids
from safesteer.models.head import Head, output_head
from safesteer.models.logits import kl_divergence, logits_of
from safesteer.models.parts import hf_model, is_quantized, tensors_put_back
from safesteer.report.robust_table import CHANGED, COST
from safesteer.settings import DirectionConfig
from safesteer.steering.interventions import ablate

N_KL_TOKENS = 16  # tokens of each harmless answer along which the cost is measured
N_MILDEST = 8  # candidates with the smallest KL, where none passes the thresholds
ITERATIONS = 4  # of the randomized SVD
# All candidates stay in the ranking; `usable` applies the published thresholds where some pass them.
SEARCH = DirectionConfig(
    rank_by="ablation", coeff=1.0, max_kl=math.inf, min_steering=-math.inf, controls=(), n_held_out=0
)
PUBLISHED = DirectionConfig()  # thresholds


def usable(ranking: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Return the candidates that may be ablated, best first, and whether they pass the published thresholds.

    Those are the KL on harmless prompts and the steering score: a direction beyond them takes refusals away
    by damage. Where no candidate passes, the few with the smallest KL are returned.

    Args:
        ranking: The candidates of a sweep without thresholds, best first.
    """
    within = (ranking.kl_harmless <= PUBLISHED.max_kl) & (ranking.steering_refusal >= PUBLISHED.min_steering)
    if within.any():
        return pd.DataFrame(ranking[within]), True
    return pd.DataFrame(ranking[ranking.kl_harmless.rank(method="first") <= N_MILDEST]), False


def main_directions(
    vectors: Float[Tensor, "n_vectors d_model"], n: int
) -> Float[Tensor, "n_directions d_model"]:
    """Compute the first principal components of difference vectors, not centred.

    Args:
        vectors: Those of several positions and layers, scaled to length 1 here, so that late layers do not
            outweigh early ones.
        n: How many components; fewer where the vectors span less.

    Example:
        >>> import torch
        >>> from safesteer.evaluation.weights import main_directions
        >>> axes = main_directions(torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 9.0, 0.0]]), 3)
        >>> axes.abs().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    units = torch.nn.functional.normalize(vectors.double(), dim=-1)
    _, values, axes = torch.linalg.svd(units, full_matrices=False)
    return axes[:n][values[:n] > 1e-6].float()


@contextmanager
def ablating(chat: ChatModel, vectors: Float[Tensor, "n_directions d_model"]) -> Iterator[None]:
    """Ablate several orthogonal directions together inside the block."""
    with ExitStack() as stack:
        for vector in vectors:
            stack.enter_context(ablate(chat, vector))
        yield


@contextmanager
def update_of_rank(base: ChatModel, student: ChatModel, rank: int) -> Iterator[None]:
    """Lower the rank of what training has changed in each matrix of the student, inside the block.

    Args:
        base: The model that was trained.
        student: What it has become; its own tensors are put back when the block ends.
        rank: Singular directions of (student - base) that stay; 0: every weight is that of the base.
            Weights that are no matrices keep their change at any other rank.

    Raises:
        SafeSteerError: For quantized weights, or models of different shapes.
    """
    if is_quantized(base.model) or is_quantized(student.model):
        raise SafeSteerError("What training has changed cannot be read from weights in 4 bits.")
    before = dict(hf_model(base.model).named_parameters())
    after = dict(hf_model(student.model).named_parameters())
    if {n: p.shape for n, p in before.items()} != {n: p.shape for n, p in after.items()}:
        raise SafeSteerError("Base and student have weights of different names or shapes.")
    with tensors_put_back(after.values()):
        for name, weight in after.items():
            start = before[name].detach().float().to(weight.device)
            delta = weight.detach().float() - start
            if bool(delta.any()) and (rank == 0 or weight.dim() > 1):
                weight.data = (start + _of_rank(delta, rank) if rank else start).to(weight.dtype, copy=True)
        yield


def _of_rank(matrix: Float[Tensor, "*batch rows cols"], rank: int) -> Float[Tensor, "*batch rows cols"]:
    """Return the nearest matrix of a rank, by a randomized SVD that draws the same numbers every time."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(rank + 8, *matrix.shape[-2:]), ITERATIONS)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank].mT


@torch.no_grad()
def measure_change(
    chat: ChatModel,
    change: AbstractContextManager[None],
    name: str,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    judge: Judge = declines,
    max_new_tokens: int = 64,
) -> Cell:
    """Measure the refusals that a change of the model leaves, and the KL that it costs.

    Args:
        chat: The model, which the change is undone on when this returns.
        change: Changes it, inside its block.
        name: Of the rows.
        harmful: Prompts whose answers are judged, inside the block.
        harmless: Prompts on which the KL is measured.
        judge: Says which answers refuse, or are harmful.
        max_new_tokens: Length of the judged answers.

    Returns:
        Two rows: the rate of refusals, and KL(before || after) along the model's own harmless answers.
    """
    ids = greedy_ids(chat, harmless, N_KL_TOKENS)
    batches = list(chat.batched(harmless, BATCH, continuations=ids))
    states = [final_hidden(chat.model, batch) for _, batch in batches]
    head = _detached(output_head(chat.model))
    with change:
        answers = generate(chat, harmful, max_new_tokens=max_new_tokens, batch_size=BATCH)
        counts, values = outcomes(judge_all(judge, harmful, answers))
        kls, now = [0.0] * len(harmless), output_head(chat.model)
        for (rows, batch), at_first in zip(batches, states, strict=True):
            at_last = final_hidden(chat.model, batch)
            for n, i in enumerate(rows):
                steps = slice(-len(ids[i]) - 1, None)
                p, q = logits_of(at_first[n, steps], *head), logits_of(at_last[n, steps], *now)
                kls[i] = float(kl_divergence(p, q).mean())
    made = cell(CHANGED, name, counts, counts, values)
    metric = "KL(before || after) on harmless answers, nats a token"
    cost = row(COST, name, metric, sum(kls) / len(kls), bootstrap(kls), len(kls))
    return {**made, "rows": [*made["rows"], cost]}


def _detached(head: Head) -> Head:
    """Return the head with the weights that it has now, whatever the module's are later."""
    return head._replace(weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
