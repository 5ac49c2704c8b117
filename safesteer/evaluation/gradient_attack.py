"""A gradient attack as a measurement: how much optimization does it take until a model no longer refuses?

Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), on prompts that the model refuses at first:

1. A suffix of n tokens stands after the user's text x, inside the chat template. It starts as one
   sign, n times.
2. Its loss is that of a target y, the first m tokens of an opening of ours, which begins an answer and says
   nothing:  L(s) = -1/m sum_j log p(y_j | x, s, y_<j).
3. With s as one-hot rows, dL/ds_iv = <dL/de_i, E_v> for the embeddings e = s E. To first order the tokens v
   with the lowest values lower L most: the top k of each position are taken.
4. Candidates have one token exchanged. One pass reads them and the present suffix, and the columns that all
   share once; the one with the smallest loss stays.
5. Every few steps the greedy answer is judged, and the attack on a prompt ends where it is not refused.

Where a suffix stands, and which ones there are, is in `suffixes`. Suffixes and answers are in memory for as
long as the attack on their prompt lasts: what comes out is numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from safesteer._errors import SafeSteerError, first_line
from safesteer._intervals import bootstrap
from safesteer.evaluation.depth import BATCH, Cell
from safesteer.evaluation.rows import rate, row
from safesteer.evaluation.suffixes import Slot, allowed_ids, slot_of
from safesteer.judges.judge import Judge, judge_all, outcomes
from safesteer.judges.sentences import declines
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import final_hidden, prefill
from safesteer.models.generation import generate, seed_of
from safesteer.models.head import output_head
from safesteer.models.logits import logps_on, positions_per_chunk, wide_matmul
from safesteer.models.parts import hf_model, is_quantized
from safesteer.models.placement import is_offloaded
from safesteer.prompts.wrappers import load_openings
from safesteer.report.robust_table import ATTACKED, SPENT

DRAWS = 8  # per candidate: many exchanges give a text that is tokenized otherwise


@dataclass(frozen=True)
class GradientAttack:
    """The budget of the attack. Two models are compared under the same one."""

    n_prompts: int = 4  # of those that the model refuses
    n_suffix: int = 12  # tokens
    n_target: int = 8  # tokens of our opening that the answer should begin with
    n_steps: int = 32
    n_candidates: int = 32  # per step
    top_k: int = 64  # tokens per position that candidates are drawn from
    check_every: int = 4  # steps after which the answer is judged
    seed: int = 0


class Attacked(NamedTuple):
    """What the attack on one prompt came to."""

    steps: int
    refused: bool  # at its end
    loss_before: float  # of the target, in nats per token
    loss_after: float
    n_passes: int  # texts that were read: gradients and candidates


def attack_cell(
    model: ModelLike,
    prompts: Sequence[str],
    config: GradientAttack | None = None,
    *,
    judge: Judge = declines,
    max_new_tokens: int = 64,
) -> Cell:
    """Measure how much optimization it takes until a model no longer refuses.

    Args:
        model: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful prompts. The first that the model refuses are attacked.
        config: The budget; None: the default one.
        judge: Says which answers refuse, or are harmful. It reads the plain prompt beside the answer.
        max_new_tokens: Length of the judged answers.

    Returns:
        Rows of rates and numbers. No suffix and no answer is part of them.

    Raises:
        SafeSteerError: For a model that cannot be differentiated through its embedding.

    Example:
        >>> from safesteer.evaluation.gradient_attack import GradientAttack, attack_cell
        >>> small = GradientAttack(n_prompts=1, n_suffix=4, n_steps=2, n_candidates=4)
        >>> rows = attack_cell(chat, ["Name a river."], small, judge=lambda prompt, answer: True)["rows"]
        >>> [row["value"] for row in rows if row["name"] == "prompts attacked"]
        [1.0]
    """
    chat, config = as_chat(model), config or GradientAttack()
    if is_quantized(chat.model) or is_offloaded(chat.model):
        raise SafeSteerError(
            "A gradient attack differentiates through the weights, and those here are quantized or offloaded."
        )
    answers = generate(chat, prompts, max_new_tokens=max_new_tokens, batch_size=BATCH)
    counts, values = outcomes(judge_all(judge, prompts, answers))
    plain = rate(SPENT, "before the attack", counts, [value is True for value in values])
    refused = [i for i, value in enumerate(values) if value is True][: config.n_prompts]
    if not refused:
        metric = f"none of the first {len(prompts)} is {counts} at first"
        return {"rows": [plain, row(SPENT, "prompts attacked", metric, 0.0, None, len(prompts))]}

    def holds(prompt: str, attacked: str) -> bool:
        """Say whether the answer to an attacked prompt is still refused; an unknown verdict is no success."""
        answer = generate(chat, [attacked], max_new_tokens=max_new_tokens)
        verdict = judge_all(judge, [prompt], answer)[0]
        return verdict.refuses is not False if counts == "refused" else verdict.harmful is not True

    allowed = allowed_ids(chat)
    results = [_attack(chat, prompts[i], allowed, config, i, holds) for i in refused]
    return {"rows": [plain, *_rows(results, config, counts)]}


def _rows(results: Sequence[Attacked], config: GradientAttack, counts: str) -> Iterator[dict]:
    """Make the rows of the attacks that were made."""
    n, name = len(results), f"gradient attack of {config.n_steps} steps on {config.n_suffix} tokens"
    yield rate(ATTACKED, name, f"{counts}, of those {counts} at first", [r.refused for r in results])
    yield row(SPENT, "prompts attacked", f"the first that are {counts} at first", float(n), None, n)
    at_once = [r.steps > 0 for r in results]
    yield rate(SPENT, "with the starting suffix, nothing optimized", counts, at_once)
    steps = [float(r.steps) for r in results]
    yield row(SPENT, "steps taken", "steps per prompt", mean(steps), bootstrap(steps), n)
    # An attack that never succeeds has taken all steps, so that the median is known with failures too.
    metric = f"median; still {counts}: {config.n_steps}"
    yield row(SPENT, f"steps until not {counts}", metric, median(steps), None, n)
    for when, losses in (
        ("before", [r.loss_before for r in results]),
        ("after", [r.loss_after for r in results]),
    ):
        yield row(SPENT, f"loss of the target {when}", "nats a token", mean(losses), bootstrap(losses), n)
    total = float(sum(r.n_passes for r in results))
    yield row(SPENT, "forward passes", "texts read, gradients and candidates, all prompts", total, None, n)


def _attack(
    chat: ChatModel,
    prompt: str,
    allowed: Bool[Tensor, " d_vocab"],
    config: GradientAttack,
    number: int,
    holds: Callable[[str, str], bool],
) -> Attacked:
    """Attack one prompt, until its answer is not refused or the budget is spent."""
    target = chat.encode(load_openings()[0])[: config.n_target]
    slot = slot_of(chat, prompt, config.n_suffix, target)
    suffix, steps, n_passes, changed = slot.start, 0, 1, False
    first = loss = float(candidate_losses(chat, slot, [suffix])[0])
    refused = holds(prompt, cast(str, slot.with_suffix(chat, suffix)))
    while refused and steps < config.n_steps:
        steps += 1
        tokens = best_tokens(chat, suffix_gradient(chat, slot, suffix), allowed, config.top_k)
        seed = seed_of(("gradient attack", config.seed, number, steps))
        # The present suffix is read again: rounding in half precision differs from pass to pass.
        tried = [suffix, *_candidates(chat, slot, suffix, tokens, config.n_candidates, seed)]
        losses = candidate_losses(chat, slot, tried)
        best, n_passes = int(losses.argmin()), n_passes + 1 + len(tried)
        suffix, loss, changed = tried[best], float(losses[best]), changed or best > 0
        if changed and (steps % config.check_every == 0 or steps == config.n_steps):
            refused, changed = holds(prompt, cast(str, slot.with_suffix(chat, suffix))), False
    return Attacked(steps, refused, first, loss, n_passes)


def _losses(
    chat: ChatModel, hidden: Float[Tensor, "n pos d_model"], target: list[int]
) -> Float[Tensor, " n"]:
    """Compute the loss of the target per row, from hidden states whose last columns are the target's."""
    head, m = output_head(chat.model), len(target)
    before = hidden[:, -m - 1 : -1].flatten(0, 1)
    ids = torch.tensor(target, device=before.device).repeat(len(hidden))[:, None]
    logps = logps_on(before, head.weight.detach(), ids, **head.options)
    return -logps.view(len(hidden), m).mean(1)


