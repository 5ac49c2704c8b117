"""Prompts as values: a PromptSet of harmful and harmless requests, and their token form.

One path turns text into model input, for every stage: `render` (the user's own chat template),
then `PromptBatch.of` (ids without a second BOS, left padding, an explicit mask). The template
tokens after the instruction are found by rendering two instructions and comparing.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import pandas as pd

from safesteer._errors import SafeSteerError, first_line

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

    def first(self, n_pairs: int | None) -> "PromptSet":
        """The first n harmful and the first n harmless prompts (all of them for None)."""
        harmful = [p for p in self.prompts if p.label == "harmful"][:n_pairs]
        harmless = [p for p in self.prompts if p.label == "harmless"][:n_pairs]
        return PromptSet((*harmful, *harmless), self.name)

    def after(self, n_pairs: int | None) -> "PromptSet | None":
        """What `first` leaves over of both kinds; None if that is nothing."""
        used = {id(p) for p in self.first(n_pairs).prompts}
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
    path = resources.files("safesteer.prompts") / "data" / "pairs.jsonl"
    with resources.as_file(path) as file:
        found = PromptSet.from_jsonl(file)
    return PromptSet(found.prompts, "safesteer-pairs")
