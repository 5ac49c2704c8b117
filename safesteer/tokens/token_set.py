"""The safety tokens as a value: what was selected, why, and with which settings.

A TokenSet prints, renders in notebooks and terminals, and is saved as JSON (`tokens.json`).
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer._files import read_value, write_json
from safesteer.models.chat_model import ChatModel


@dataclass(frozen=True)
class Context:
    """One place where a token was lifted: what came before, and its probability there."""

    prompt: str
    answer_so_far: str
    p_base: float
    p_steered: float


@dataclass(frozen=True)
class SafetyToken:
    """A selected token and why.

    `votes` counts the positions at which it was among the tokens that steering lifts most
    (`votes_by_position`: by place in the answer). `mean_delta` is log p_steered - log p_base, in nats,
    `p_base` and `p_steered` are probabilities; all three are means over counting positions.
    """

    id: int
    text: str
    votes: int
    votes_by_position: tuple[int, ...]
    mean_delta: float
    p_base: float
    p_steered: float
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True, repr=False)
class TokenSet:
    """The safety tokens in order of selection, with the settings that chose them.

    `coverage` says how much of what steering changes lies inside S, over counting positions: kl_share (of
    KL(teacher || base), generalized so that the parts add up), mass_teacher and mass_base (probability on
    S), and kl_per_position (nats).
    """

    tokens: tuple[SafetyToken, ...]
    settings: dict[str, Any]
    coverage: dict[str, float]
    n_positions: int

    @cached_property
    def ids(self) -> Int[Tensor, " n_set"]:
        """Ids of the tokens, in order of selection."""
        return torch.tensor([t.id for t in self.tokens], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.tokens)

    def check(self, chat: ChatModel) -> None:
        """Check that S is of the model's vocabulary: every id stands for the same text there.

        Args:
            chat: The model on which S is used.

        Raises:
            SafeSteerError: Names a token that it lacks, or that is another one there.
        """
        largest = max((t.id for t in self.tokens), default=-1)
        if largest >= chat.d_vocab:
            raise SafeSteerError(
                f"S has the token {largest}, and '{chat.name}' has {chat.d_vocab} tokens: select S on the"
                " model itself (select_tokens)."
            )
        for t in self.tokens:
            text = chat.decode([t.id])
            if t.text not in ("", text):  # none where nothing but the id is known
                raise SafeSteerError(
                    f"S is of another vocabulary: its token {t.id} is {t.text!r}, and {text!r} in"
                    f" '{chat.name}'. Select S on the model itself (select_tokens)."
                )

    def __repr__(self) -> str:
        texts = " ".join(repr(t.text) for t in self.tokens[:10])
        return f"TokenSet({len(self)} tokens from {self.n_positions} positions: {texts} ...)"

    def to_frame(self) -> pd.DataFrame:
        """Return a row per token, in order of selection."""
        columns = ["id", "text", "votes", "mean_delta", "p_base", "p_steered", "votes_by_position"]
        rows = [{c: getattr(t, c) for c in columns} for t in self.tokens]
        return pd.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        frame = self.to_frame().assign(text=[repr(t.text) for t in self.tokens])
        return frame.to_html(escape=True, index=False, float_format="{:.3g}".format)

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self)} safety tokens from {self.n_positions} positions")
        for name in ("token", "votes", "mean lift, nats", "p base", "p steered", "votes by step"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for t in self.tokens:
            numbers = str(t.votes), f"{t.mean_delta:+.2f}", f"{t.p_base:.2g}", f"{t.p_steered:.2g}"
            table.add_row(Text(repr(t.text)), *numbers, " ".join(map(str, t.votes_by_position)))
        return table

    def save(self, path: str | Path) -> None:
        """Write the set as JSON.

        Example:
            >>> tokens.save(folder / "tokens.json")
            >>> ss.TokenSet.load(folder / "tokens.json") == tokens
            True
        """
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "TokenSet":
        """Read a set that `save` wrote.

        Raises:
            SafeSteerError: Where the file is missing, damaged or holds something else.

        Example:
            >>> tokens.save(folder / "tokens.json")
            >>> len(ss.TokenSet.load(folder / "tokens.json")) == len(tokens)
            True
        """
        return read_value(cls, path, "a token file")
