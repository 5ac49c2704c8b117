"""Drift: how far a model has moved from its base on the base's own answers."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safesteer.models.adapter import as_base
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import kl_divergence, logits_of
from safesteer.models.processes import in_turns


def kl_on_answers(
    base: ChatModel,
    chat: ChatModel,
    prompts: Sequence[str],
    answers: Sequence[str | Sequence[int]],
    *,
    n_tokens: int = 16,
    batch_size: int = 50,
) -> list[float]:
    """Measure KL(base || chat) per prompt, in nats per token, over the first tokens of the base's answers.

    Args:
        base: The frozen base, which may carry the adapter of `chat`.
        chat: The model that is compared with it.
        prompts: The prompts.
        answers: The base's own greedy answers to them, as `greedy_ids` gives them. A text is tokenized
            again: tokens that were left out of it, or split otherwise, then make it another answer.
        n_tokens: Tokens of each answer that are read.
        batch_size: Prompts per forward pass.
    """
    ids = [(chat.encode(a) if isinstance(a, str) else list(a))[:n_tokens] for a in answers]
    return [float(kl.mean()) for kl in kl_at_positions(base, chat, prompts, ids, batch_size=batch_size)]


@torch.no_grad()
def kl_at_positions(
    base: ChatModel,
    chat: ChatModel,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 50,
) -> list[Float[Tensor, " pos"]]:
    """Measure KL(base || chat) at every position along answers, in nats.

    Args:
        base: The frozen base, which may carry the adapter of `chat`.
        chat: The model that is compared with it.
        prompts: The prompts.
        answers: The ids of an answer to each, without the token that ends it.
        batch_size: Prompts per forward pass.

    Returns:
        For each prompt one value more than its answer has tokens: before the first one, and after each.

    Example:
        >>> from safesteer.models.drift import kl_at_positions
        >>> kl_at_positions(chat, chat, ["Hello"], [[20, 21]])[0].tolist()
        [0.0, 0.0, 0.0]
    """
    kls = [torch.zeros(0)] * len(prompts)

    def measure(part: tuple[list[int], PromptBatch]) -> list[Tensor]:
        rows, batch = part
        with as_base(base, chat):
            h_base = final_hidden(base.model, batch)
        h_chat, measured = final_hidden(chat.model, batch), []
        for row, i in enumerate(rows):
            steps = slice(-len(answers[i]) - 1, None)  # the prompt's last position predicts the first
            at_base = logits_of(h_base[row, steps], *output_head(base.model))
            at_chat = logits_of(h_chat[row, steps], *output_head(chat.model))
            measured.append(kl_divergence(at_base, at_chat).cpu())
        return measured

    parts = chat.batched(prompts, batch_size, continuations=answers)
    for (rows, _), measured in in_turns(parts, measure):
        for i, kl in zip(rows, measured, strict=True):
            kls[i] = kl
    return kls
