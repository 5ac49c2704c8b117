"""What an ablation measures of a model, on prompts that are there for choosing: no test prompt is read.

    harmful, harmless   greedy answers of 16 tokens that open with a refusal, over all sets together
    over_at_75          the over-refusal where a constant on the base's openers refuses 75 % of the harmful
                        prompts: arms are compared there, as each lies at another place of its curve
    auc                 how well the first token's margin tells harmful from harmless
    kl_harmless         drift: KL(base || model) along the base's answers to harmless prompts
    perplexity          of the project's own prose
    lambada             the share of rows of LAMBADA that are right, and which (`lambada_rows`)

`prompts` holds a verdict and a margin per prompt, without the prompts, which are partly other people's.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from control_tables import over_at_equal_harm
from sklearn.metrics import roc_auc_score
from two_sided import WIDE, choosing_sets, look

import safesteer as ss
from safesteer.evaluation.capability import measure_capability
from safesteer.models.adapter import as_base
from safesteer.models.drift import kl_on_answers
from safesteer.models.text_loss import general_text, perplexity

TASK = "lambada_openai"
N_ROWS = 200  # of the task
N_TOKENS = 16  # of the base's answers along which drift is measured


def sets_of(data: Path | None, limit: int | None) -> dict[str, list[str]]:
    """Return the prompts to answer, by set."""
    return {name: texts[:limit] for name, texts in choosing_sets(data).items() if name not in WIDE}


@cache
def base_answers(base: ss.ChatModel, limit: int | None) -> list[str]:
    """Return the base's greedy answers to harmless val prompts."""
    return ss.generate(base, ss.load_prompts().split("val").harmless[:limit], max_new_tokens=N_TOKENS)


def measured(
    chat: ss.ChatModel, base: ss.ChatModel, opens: torch.Tensor, data: Path | None, limit: int | None
) -> dict[str, Any]:
    """Measure a model beside its base.

    Args:
        chat: The model, in the precision of the base.
        base: The base.
        opens: Tokens that open the base's refusals.
        data: A folder of benchmark rows; None: the project's own prompts alone, and no LAMBADA.
        limit: Prompts per set; None: all.
    """
    rows = look(chat, sets_of(data, limit), opens)
    harmful = rows.set.str.endswith("harmful")
    prompts = ss.load_prompts().split("val").harmless[:limit]
    if chat is base:
        drift = 0.0
    elif chat.tokenizer.chat_template != base.tokenizer.chat_template:
        drift = None  # no position of one matches one of the other
    else:
        with as_base(base, chat):  # a steered teacher has the same weights
            answers = base_answers(base, limit)
        kls = kl_on_answers(base, chat, prompts, answers)
        drift = sum(kls) / len(kls)
    scores = {
        "harmful": float(rows.refused[harmful].to_numpy().mean()),
        "harmless": float(rows.refused[~harmful].to_numpy().mean()),
        "n": int(harmful.sum()),
        "n_harmless": int((~harmful).sum()),
        "over_at_75": over_at_equal_harm(rows),
        "auc": float(roc_auc_score(harmful, rows.margin)),
        "kl_harmless": drift,
        "perplexity": perplexity(chat, general_text(), max_tokens=256 if limit else 4096),
        "prompts": rows.to_dict("list"),
    }
    if data is not None:
        with tempfile.TemporaryDirectory() as folder:
            task = measure_capability(chat, (TASK,), folder, data=data, limit=limit or N_ROWS).iloc[0]
        scores |= {
            "lambada": float(task.value),
            "lambada_rows": {"right": [int(right) for right in task.correct]},
        }
    return scores
