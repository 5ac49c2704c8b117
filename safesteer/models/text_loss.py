"""Perplexity of plain text: what steering and training cost away from any prompt."""

import math
from importlib import resources

import torch

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, context_length, output_head
from safesteer.models.forward import final_hidden
from safesteer.models.logits import logps_on


def general_text() -> str:
    """A few pages of plain prose written for this project, for perplexity without downloads."""
    return (resources.files("safesteer.prompts") / "data" / "general.txt").read_text(encoding="utf-8")


@torch.no_grad()
def perplexity(
    chat: ChatModel, text: str, *, max_tokens: int = 8192, width: int = 512, batch_size: int = 4
) -> float:
    """exp of the mean negative log-likelihood a token (nats), in windows of `width` tokens, or of
    the model's context where that is less."""
    ids = chat.encode(text)[:max_tokens]  # type: ignore[operator]
    if len(ids) < 2:
        raise SafeSteerError("The perplexity text has fewer than two tokens.")
    width = min(width, context_length(chat.model) or width)
    weight, bias, softcap = output_head(chat.model)
    total, count = 0.0, 0
    windows = [ids[i : i + width] for i in range(0, len(ids), width)]
    windows = [w for w in windows if len(w) > 1]
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        batch = PromptBatch.from_ids(rows, [[] for _ in rows], device=chat.device, share=False)
        hidden = final_hidden(chat.model, batch)[:, :-1]
        real = batch.attention_mask[:, :-1].bool()
        targets = batch.prompt_ids[:, 1:][real]
        logps = logps_on(hidden[real], weight, targets[:, None], bias=bias, softcap=softcap)
        total, count = total - float(logps.double().sum()), count + len(targets)
    return math.exp(total / count)
