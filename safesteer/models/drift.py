"""Drift: how far a model has moved from its base on the base's own answers."""

from collections.abc import Sequence

import torch

from safesteer.models.adapter import as_base
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import kl_divergence, logits_of


@torch.no_grad()
def kl_on_answers(
    base: ChatModel,
    chat: ChatModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    n_tokens: int = 16,
    batch_size: int = 50,
) -> list[float]:
    """Measure KL(base || chat) per prompt, in nats per token, over the first tokens of the base's answers.

    Args:
        base: The frozen base, which may carry the adapter of `chat`.
        chat: The model that is compared with it.
        prompts: The prompts.
        answers: The base's own greedy answers to them.
        n_tokens: Tokens of each answer that are read.
        batch_size: Prompts per forward pass.
    """
    kls = [0.0] * len(prompts)
    continuations = [chat.encode(answer)[:n_tokens] for answer in answers]
    for rows, batch in chat.batched(prompts, batch_size, continuations=continuations):
        with as_base(base, chat):
            h_base = final_hidden(base.model, batch)
        h_chat = final_hidden(chat.model, batch)
        for row, i in enumerate(rows):
            steps = slice(-len(continuations[i]) - 1, None)  # the prompt's last position predicts the first
            at_base = logits_of(h_base[row, steps], *output_head(base.model))
            at_chat = logits_of(h_chat[row, steps], *output_head(chat.model))
            kls[i] = float(kl_divergence(at_base, at_chat).mean())
    return kls
