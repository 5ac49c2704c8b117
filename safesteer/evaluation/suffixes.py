"""Suffixes after what a user says, as ids and as text: a measurement moves ids, and a model reads text.

1. A prompt is rendered with and without a few signs at its end. What the two share is before the suffix and
   after it, so nothing is known of the template.
2. Ids are a suffix only where their text, put after the prompt and rendered again, is read as the same ids.
3. Control tokens are none, nor is a token whose text is read as others.

Nothing here prints or writes a suffix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from jaxtyping import Bool
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.templates import ids_of, render
from safesteer.prompts.conversation import as_prompt, is_readable, messages_of
from safesteer.tokens.selection import banned_ids

STARTS = (" !", " x", " a")  # what a suffix starts as, repeated: the first that comes out at n tokens


@dataclass(frozen=True, eq=False, repr=False)
class Slot:
    """The place of a suffix in a prompt: the ids before it and after it, and how it starts."""

    prompt: str
    head: list[int]
    tail: list[int]
    start: list[int]
    target: list[int]

    def batch(self, chat: ChatModel, suffixes: Sequence[Sequence[int]]) -> PromptBatch:
        """Return the prompt with each suffix, continued by the target."""
        heads = [[*self.head, *suffix, *self.tail] for suffix in suffixes]
        return PromptBatch.from_ids(heads, [self.target] * len(heads), device=chat.device)

    def with_suffix(self, chat: ChatModel, suffix: Sequence[int]) -> str | None:
        """Return the prompt that ends with the suffix's text; None where it is read as other ids."""
        before, whole = (
            cast(str, chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in (self.head, [*self.head, *suffix])
        )
        text = whole.removeprefix(before)
        if not whole.startswith(before) or not is_readable(text):
            return None
        extended = _extended(self.prompt, text)
        is_same = _ids(chat, extended) == [*self.head, *suffix, *self.tail]
        return extended if is_same else None


def slot_of(chat: ChatModel, prompt: str, n: int, target: list[int]) -> Slot:
    """Find where a suffix stands in a prompt, by rendering the prompt with and without one.

    Args:
        chat: The model with its template.
        prompt: What the user says.
        n: How many tokens the suffix has.
        target: What the answer is to begin with.

    Raises:
        SafeSteerError: Where no start has as many tokens, or is read as its ids.
    """
    plain = _ids(chat, prompt)
    for sign in STARTS:
        for times in range(1, n + 1):
            whole = _ids(chat, _extended(prompt, sign * times))
            n_head = _n_common(plain, whole)
            n_tail = _n_common(plain[n_head:][::-1], whole[n_head:][::-1])
            end = len(whole) - n_tail
            if end - n_head == n:
                slot = Slot(prompt, whole[:n_head], whole[end:], whole[n_head:end], target)
                if slot.with_suffix(chat, slot.start) is not None:
                    return slot
    raise SafeSteerError(
        f"No start of {n} tokens stands after a prompt of '{chat.name}' and is read as it was"
        " written: choose another number of tokens."
    )


def _extended(prompt: str, text: str) -> str:
    """Return a prompt whose last words go on with a text."""
    *before, last = messages_of(prompt)
    return as_prompt([*before, {**last, "content": last["content"] + text}])


def _ids(chat: ChatModel, prompt: str) -> list[int]:
    """Return the ids of a prompt in the model's template."""
    return ids_of(chat.tokenizer, render(chat.tokenizer, prompt))


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the ids that two texts begin with."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def allowed_ids(chat: ChatModel) -> Bool[Tensor, " d_vocab"]:
    """Mark the tokens that a suffix may hold: no control tokens, and the text of each is read as itself.

    Args:
        chat: The model with its tokenizer.

    Example:
        >>> from safesteer.evaluation.suffixes import allowed_ids
        >>> bool(allowed_ids(chat)[chat.eos_ids].any())
        False
    """
    allowed = ~banned_ids(chat)
    ids = allowed.nonzero()[:, 0].tolist()
    texts = [cast(str, chat.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
    readable = [is_readable(text) for text in texts]
    read = chat.tokenizer(
        [t if ok else "" for t, ok in zip(texts, readable, strict=True)], add_special_tokens=False
    )
    allowed[[i for i, again in zip(ids, read.input_ids, strict=True) if again != [i]]] = False
    return allowed
