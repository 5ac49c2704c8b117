"""TODO models.batch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safesteer._errors import SafeSteerError


def render(tokenizer, prompt: str, *, system: str | None = None) -> str:
    """The chat text up to where the answer starts. Thinking is switched off where it can be."""
    if not tokenizer.chat_template:
        raise SafeSteerError(
            f"The tokenizer '{tokenizer.name_or_path}' has no chat template, and SafeSteer needs one"
            " to know where an answer starts: use a chat model, or set tokenizer.chat_template."
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # templates raise whatever they like
        raise SafeSteerError(f"The chat template of '{tokenizer.name_or_path}' failed: {error}") from error


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def suffix_length(tokenizer) -> int:
    """Number of template tokens after the instruction (the post-instruction positions)."""
    a, b = (_ids(tokenizer, render(tokenizer, text)) for text in ("Hello there", "Bonjour 7"))
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    if n == 0:
        raise SafeSteerError(
            f"The chat template of '{tokenizer.name_or_path}' adds nothing after the instruction, so"
            " there is no post-instruction position to read."
        )
    return n


def template_hash(tokenizer) -> str:
    """Hash of how the tokenizer renders a prompt: equal templates agree, 16 hex digits."""
    text = json.dumps([render(tokenizer, "x"), _ids(tokenizer, render(tokenizer, "x"))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Left-padded ids with their mask; `completion_mask` marks continuation tokens.

    The first `n_shared` columns are the same real tokens in every row (the system turn of the
    chat template): layout [shared | padding | rest]. A forward pass computes them once.
    """

    prompt_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    completion_mask: Bool[Tensor, "batch pos"]
    n_shared: int = 0

    @classmethod
    def of(
        cls,
        tokenizer,
        prompts: Sequence[str],
        continuations: Sequence[str] | Sequence[Sequence[int]] | None = None,
        *,
        system: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "PromptBatch":
        """Render and tokenize `prompts`, each followed by its continuation (text or ids) if given."""
        heads = [_ids(tokenizer, render(tokenizer, p, system=system)) for p in prompts]
        tails: list[list[int]] = [[] for _ in prompts]
        if continuations is not None:
            tails = [_ids(tokenizer, c) if isinstance(c, str) else list(c) for c in continuations]
        return cls.from_ids(heads, tails, device=device)

    @classmethod
    def from_ids(
        cls,
        heads: Sequence[Sequence[int]],
        tails: Sequence[Sequence[int]],
        *,
        device: str | torch.device = "cpu",
        share: bool = True,
    ) -> "PromptBatch":
        """Pad on the left with id 0: the mask, never the pad id, says which tokens are real.

        `share=False` keeps every column in every row's own forward pass.
        """
        width = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        # One column at least stays outside the shared part, so that every row has an input.
        shortest = min(len(h) for h in heads) - 1
        n_shared = _common_prefix(heads, limit=shortest) if share else 0
        shape = (len(heads), width)
        ids = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        completion = torch.zeros(shape, dtype=torch.bool)
        for row, (h, t) in enumerate(zip(heads, tails, strict=True)):
            rest = [*h[n_shared:], *t]
            ids[row, :n_shared] = torch.tensor(h[:n_shared])
            mask[row, :n_shared] = 1
            ids[row, width - len(rest) :] = torch.tensor(rest)
            mask[row, width - len(rest) :] = 1
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

    def rows(self, at: Tensor) -> "PromptBatch":
        """Some rows (indices or a mask), without the columns that are padding in all of them."""
        used = self.attention_mask[at].any(0)
        parts = (self.prompt_ids, self.attention_mask, self.completion_mask)
        return PromptBatch(*(part[at][:, used] for part in parts), self.n_shared)

    def extended(self, completion_ids: Int[Tensor, "rows new"]) -> "PromptBatch":
        """Each row repeated rows / batch times and continued by its completions."""
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
    tokenizer, prompts: Sequence[str], batch_size: int, *, system: str | None = None
) -> Iterable[list[int]]:
    """Indices of `prompts` in batches of similar token length: less padding, less work."""
    lengths = [len(_ids(tokenizer, render(tokenizer, p, system=system))) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
