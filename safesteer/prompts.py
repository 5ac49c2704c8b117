"""Prompts as values: a PromptSet of harmful and harmless requests, and their token form.

One path turns text into model input, for every stage: `render` (the user's own chat template),
then `PromptBatch.of` (ids without a second BOS, left padding, an explicit mask). The template
tokens after the instruction are found by rendering two instructions and comparing.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from safesteer.errors import SafeSteerError, first_line

Label = Literal["harmful", "harmless"]
SPLITS = {"train": 128, "val": 32, "distil": 100, "test": 100}  # pairs a split, as in the paper
EXTRA = "extra"  # pairs kept out of every split, for work that comes before alignment


@dataclass(frozen=True)
class Prompt:
    """One request. `pair` names its matched twin; `split` is where it may be used."""

    text: str
    label: Label
    split: str = ""
    pair: str = ""
    category: str = ""
    form: str = ""


@dataclass(frozen=True, repr=False)
class PromptSet:
    """Harmful and harmless requests, split for extraction, validation, distillation and test."""

    prompts: tuple[Prompt, ...]
    name: str = "prompts"

    @property
    def harmful(self) -> list[str]:
        return [p.text for p in self.prompts if p.label == "harmful"]

    @property
    def harmless(self) -> list[str]:
        return [p.text for p in self.prompts if p.label == "harmless"]

    def split(self, name: str) -> "PromptSet":
        """The prompts of one split: "train", "val", "distil" or "test"."""
        chosen = tuple(p for p in self.prompts if p.split == name)
        if not chosen:
            known = sorted({p.split for p in self.prompts})
            raise SafeSteerError(f"Prompt set '{self.name}' has no split '{name}'; it has {known}.")
        return PromptSet(chosen, f"{self.name}/{name}")

    def head(self, n_pairs: int | None) -> "PromptSet":
        """The first n harmful and the first n harmless prompts (all of them for None)."""
        harmful = [p for p in self.prompts if p.label == "harmful"][:n_pairs]
        harmless = [p for p in self.prompts if p.label == "harmless"][:n_pairs]
        return PromptSet((*harmful, *harmless), self.name)

    def tail(self, n_pairs: int | None) -> "PromptSet | None":
        """What `head` leaves over of both kinds; None if that is nothing."""
        used = {id(p) for p in self.head(n_pairs).prompts}
        rest = PromptSet(tuple(p for p in self.prompts if id(p) not in used), self.name)
        return rest if rest.harmful and rest.harmless else None

    @property
    def hash(self) -> str:
        """Content hash, 16 hex digits: two sets with equal prompts in equal order agree."""
        rows = json.dumps([asdict(p) for p in self.prompts], ensure_ascii=True)
        return hashlib.sha256(rows.encode()).hexdigest()[:16]

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame([asdict(p) for p in self.prompts])

    def __repr__(self) -> str:
        return (
            f"PromptSet({self.name!r}: {len(self.harmful)} harmful, {len(self.harmless)} harmless,"
            f" hash {self.hash})"
        )

    @classmethod
    def from_jsonl(cls, path: str | Path, *, seed: int = 0) -> "PromptSet":
        """Read JSON Lines: rows {"harmful", "harmless"} (pairs) or {"prompt", "label"}.

        Optional keys: split, category, form, pair. Rows without a split are dealt out by `seed` in
        the proportions 128 / 32 / 100 / 100. Raises SafeSteerError naming the line at fault.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise SafeSteerError(f"Cannot read the prompt file {path}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise SafeSteerError(f"The prompt file {path} is not UTF-8 text.") from error
        prompts = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                prompts += _parse_row(line, f"{path.name} line {number}", number)
        return cls(tuple(prompts), path.stem)._checked(str(path))._with_splits(seed)

    @classmethod
    def from_hub(
        cls,
        harmful: str,
        harmless: str,
        *,
        column: str = "prompt",
        hub_split: str = "train",
        limit: int | None = None,
        seed: int = 0,
    ) -> "PromptSet":
        """Read two Hugging Face datasets, one of harmful and one of harmless requests."""
        from datasets import load_dataset  # heavy, and only needed here

        prompts = []
        sources: tuple[tuple[Label, str], ...] = (("harmful", harmful), ("harmless", harmless))
        for label, name in sources:
            try:
                rows = load_dataset(name, split=hub_split)
            except Exception as error:
                reason = f"'{name}' (split '{hub_split}') from the Hub: {first_line(error)}"
                raise SafeSteerError(f"Cannot load the dataset {reason}") from error
            if column not in rows.column_names:
                raise SafeSteerError(f"Dataset '{name}' has no column '{column}', only {rows.column_names}.")
            texts = list(dict.fromkeys(str(t).strip() for t in rows[column]))[:limit]
            prompts += [Prompt(t, label, pair=f"{i}") for i, t in enumerate(texts)]
        found = cls(tuple(prompts), f"{harmful}+{harmless}")
        return found._checked(found.name)._with_splits(seed)

    def _checked(self, source: str) -> "PromptSet":
        if not self.harmful or not self.harmless:
            raise SafeSteerError(
                f"{source} holds {len(self.harmful)} harmful and {len(self.harmless)} harmless"
                " prompts; at least one of each is needed."
            )
        text, n = Counter(p.text.strip() for p in self.prompts).most_common(1)[0]
        if n > 1:
            raise SafeSteerError(
                f"{source} repeats {text[:50]!r}: held-out prompts would be known. Keep one."
            )
        return self

    def _with_splits(self, seed: int) -> "PromptSet":
        if all(p.split for p in self.prompts):
            return self
        pairs = sorted({p.pair for p in self.prompts})
        random.Random(seed).shuffle(pairs)
        bounds, total, used = {}, sum(SPLITS.values()), 0
        for name, size in SPLITS.items():
            share = max(1, round(size / total * len(pairs)))
            bounds |= dict.fromkeys(pairs[used : used + share], name)
            used += share
        prompts = tuple(replace(p, split=p.split or bounds.get(p.pair, "test")) for p in self.prompts)
        return PromptSet(prompts, self.name)


def _parse_row(line: str, where: str, number: int) -> list[Prompt]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SafeSteerError(f"{where} is not JSON: {error.msg}.") from error
    if isinstance(row, dict) and {"harmful", "harmless"} <= row.keys():
        texts: dict[Label, str] = {"harmful": row["harmful"], "harmless": row["harmless"]}
    elif isinstance(row, dict) and {"prompt", "label"} <= row.keys():
        if row["label"] not in ("harmful", "harmless"):
            raise SafeSteerError(f"{where}: the label must be 'harmful' or 'harmless'.")
        texts = {row["label"]: row["prompt"]}
    else:
        raise SafeSteerError(f"{where} needs the keys 'harmful' and 'harmless', or 'prompt' and 'label'.")
    extra = {k: str(row.get(k, "")) for k in ("split", "category", "form")}
    if extra["split"] not in ("", EXTRA, *SPLITS):
        raise SafeSteerError(f"{where}: the split must be one of {list(SPLITS)}.")
    for text in texts.values():
        if not isinstance(text, str) or not text.strip():
            raise SafeSteerError(f"{where} has an empty prompt or one that is not text.")
        if any(0xD800 <= ord(c) <= 0xDFFF or c == "\0" for c in text):
            raise SafeSteerError(f"{where} holds a NUL or a lone surrogate character.")
    pair = str(row.get("pair", row.get("id", number)))
    return [Prompt(text, label, pair=pair, **extra) for label, text in texts.items()]


def load_prompts() -> PromptSet:
    """The project's own matched pairs (`safesteer/data/pairs.jsonl`; see the data card beside it)."""
    path = resources.files("safesteer") / "data" / "pairs.jsonl"
    with resources.as_file(path) as file:
        found = PromptSet.from_jsonl(file)
    return PromptSet(found.prompts, "safesteer-pairs")


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