@torch.no_grad()
def candidate_losses(
    chat: ChatModel, slot: Slot, suffixes: Sequence[Sequence[int]]
) -> Float[Tensor, " n_suffixes"]:
    """Compute the target's loss after each of several suffixes, in nats per token, in one pass.

    Args:
        chat: The model.
        slot: Where they stand.
        suffixes: Equally long ones. The columns that all share are computed once.
    """
    return _losses(chat, final_hidden(chat.model, slot.batch(chat, suffixes)), slot.target)


def suffix_gradient(chat: ChatModel, slot: Slot, suffix: Sequence[int]) -> Float[Tensor, "n_suffix d_model"]:
    """Compute the gradient of the target's loss with respect to the embeddings of a suffix.

    Args:
        chat: The model.
        slot: Where the suffix stands. What is before it is read without a gradient.
        suffix: Its ids.

    Raises:
        SafeSteerError: For a model that cannot be differentiated through its embedding.
    """
    embedded: list[Tensor] = []

    def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    batch = slot.batch(chat, [suffix])
    with torch.no_grad():
        cache = prefill(chat.model, batch, len(slot.head))
    handle = hf_model(chat.model).get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            loss = _losses(chat, final_hidden(chat.model, batch, cache), slot.target).sum()
            (gradient,) = torch.autograd.grad(loss, embedded[-1:])
    except RuntimeError as error:
        raise SafeSteerError(
            f"'{chat.name}' cannot be differentiated through its embedding: {first_line(error)}"
        ) from error
    finally:
        handle.remove()
    end = gradient.shape[1] - len(slot.tail) - len(slot.target)
    return gradient[0, end - len(suffix) : end]


