"""Wrappers: the same request in another frame, to see whether a model still knows what it is asked.

Each is a pure function of a prompt, text or messages. It changes the user's last words, or what stands
before them:

    frame       puts the request into a sentence or two of ours
    encoding    writes it in base64, in ROT13, or with spaces between its letters
    turns       puts harmless turns before it
    variations  writes it several times, with other capitals and swapped letters, seeded

A family is of the split "val" or "test" as a whole, so that training can hold families out. The texts
(prompts/data/wrappers.jsonl) are ours, short and generic. They measure refusals, and nothing optimizes them.
"""

import base64
import codecs
import json
import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from safesteer._files import from_json
from safesteer.prompts.conversation import PromptLike, as_prompt, messages_of

OpeningSplit = Literal["train", "test"]
Encoding = Literal["plain", "base64", "ROT13", "spaced letters"]
WrapperSplit = Literal["val", "test"]
REQUEST = "{request}"  # stands for the request in a frame
SWAPPED, FLIPPED = 0.25, 0.25  # share of words with swapped letters, and of letters in the other case


@dataclass(frozen=True)
class Wrapper:
    """One way to wrap a request: a frame, an encoding, turns before it, or several variations of it."""

    family: str
    name: str
    split: WrapperSplit
    frame: str = REQUEST
    encoding: Encoding = "plain"
    turns: tuple[tuple[str, str], ...] = ()  # (role, content)
    n_variations: int = 1

    def wrap(self, prompt: PromptLike, seed: int = 0) -> list[str]:
        """Return the wrapped prompt: as many of them as the wrapper has variations.

        Args:
            prompt: What the user says, text or messages; the last message is wrapped.
            seed: Of the variations.

        Example:
            >>> from safesteer.prompts.wrappers import Wrapper
            >>> Wrapper("encoding", "ROT13", "test", "Read ROT13: {request}", "ROT13").wrap("Hello")
            ['Read ROT13: Uryyb']
        """
        *before, last = messages_of(prompt)
        text = last["content"]
        texts = (
            [text] if self.n_variations == 1 else [varied(text, seed, i) for i in range(self.n_variations)]
        )
        earlier = [*before, *({"role": role, "content": content} for role, content in self.turns)]
        framed = [self.frame.replace(REQUEST, encoded(t, self.encoding)) for t in texts]
        return [as_prompt([*earlier, {"role": "user", "content": t}]) for t in framed]


PLAIN = Wrapper("plain", "plain", "test")


def load_wrappers(split: WrapperSplit | None = None) -> tuple[Wrapper, ...]:
    """Load the project's wrappers, of both splits for None.

    Example:
        >>> from safesteer.prompts.wrappers import load_wrappers
        >>> sorted({w.family for w in load_wrappers("val")})
        ['language', 'role play', 'small changes']
    """
    wrappers = (from_json(Wrapper, row) for row in _rows("wrappers.jsonl"))
    return tuple(w for w in wrappers if split in (None, w.split))


def load_openings(split: OpeningSplit = "test") -> list[str]:
    """Load the project's compliant openings: generic text that begins an answer and says nothing.

    Args:
        split: "test": those that the suite "robust" opens answers with; "train": others, to train on.

    Example:
        >>> from safesteer.prompts.wrappers import load_openings
        >>> load_openings()[0][:13]
        'Sure, here is'
    """
    return [row["text"] for row in _rows("openings.jsonl") if row["split"] == split]


@cache
def _rows(name: str) -> tuple[dict[str, Any], ...]:
    """Read a file of the package once: training draws from it for every prompt."""
    path = resources.files("safesteer.prompts") / "data" / name
    return tuple(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def encoded(text: str, encoding: Encoding) -> str:
    """Write a text in another alphabet.

    Example:
        >>> from safesteer.prompts.wrappers import encoded
        >>> encoded("Hi you", "base64"), encoded("Hi you", "spaced letters")
        ('SGkgeW91', 'H i   y o u')
    """
    if encoding == "base64":
        return base64.b64encode(text.encode()).decode()
    if encoding == "ROT13":
        return codecs.encode(text, "rot13")
    return " ".join(text) if encoding == "spaced letters" else text


def varied(text: str, seed: int, number: int) -> str:
    """Write a text with other capitals and a few swapped letters, which depend on the arguments alone.

    Example:
        >>> from safesteer.prompts.wrappers import varied
        >>> texts = {varied("Name a river in Europe.", 0, i) for i in range(5)}
        >>> len(texts), {len(text) for text in texts}
        (5, {23})
    """
    draw = random.Random(f"{seed} {number} {text}")
    words = [_swapped(word, draw) if draw.random() < SWAPPED else word for word in text.split(" ")]
    return "".join(c.swapcase() if draw.random() < FLIPPED else c for c in " ".join(words))


def _swapped(word: str, draw: random.Random) -> str:
    """Swap two neighbours inside a word; a short one stays as it is."""
    if len(word) < 4:
        return word
    at = draw.randrange(1, len(word) - 2)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
