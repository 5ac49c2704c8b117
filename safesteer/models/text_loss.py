"""Perplexity of plain text: what steering and training cost away from any prompt.

The text is cut into windows. Each starts with the special tokens that the tokenizer puts before a text (BOS);
every token but a window's first is predicted from those before it in the window, and exp of the mean negative
log-likelihood is returned.
"""

import math
from importlib import resources
from pathlib import Path

import torch

from safesteer._errors import SafeSteerError
from safesteer._files import json_lines
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import logps_on
from safesteer.models.parts import context_length
from safesteer.models.processes import in_turns
from safesteer.models.templates import special_start
from safesteer.models.traits import traits_of

LARGEST_LOSS = 700.0  # nats per token; exp of more is no float
WIKITEXT = "wikitext2_test.jsonl"  # its articles as JSON Lines, in a folder of local rows


def wikitext(data: str | Path) -> str:
    """Read WikiText-2 as one text again, from its articles in a folder of local rows."""
    return "".join(row["prompt"] for row in json_lines(Path(data) / WIKITEXT))


def general_text() -> str:
    """Return a few pages of plain prose written for this project, for perplexity without downloads."""
    return (resources.files("safesteer.prompts") / "data" / "general.txt").read_text(encoding="utf-8")


@torch.no_grad()
def perplexity(
    chat: ModelLike, text: str, *, max_tokens: int = 8192, width: int = 512, batch_size: int = 4
) -> float:
    """Compute exp of the mean negative log-likelihood per token (nats).

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        text: Plain text; no chat template is used.
        max_tokens: Tokens of it that are read.
        width: Tokens per window, BOS included, or the model's context where that is less.
        batch_size: Windows per forward pass.

    Raises:
        SafeSteerError: For a text of fewer than two tokens, or a loss that has no exp: broken weights.

    Example:
        >>> from safesteer.models.text_loss import perplexity
        >>> perplexity(chat, "The tide comes in twice a day.") > 1
        True
    """
    chat = as_chat(chat)
    ids = chat.encode(text)[:max_tokens]
    if len(ids) < 2:
        raise SafeSteerError("The perplexity text has fewer than two tokens.")
    bos = special_start(chat.tokenizer)
    width = min(width, context_length(chat.model) or width) - len(bos)
    head = output_head(chat.model)
    total, count = 0.0, 0
    windows = [[*bos, *ids[i : i + width]] for i in range(0, len(ids), width)]
    windows = [w for w in windows if len(w) > 1]

    def log_likelihood(part: list[list[int]]) -> tuple[float, int]:
        batch = PromptBatch.from_ids(part, [[] for _ in part], device=chat.device, share=False)
        hidden = final_hidden(chat.model, batch)[:, :-1]
        real = batch.attention_mask[:, :-1].bool()
        targets = batch.prompt_ids[:, 1:][real]
        logps = logps_on(hidden[real], head.weight, targets[:, None], **head.options)
        return float(logps.double().sum()), len(targets)

    # The last window is shorter: alone, where a model cannot read padding.
    last = [] if traits_of(chat.model).pads else [windows.pop()]
    parts = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    parts += [[window] for window in last]
    for _, (likelihood, n) in in_turns(parts, log_likelihood):
        total, count = total - likelihood, count + n
    if not total / count < LARGEST_LOSS:
        raise SafeSteerError(
            f"The model's loss on plain text is {total / count:.3g} nats per token, too much for a"
            " perplexity: its text is broken."
        )
    return math.exp(total / count)