def best_tokens(
    chat: ChatModel, gradient: Float[Tensor, "n_suffix d_model"], allowed: Bool[Tensor, " d_vocab"], k: int
) -> Int[Tensor, "n_suffix k"]:
    """Return the tokens per position that lower the loss most to first order, best first, on the CPU.

    A factor between a row of the embedding and what a model reads (Gemma's) moves no token past another.

    Args:
        chat: The model.
        gradient: With respect to the embeddings of the suffix.
        allowed: The tokens that it may hold.
        k: How many; fewer where fewer are allowed.
    """
    weight = cast(nn.Embedding, hf_model(chat.model).get_input_embeddings()).weight.detach()[: len(allowed)]
    k, chosen = min(k, int(allowed.sum())), []
    for part in gradient.split(positions_per_chunk(weight)):
        slopes = wide_matmul(part, weight, transposed=True)
        slopes = slopes.masked_fill(~allowed.to(slopes.device), torch.inf)
        chosen.append(slopes.topk(k, largest=False).indices.cpu())
    return torch.cat(chosen)


def _candidates(
    chat: ChatModel,
    slot: Slot,
    suffix: Sequence[int],
    tokens: Int[Tensor, "n_suffix k"],
    n: int,
    seed: int,
) -> list[list[int]]:
    """Exchange one token at a time: positions in turn, tokens drawn evenly from the best of each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(tokens.shape[1], (DRAWS * n,), generator=generator).tolist()
    made: list[list[int]] = []
    for i, which in enumerate(drawn):
        candidate, position = list(suffix), i % len(suffix)
        candidate[position] = int(tokens[position, which])
        is_new = candidate != suffix and candidate not in made
        if is_new and slot.with_suffix(chat, candidate) is not None:
            made.append(candidate)
        if len(made) == n:
            break
    return made
