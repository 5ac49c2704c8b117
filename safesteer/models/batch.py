"""The one path from prompts to model input.

`PromptBatch.of` renders prompts by the model's own chat template and turns them into ids without a second
BOS, padded on the left, with an explicit mask. What all rows share (the system turn) stands in the same first
columns, so that a forward pass computes it once: [shared | padding | remaining].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safesteer.models.pass_sizes import pays_to_share
from safesteer.models.templates import ids_of, render, suffix_length
from safesteer.prompts.conversation import PromptLike, as_prompts

Continuation: TypeAlias = str | Sequence[int]  # what follows a prompt, as text or as ids


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Left-padded ids with their mask; `completion_mask` marks continuation tokens.

    The first `n_shared` columns are the same real tokens in every row (the system turn of the
    chat template): layout [shared | padding | remaining]. A forward pass computes them once.
    """

    prompt_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    completion_mask: Bool[Tensor, "batch pos"]
    n_shared: int = 0

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[PromptLike],
        continuations: Sequence[Continuation] | None = None,
        *,
        system: str | None = None,
        device: str | torch.device = "cpu",
        keep_shared: bool = False,
    ) -> "PromptBatch":
        """Render and tokenize `prompts`, each followed by its continuation (text or ids) if there is one.

        Args:
            tokenizer: The model's own, with a chat template.
            prompts: What the user says, as text or as messages.
            continuations: One per prompt: what stands after the template, such as an answer.
            system: A system prompt (None: what the template writes by itself).
            device: Where the tensors are put.
            keep_shared: Share columns also where a pass of their own saves little on that device: one pass
                will serve many batches.
        """
        heads = [ids_of(tokenizer, render(tokenizer, p, system=system)) for p in as_prompts(prompts)]
        tails: list[list[int]] = [[] for _ in prompts]
        if continuations is not None:
            tails = [ids_of(tokenizer, c) if isinstance(c, str) else list(c) for c in continuations]
        batch = cls.from_ids(heads, tails, device=device, n_apart=suffix_length(tokenizer))
        saved = batch.n_shared * (len(heads) - 1)
        return batch if keep_shared or pays_to_share(saved, device) else batch.plain()

    @classmethod
    def from_ids(
        cls,
        heads: Sequence[Sequence[int]],
        tails: Sequence[Sequence[int]],
        *,
        device: str | torch.device = "cpu",
        share: bool = True,
        n_apart: int = 1,
    ) -> "PromptBatch":
        """Pad ids on the left with id 0: the mask, never the pad id, says which tokens are real.

        Args:
            heads: Ids of each prompt.
            tails: Ids of each continuation, empty where there is none.
            device: Where the tensors are put.
            share: Put the tokens that all prompts start with into shared columns; False keeps every
                column in every row's own forward pass.
            n_apart: Last columns of every prompt that are never shared: one at least, so that every row has
                an input.
        """
        width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        limit = max(0, min(len(h) for h in heads) - n_apart)
        n_shared = _common_prefix(heads, limit=limit) if share else 0
        shape = (len(heads), width)
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        completion = torch.zeros(shape, dtype=torch.bool)
        for row, (h, t) in enumerate(zip(heads, tails, strict=True)):
            remaining = [*h[n_shared:], *t]
            ids[row, :n_shared] = torch.tensor(h[:n_shared])
            mask[row, :n_shared] = 1
            ids[row, width - len(remaining) :] = torch.tensor(remaining)
            mask[row, width - len(remaining) :] = 1
            if t:
                completion[row, -len(t) :] = True
        return cls(ids.to(device), mask.to(device), completion.to(device), n_shared)

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Positions count real tokens only, so padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def answer_start(self) -> Int[Tensor, " batch"]:
        """Column of each row's first continuation token; the width where there is none."""
        return (~self.completion_mask).sum(-1)

    def last_counting(self, eos_ids: Sequence[int], n: int) -> Bool[Tensor, "batch n"]:
        """Mark which of the last n columns decide a token of the answer: from where it starts to its end."""
        column = torch.arange(self.prompt_ids.shape[1], device=self.prompt_ids.device)
        marks = torch.tensor(list(eos_ids), dtype=torch.long, device=column.device)
        ends = torch.isin(self.prompt_ids, marks)
        ended = (ends & self.completion_mask).cumsum(1) > 0
        return ((column >= self.answer_start[:, None] - 1) & ~ended)[:, -n:]

    def whole_rows(self, at: Int[Tensor, " rows"] | Bool[Tensor, " batch"]) -> "PromptBatch":
        """Take some rows (indices or a mask) with all columns: a cache of the batch counts them."""
        parts = (self.prompt_ids, self.attention_mask, self.completion_mask)
        return PromptBatch(*(part[at] for part in parts), self.n_shared)

    def rows(self, at: Int[Tensor, " rows"] | Bool[Tensor, " batch"]) -> "PromptBatch":
        """Take some rows (indices or a mask), without the columns that are padding in all of them."""
        whole = self.whole_rows(at)
        used = whole.attention_mask.any(0)
        parts = (whole.prompt_ids, whole.attention_mask, whole.completion_mask)
        return PromptBatch(*(part[:, used] for part in parts), self.n_shared)

    def plain(self) -> "PromptBatch":
        """Move all padding to the left: the usual layout, in which no column is shared."""
        order = self.attention_mask.argsort(dim=1, stable=True)
        ids, mask, completion = self.prompt_ids, self.attention_mask, self.completion_mask
        return PromptBatch(ids.gather(1, order), mask.gather(1, order), completion.gather(1, order))

    def extended(self, completion_ids: Int[Tensor, "rows new"]) -> "PromptBatch":
        """Repeat each row rows / batch times and continue it by its completions."""
        times = len(completion_ids) // len(self.prompt_ids)

        def grown(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old.repeat_interleave(times, 0), new], dim=1)

        ones = torch.ones_like(completion_ids)
        return PromptBatch(
            grown(self.prompt_ids, completion_ids),
            grown(self.attention_mask, ones),
            grown(self.completion_mask, ones.bool()),
            self.n_shared,
        )


def _common_prefix(rows: Sequence[Sequence[int]], limit: int) -> int:
    n = 0
    while n < limit and all(n < len(r) and r[n] == rows[0][n] for r in rows):
        n += 1
    return n if len(rows) > 1 else 0


def batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptLike],
    batch_size: int,
    *,
    system: str | None = None,
) -> list[list[int]]:
    """Group the indices of `prompts` in batches of similar token length: less padding, less work."""
    lengths = [len(ids_of(tokenizer, render(tokenizer, p, system=system))) for p in as_prompts(prompts)]
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def cut_at_eos(ids: Sequence[int], eos_ids: Sequence[int], *, keep_eos: bool) -> list[int]:
    """Cut ids at the first end-of-answer id, with it or without it."""
    stop = next((i for i, t in enumerate(ids) if t in eos_ids), None)
    return list(ids) if stop is None else list(ids[: stop + keep_eos])
