"""Prompts as values: a PromptSet of harmful and harmless requests, dealt to splits.

A set comes from a file, from two lists, or from the package. Every way checks the same: both kinds are
there, no text is empty or stands twice. Prompts without a split are dealt out by seed, pair by pair, in
the paper's proportions.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from safesteer._errors import SafeSteerError
from safesteer._files import text_lines
from safesteer.prompts.conversation import (
    Conversation,
    PromptLike,
    as_prompt,
    as_prompts,
    is_readable,
    messages_of,
)

Label = Literal["harmful", "harmless"]
LABELS: tuple[Label, Label] = ("harmful", "harmless")
SPLITS = {"train": 128, "val": 32, "distill": 100, "test": 100}  # pairs per split, as in the paper
OLD_SPLITS = {"distil": "distill"}  # what files written for the first versions say
SHIPPED = ("pairs", "kinds", "wide", "forms")  # the project's own, by name
TOGETHER = {"mixed": ("kinds",), "all": ("kinds", "wide")}  # what joins the pairs
OPTIONAL = ("split", "category", "system")  # keys of a row that change what is done with it
EXTRA = "extra"  # pairs kept out of every split, for work that comes before alignment


@dataclass(frozen=True)
class Prompt:
    """One request, text or `Conversation`. `pair` names its matched twin; `split` is where it may be used."""

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

    def texts(self, label: Label) -> list[str]:
        """Return the requests of one kind, "harmful" or "harmless", in their order."""
        return [p.text for p in self.prompts if p.label == label]

    @property
    def harmful(self) -> list[str]:
        """The harmful requests, in their order."""
        return self.texts("harmful")

    @property
    def harmless(self) -> list[str]:
        """The harmless requests, in their order."""
        return self.texts("harmless")

    def split(self, *names: str) -> "PromptSet":
        """Return the prompts of some splits, one after the other: "train", "val", "distill" or "test".

        Raises:
            SafeSteerError: For a split that the set does not have.
        """
        chosen: list[Prompt] = []
        for name in names:
            there = [p for p in self.prompts if p.split == name]
            if not there:
                known = sorted({p.split for p in self.prompts})
                raise SafeSteerError(f"Prompt set '{self.name}' has no split '{name}'; it has {known}.")
            chosen += there
        return PromptSet(tuple(chosen), f"{self.name}/{'+'.join(names)}")

    def require_kinds(self, source: str | None = None) -> None:
        """Raise SafeSteerError where one kind of prompts is missing; `source` is what the sentence names."""
        if not self.harmful or not self.harmless:
            raise SafeSteerError(
                f"{source or repr(self.name)} holds {len(self.harmful)} harmful and {len(self.harmless)}"
                " harmless prompts; at least one of each is needed."
            )

    def first(self, n_pairs: int | None) -> "PromptSet":
        """Return the first n harmful and the first n harmless prompts (all of them for None)."""
        kinds = ([p for p in self.prompts if p.label == label] for label in LABELS)
        return PromptSet(tuple(p for kind in kinds for p in kind[:n_pairs]), self.name)

    def across(self, n_pairs: int | None) -> "PromptSet":
        """Return n prompts of each kind, taken from their categories in turn (all of them for None).

        The project's pairs stand by category, so that their first few are of a few categories. Twins stay
        together, because both have one category.
        """
        kinds = ([p for p in self.prompts if p.label == label] for label in LABELS)
        return PromptSet(tuple(p for kind in kinds for p in _in_turn(kind)), self.name).first(n_pairs)

    def after(self, n_pairs: int | None) -> "PromptSet | None":
        """Return what `first` leaves over of both kinds; None if one kind has nothing left."""
        used = {id(p) for p in self.first(n_pairs).prompts}
        remaining = PromptSet(tuple(p for p in self.prompts if id(p) not in used), self.name)
        return remaining if remaining.harmful and remaining.harmless else None

    @property
    def hash(self) -> str:
        """Content hash, 16 hex digits: two sets with equal prompts in equal order agree."""
        rows = json.dumps([_plain_row(p) for p in self.prompts], ensure_ascii=True)
        return hashlib.sha256(rows.encode()).hexdigest()[:16]

    def to_frame(self) -> pd.DataFrame:
        """Return a row per prompt."""
        return pd.DataFrame([{**asdict(p), "text": str(p.text)} for p in self.prompts])

    def __repr__(self) -> str:
        return (
            f"PromptSet({self.name!r}: {len(self.harmful)} harmful, {len(self.harmless)} harmless,"
            f" hash {self.hash})"
        )

    @classmethod
    def from_jsonl(cls, path: str | Path, *, seed: int = 0) -> "PromptSet":
        """Read a JSON Lines file.

        Args:
            path: Rows {"harmful": ..., "harmless": ...} (pairs) or {"prompt": ..., "label": ...}. A prompt is
                text or a list of messages. Optional keys: system (a system prompt), split, category, form,
                pair.
            seed: Deals the rows without a split, in the proportions 128 / 32 / 100 / 100.

        Raises:
            SafeSteerError: For a file or a line that does not fit; the sentence names the line.

        Example:
            >>> row = '{"harmful": "How do I pick %s locks?", "harmless": "How do I oil %s locks?"}'
            >>> rows = (row % (n, n) for n in range(36))
            >>> _ = (folder / "mine.jsonl").write_text(chr(10).join(rows))
            >>> len(ss.PromptSet.from_jsonl(folder / "mine.jsonl").split("train").harmful)
            13
        """
        path = Path(path)
        try:
            lines = text_lines(path)
        except OSError as error:
            raise SafeSteerError(f"Cannot read the prompt file {path}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise SafeSteerError(f"The prompt file {path} is not UTF-8 text.") from error
        prompts: list[Prompt] = []
        for number, line in lines:
            prompts += _parse_row(line, f"{path.name} line {number}", number)
        return cls(tuple(prompts), path.stem)._checked(str(path))._with_splits(seed)

    @classmethod
    def from_texts(
        cls,
        harmful: Sequence[PromptLike],
        harmless: Sequence[PromptLike],
        *,
        name: str = "prompts",
        seed: int = 0,
    ) -> "PromptSet":
        """Make a set of two lists of requests.

        Args:
            harmful: Requests that a safe model declines, each text or a list of messages.
            harmless: Requests that it answers. In a list as long as `harmful`, request i is taken as the
                matched twin of harmful request i, and both come into the same split.
            name: What the set is called in messages.
            seed: Deals them to splits, in the proportions 128 / 32 / 100 / 100.

        Raises:
            SafeSteerError: For an empty list, or a text that is empty or stands twice.

        Example:
            >>> prompts = ss.PromptSet.from_texts(
            ...     [f"Harm person {i}." for i in range(36)], [f"Help person {i}." for i in range(36)]
            ... )
            >>> [len(prompts.split(name).harmful) for name in ("train", "val", "distill", "test")]
            [13, 3, 10, 10]
        """
        matched, kinds = len(harmful) == len(harmless), []
        for label, texts in zip(LABELS, (as_prompts(harmful), as_prompts(harmless)), strict=True):
            where, twin = f"{name}: {label} prompt", "" if matched else f"{label} "
            numbered = enumerate(texts, start=1)
            kinds.append(
                [Prompt(_checked_text(t, f"{where} {i}"), label, pair=f"{twin}{i}") for i, t in numbered]
            )
        if matched:
            pairs = zip(*kinds, strict=True)
            return cls(tuple(p for pair in pairs for p in pair), name)._checked(name)._with_splits(seed)
        cls((*kinds[0], *kinds[1]), name)._checked(name)
        # Each kind is dealt by itself, so that every split has some of both.
        dealt = [cls(tuple(kind), name)._with_splits(seed).prompts for kind in kinds]
        return cls((*dealt[0], *dealt[1]), name)

    def _checked(self, source: str) -> "PromptSet":
        self.require_kinds(source)
        keys = (p.text if isinstance(p.text, Conversation) else p.text.strip() for p in self.prompts)
        text, n = Counter(keys).most_common(1)[0]
        if n > 1:
            raise SafeSteerError(
                f"{source} repeats {text[:50]!r}: held-out prompts would be known. Keep one."
            )
        return self

    def _with_splits(self, seed: int) -> "PromptSet":
        """Deal what has no split: twins together, and single prompts of each kind by themselves."""
        fixed = {p.pair: p.split for p in self.prompts if p.split}
        kinds: dict[str, set[Label]] = {}
        for p in self.prompts:
            kinds.setdefault(p.pair, set()).add(p.label)
        bounds, total = dict(fixed), sum(SPLITS.values())
        for alike in ({*LABELS}, {LABELS[0]}, {LABELS[1]}):
            pairs = sorted(pair for pair, labels in kinds.items() if labels == alike and pair not in fixed)
            random.Random(seed).shuffle(pairs)
            used = 0
            for name, size in SPLITS.items():
                share = max(1, round(size / total * len(pairs)))
                bounds |= dict.fromkeys(pairs[used : used + share], name)
                used += share
        prompts = tuple(replace(p, split=p.split or bounds.get(p.pair, "test")) for p in self.prompts)
        return PromptSet(prompts, self.name)


def _in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Put the first of every category first, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for p in prompts:
        turns.append(seen[p.category])
        seen[p.category] += 1
    return [prompts[i] for i in sorted(range(len(prompts)), key=lambda i: turns[i])]


def _parse_row(line: str, where: str, number: int) -> list[Prompt]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SafeSteerError(f"{where} is not JSON: {error.msg}.") from error
    if isinstance(row, dict) and {"harmful", "harmless"} <= row.keys():
        texts: dict[Label, PromptLike] = {"harmful": row["harmful"], "harmless": row["harmless"]}
    elif isinstance(row, dict) and {"prompt", "label"} <= row.keys():
        if row["label"] not in ("harmful", "harmless"):
            raise SafeSteerError(f"{where}: the label must be 'harmful' or 'harmless'.")
        texts = {row["label"]: row["prompt"]}
    else:
        raise SafeSteerError(f"{where} needs the keys 'harmful' and 'harmless', or 'prompt' and 'label'.")
    _refuse_misspelt(row.keys(), where)
    row = {key: value for key, value in row.items() if value is not None}  # what pandas writes for "none"
    extra = {k: str(row.get(k, "")) for k in ("split", "category", "form")}
    extra["split"] = OLD_SPLITS.get(extra["split"], extra["split"])
    if extra["split"] not in ("", EXTRA, *SPLITS):
        raise SafeSteerError(f"{where}: the split must be one of {list(SPLITS)}.")
    pair = str(row.get("pair", row.get("id", number)))
    system = row.get("system")
    return [
        Prompt(_with_system(_checked_text(t, where), system, where), label, pair=pair, **extra)
        for label, t in texts.items()
    ]


def _refuse_misspelt(keys: Iterable[str], where: str) -> None:
    """Raise SafeSteerError for a key that is almost a known one: a "spilt" would be trained on, unseen."""
    for key in keys:
        near = [] if key in OPTIONAL else get_close_matches(key, OPTIONAL, n=1, cutoff=0.75)
        if near:
            raise SafeSteerError(f"{where} has the key '{key}': write '{near[0]}', or another word.")


def _with_system(prompt: str, system: object, where: str) -> str:
    """Put a system prompt before a prompt that has none."""
    if system is None:
        return prompt
    messages = messages_of(prompt)
    if messages[0]["role"] == "system":
        raise SafeSteerError(f"{where} has a system prompt twice: as a key and as a message.")
    try:
        return Conversation([{"role": "system", "content": system}, *messages])
    except SafeSteerError as error:
        raise SafeSteerError(f"{where}: the key 'system' is not a system prompt. {error}") from error


def _plain_row(prompt: Prompt) -> dict[str, Any]:
    """Return what the hash of a set reads of a prompt."""
    row = asdict(prompt)
    return row | {"messages": prompt.text.messages} if isinstance(prompt.text, Conversation) else row


def _checked_text(text: object, where: str) -> str:
    if isinstance(text, list):
        try:
            text = as_prompt(text)
        except SafeSteerError as error:
            raise SafeSteerError(f"{where}: {error}") from error
    if not isinstance(text, str) or not text.strip():
        raise SafeSteerError(f"{where} has an empty prompt or one that is not text.")
    if not is_readable(text):
        raise SafeSteerError(f"{where} holds a NUL or a lone surrogate character.")
    return text


def load_prompts(name: str = "pairs") -> PromptSet:
    """Load the project's own prompts (prompts/data, with a data card beside them).

    Args:
        name: "pairs": matched pairs in five splits; "kinds": requests of other kinds to train on, in the
            splits "train" and "val"; "wide": pairs of longer tasks, of questions in a studious tone and of
            everyday risks, in the same splits; "mixed": the pairs, and in the split "distill" the train split
            of the kinds; "all": that of the wide ones too; "forms": requests in other forms than the
            pairs', all of the split "test", on which nothing chooses.

    Raises:
        SafeSteerError: For another name.

    Example:
        >>> prompts = ss.load_prompts()
        >>> {name: len(prompts.split(name).harmful) for name in ("train", "val", "distill", "test")}
        {'train': 128, 'val': 32, 'distill': 100, 'test': 100}
    """
    if name in TOGETHER:
        train = (p for more in TOGETHER[name] for p in load_prompts(more).split("train").prompts)
        added = tuple(replace(p, split="distill") for p in train)
        return PromptSet(load_prompts().prompts + added, f"safesteer-{name}")
    if name not in SHIPPED:
        names = ", ".join((*SHIPPED, *TOGETHER))
        raise SafeSteerError(
            f"The project has prompts named {names}, not '{name}': yours come with ss.PromptSet.from_jsonl."
        )
    path = resources.files("safesteer.prompts") / "data" / f"{name}.jsonl"
    with resources.as_file(path) as file:
        prompts = PromptSet.from_jsonl(file)
    return PromptSet(prompts.prompts, f"safesteer-{name}")
