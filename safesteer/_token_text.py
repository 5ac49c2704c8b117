"""Token text that can be seen: whitespace, control characters and lone bytes made visible.

1. `token_text`: what a token stands for, as text. A byte-level token that is only part of a
   character has no text of its own; it is written as its bytes, "⟨E2 80⟩".
2. `visible`: the same text with every invisible character replaced by a sign: " " by "␣", a
   newline by "⏎", a zero-width or direction-changing character by its code point "⟨U+200F⟩".
3. `running`: for whole prompts and answers: spaces, line breaks and the joiners that scripts and
   emoji need stay; everything else that is invisible, or could reorder the line, is shown.
"""

import unicodedata
from functools import cache
from typing import cast

from transformers import PreTrainedTokenizerBase

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
INVISIBLE = {"Cf", "Cc", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}


@cache
def _byte_of() -> dict[str, int]:
    """Map the characters of byte-level BPE vocabularies to bytes (Radford et al. 2019).

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    unprintable = [b for b in range(256) if b not in set(printable)]
    return table | {chr(256 + n): b for n, b in enumerate(unprintable)}


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of one token with its leading space; lone bytes as "⟨E2 80⟩"."""
    text = cast(str, tokenizer.decode([token]))
    piece = cast("str | None", tokenizer.convert_ids_to_tokens(token))
    if piece is None:
        return text or f"⟨token {token}⟩"
    if piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece byte fallback
        code = int(piece[3:-1], 16)
        return chr(code) if code < 128 else f"⟨{piece[3:-1]}⟩"
    if "\ufffd" in text and all(c in _byte_of() for c in piece):
        return "⟨" + " ".join(f"{_byte_of()[c]:02X}" for c in piece) + "⟩"
    if piece.startswith("▁") and not text.startswith(" "):  # SentencePiece drops a first space
        return " " + text
    return text if text else piece


def visible(text: str) -> str:
    """Show spaces, line breaks and every invisible or direction-changing sign."""

    def sign(c: str) -> str:
        if c in SIGNS:
            return SIGNS[c]
        if ord(c) < 32:
            return chr(0x2400 + ord(c))  # the control pictures block
        return f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in INVISIBLE else c

    return "".join(map(sign, text))


def readable(text: str) -> str:
    """Show a text on one line, with single spaces left alone: there "␣" would be noise."""
    return " ".join(visible(part) for part in text.split(" "))


def running(text: str) -> str:
    """Show a text over several lines, as it reads, with lone surrogates and direction changes visible."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in " \n\t\u200c\u200d\xa0" else visible(c) for c in text)
