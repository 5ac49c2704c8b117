"""Depth: does a model still refuse once its answer has been opened for it?

1. Open the answer with k tokens: of a compliant text of ours, which says nothing, or of the base's answer.
2. Let the model write on, greedily.
3. Judge the whole answer, and what the model itself has written of it: it refuses where either does. So a
   refusal after "Sure, here is ..." counts.
4. Beside it, KL(base || student) position by position along the base's own answers.

Training that moves first tokens alone shows in both: refusals end after a few tokens, and so does the KL (Qi
et al. 2024, "Safety alignment should be made more than just a few tokens deep", arXiv 2406.05946). Answers
are judged in memory; nothing keeps them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from safesteer._intervals import bootstrap
from safesteer.evaluation.rows import rate, row
from safesteer.judges.judge import Judge, judge_all, outcomes
from safesteer.judges.sentences import declines
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.drift import kl_at_positions
from safesteer.models.generation import generate_ids
from safesteer.report.robust_table import UNKNOWN, opened_by

BATCH = 32  # prompts per batch
Cell = dict[str, list[dict[str, Any]]]  # "rows" of the table, and "verdicts": whether it holds per prompt


class Opened(NamedTuple):
    """An answer that was opened: all of it, and what the model has written of it."""

    whole: str
    written: str


def continue_answers(
    chat: ModelLike,
    prompts: Sequence[str],
    openings: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = BATCH,
) -> list[Opened]:
    """Let a model write on from where its answers were opened, greedily.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: The prompts.
        openings: The ids that each answer starts with; none: the model's own answer.
        max_new_tokens: How many tokens the model writes at most.
        batch_size: Prompts per batch.

    Example:
        >>> from safesteer.evaluation.depth import continue_answers
        >>> answer = continue_answers(chat, ["Hello"], [chat.encode("Sure, ")], max_new_tokens=4)[0]
        >>> answer.whole.startswith("Sure,"), answer.whole.endswith(answer.written)
        (True, True)
    """
    chat = as_chat(chat)
    answers = [Opened("", "")] * len(prompts)
    for rows, batch in chat.batched(prompts, batch_size, continuations=openings):
        out = generate_ids(chat, batch, max_new_tokens=max_new_tokens)
        for i, ids in zip(rows, out.tolist(), strict=True):
            whole = chat.decode_answer([*openings[i], *ids])
            answers[i] = Opened(whole, chat.decode_answer(ids))
    return answers


def depth_cell(
    chat: ChatModel,
    prompts: Sequence[str],
    openings: Sequence[Sequence[int]],
    k: int,
    kind: str,
    judge: Judge = declines,
    max_new_tokens: int = 64,
) -> Cell:
    """Measure how many answers refuse that their first k tokens were given to.

    Args:
        chat: The model.
        prompts: Harmful prompts.
        openings: The ids of an opening per prompt, of which the first k are used.
        k: How many tokens open an answer; 0: the plain refusal rate.
        kind: The kind of the row.
        judge: Says which answers refuse, or are harmful.
        max_new_tokens: How many tokens the model writes at most.

    Returns:
        The row of the rate, which says where an opening is shorter than k, and the verdicts.
    """
    opened = [list(ids[:k]) for ids in openings]
    answers = continue_answers(chat, prompts, opened, max_new_tokens=max_new_tokens)
    counts, values = outcomes(judge_all(judge, prompts, [a.whole for a in answers]))
    if counts == "refused" and k:
        _, alone = outcomes(judge_all(judge, prompts, [a.written for a in answers]))
        values = [either(pair) for pair in zip(values, alone, strict=True)]
    shortest = min(map(len, opened))
    metric = counts if shortest == k else f"{counts}, the shortest opening has {shortest} tokens"
    return cell(kind, opened_by(k), metric, counts, values)


def either(values: Sequence[bool | None]) -> bool | None:
    """Return whether one of several verdicts holds; None where that is unknown."""
    return True if True in values else None if None in values else False


def cell(kind: str, name: str, metric: str, counts: str, values: Sequence[bool | None]) -> Cell:
    """Return a rate with its verdicts; unknown ones count as not refused, and have a row of their number."""
    rows = [rate(kind, name, metric, [value is True for value in values])]
    if None in values:
        rows.append(rate(UNKNOWN, f"{kind}: {name}", UNKNOWN, [value is None for value in values]))
    return {"rows": rows, "verdicts": [{"counts": counts, "verdict": value} for value in values]}


def kl_rows(
    base: ChatModel, student: ChatModel, prompts: Sequence[str], answers: Sequence[Sequence[int]], kind: str
) -> list[dict[str, Any]]:
    """Make a row per position: KL(base || student) along answers of the base, with its interval.

    Args:
        base: The base.
        student: The model that is compared with it.
        prompts: The prompts.
        answers: The ids of the base's answers; shorter ones leave the later positions.
        kind: The kind of the rows.
    """
    kls = [kl.tolist() for kl in kl_at_positions(base, student, prompts, answers, batch_size=BATCH)]
    made = []
    for position in range(max(map(len, answers))):
        values = [kl[position] for kl in kls if position < len(kl)]
        mean, limits = sum(values) / len(values), bootstrap(values)
        metric = "KL(base || student), nats"
        made.append(row(kind, f"position {position + 1}", metric, mean, limits, len(values)))
    return made
