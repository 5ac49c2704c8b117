"""Sentence embeddings by any Hugging Face encoder: the mean of its last states over the tokens, of length 1.

1. Cut each text to the encoder's window: a longer one is read by its beginning.
2. Pad texts of similar length on the right, with a mask, and read them in one pass.
3. Average over the tokens that the mask names, and divide by the length of the vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError, first_line
from safesteer.models.hashing import weights_hash
from safesteer.models.parts import context_length, text_config
from safesteer.models.quiet import quiet_transformers

DEFAULT_WINDOW = 512  # tokens, where neither tokenizer nor model has a limit


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder with its tokenizer. `revision` is the one of the Hub that was asked for."""

    model: nn.Module = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str
    revision: str | None = None
    fingerprint: str = field(init=False, default="")  # hash of all its weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", weights_hash(self.model, None))

    @property
    def window(self) -> int:
        """How many tokens of a text are read, special tokens included."""
        return min(self.tokenizer.model_max_length, context_length(self.model) or DEFAULT_WINDOW)

    def is_cut(self, text: str) -> bool:
        """Return whether the text is longer than the window, so that only its beginning is read."""
        return len(self._ids(text, self.window + 1)) > self.window

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Float[Tensor, "n d"]:
        """Return one vector of length 1 per text, in their order. Batched by length.

        Example:
            >>> from safesteer.judges.encoder import load_encoder
            >>> load_encoder("sentence-transformers/all-MiniLM-L6-v2").embed(["Hi"]).shape  # doctest: +SKIP
            torch.Size([1, 384])
        """
        rows = [self._ids(text, self.window) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        vectors = [self._read([rows[i] for i in part]) for part in parts]
        if not vectors:
            return torch.zeros((0, text_config(self.model).hidden_size))
        return torch.cat(vectors)[torch.tensor(order).argsort()]

    def _ids(self, text: str, limit: int) -> list[int]:
        """Tokenize a text, special tokens included, cut to `limit` tokens."""
        ids = cast(list[int], self.tokenizer(text, truncation=True, max_length=limit).input_ids)
        return ids or [self._pad_id]  # an empty text, and a tokenizer that adds no marks

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    def _read(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch d"]:
        """Embed the texts of one batch."""
        width, device = max(map(len, rows)), next(self.model.parameters()).device
        # Some families find positions by the pad id, so the padding has it.
        ids = torch.full((len(rows), width), self._pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        states = self.model(ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(means, dim=-1)


def load_encoder(name: str | Path, *, revision: str | None = None, device: str = "cpu") -> Encoder:
    """Load an encoder and its tokenizer in float32.

    Args:
        name: A Hub id or a local folder; sentence-transformers is not needed.
        revision: Branch, tag or commit of a Hub model; None: its main branch.
        device: Where to put it.

    Raises:
        SafeSteerError: For a model that cannot be found, or an encoder-decoder.

    Example:
        >>> from safesteer.judges.encoder import load_encoder
        >>> _ = chat.model.save_pretrained(folder), chat.tokenizer.save_pretrained(folder)
        >>> load_encoder(str(folder)).embed(["Hello"]).shape
        torch.Size([1, 32])
    """
    name, options = str(name), {"revision": revision}
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SafeSteerError(
            f"Cannot load the encoder '{name}': give a Hub id or a local folder. ({first_line(error)})"
        ) from error
    if model.config.is_encoder_decoder:
        raise SafeSteerError(f"'{name}' is an encoder-decoder; embeddings need an encoder alone.")
    model.eval().requires_grad_(False)
    cast(nn.Module, model).to(device)
    return Encoder(model, tokenizer, name, revision)
