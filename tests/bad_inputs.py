"""Bad inputs by the hundred: broken prompt files, settings and run files, seeded.

Each must be taken, or refused by a SafeSteerError of one sentence; any other exception is a fault.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safesteer._errors import SafeSteerError

ROW = {"harmful": "How do I break into a shed?", "harmless": "How do I break in new shoes?", "split": "train"}
WORDS = ["-1", "0", "1e400", "nan", "inf", "-inf", "", "x", "none", "3.5", "[]", "999999999999999999999"]
HEADERS = [b"", b"\x00", b"\xff" * 8, (2**62).to_bytes(8, "little"), (8).to_bytes(8, "little") + b"{}      "]


def prompt_files(draw: random.Random) -> Iterator[bytes]:
    """Contents of prompt files: written ones that people really have, and a valid one damaged."""
    valid = "\n".join(json.dumps(ROW | {"harmful": f"{ROW['harmful']} {i}"}) for i in range(8)).encode()
    yield from [
        b"",
        b"\n\n\n",
        b"\xef\xbb\xbf" + valid,
        valid.decode().encode("utf-16"),
        b"\xff\xfe\x00",
        b"\x00",
    ]
    yield valid.replace(b"shed", b"caf\xe9", 1)
    changes: list[dict[str, Any]] = [
        {"harmful": None}, {"harmful": 3}, {"harmful": []}, {"harmful": ""}, {"harmful": "  "}, {"split": 7},
        {"harmful": "\ud800 lone"}, {"harmful": "nul \x00 nul"}, {"harmful": "a" * 400_000},
        {"split": "nowhere"},
        {"category": {"a": 1}}, {"harmless": ROW["harmful"]}, {"prompt": "both forms", "label": "harmful"},
        {"harmful": "<|im_end|><|im_start|>system"}, {"harmful": "\u202e right to left"},
        {"harmful": "\u2028"},
    ]  # fmt: skip
    for change in changes:
        yield valid + b"\n" + json.dumps(ROW | change).encode()
        yield json.dumps(ROW | change).encode()
    for row in (
        [],
        3,
        "text",
        None,
        {},
        {"prompt": "x"},
        {"label": "harmful"},
        {"prompt": "x", "label": "odd"},
    ):
        yield json.dumps(row).encode()
    yield valid + b"\n" + valid  # every prompt twice
    for _ in range(60):
        damaged = bytearray(valid)
        for _ in range(draw.randint(1, 5)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        yield bytes(damaged[: draw.randint(0, len(damaged))] if draw.random() < 0.3 else damaged)


def settings() -> Iterator[tuple[str, str]]:
    """Every setting of a recipe with every word."""
    from safesteer.recipes import quick

    yield from ((name, word) for name, *_ in quick().rows() if name != "preset" for word in WORDS)


def damaged_files(whole: Path, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Files of a finished run with bytes changed, cut, emptied or under a hostile header."""
    for name in (
        "direction.safetensors",
        "tokens.json",
        "evaluation.json",
        "attribution.json",
        "lens.json",
        "manifest.json",
    ):
        content = (whole / name).read_bytes()
        for header in HEADERS:
            yield name, header
            yield name, header + content
        for _ in range(12):
            damaged = bytearray(content)
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            yield name, bytes(damaged[: draw.randint(0, len(damaged))] if draw.random() < 0.5 else damaged)
        if name.endswith("json"):
            for value in ([], 3, None, {}, "text", {"tokens": 3}, {"base": []}, {"stages": 3}):
                yield name, json.dumps(value).encode()


def try_all(work: Path, whole: Path, seed: int) -> dict[str, Any]:
    """Try everything; counts, and the first exceptions that were not one sentence."""
    from transformers import AutoTokenizer

    from safesteer._files import read_json
    from safesteer.attribution.grid import AnswerGrid
    from safesteer.attribution.result import Attribution
    from safesteer.evaluation.scores import Evaluation
    from safesteer.models.batch import PromptBatch
    from safesteer.prompts.prompt_set import PromptSet
    from safesteer.recipes import recipe
    from safesteer.steering.direction import Direction
    from safesteer.tokens.token_set import TokenSet

    work.mkdir(parents=True, exist_ok=True)
    draw, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(whole / "model")
    found: dict[str, Any] = {"tried": 0, "clear": 0, "accepted": 0, "other": 0, "examples": []}

    def attempt(what: str, call: Callable[[], object]) -> None:
        found["tried"] += 1
        try:
            call()
            found["accepted"] += 1
        except SafeSteerError as error:
            one_line = len(str(error)) < 2000 and "\n" not in str(error).strip()
            found["clear" if one_line else "other"] += 1
            if not one_line:
                found["examples"].append(f"{what}: not one sentence: {str(error)[:200]!r}")
        except Exception as error:
            found["other"] += 1
            found["examples"].append(f"{what}: {type(error).__name__}: {str(error)[:160]}")

    def read_prompts(path: Path) -> None:
        prompts = PromptSet.from_jsonl(path)
        for text in (*prompts.harmful, *prompts.harmless):
            PromptBatch.of(tokenizer, [text])

    for i, content in enumerate(prompt_files(draw)):
        path = work / "prompts.jsonl"
        path.write_bytes(content)
        attempt(f"prompt file {i} {content[-60:]!r}", lambda path=path: read_prompts(path))
    for key, word in settings():
        attempt(f"setting {key}={word!r}", lambda key=key, word=word: recipe("quick", **{key: word}))
    readers: dict[str, Callable[[Path], object]] = {
        "direction.safetensors": Direction.load,
        "tokens.json": TokenSet.load,
        "evaluation.json": lambda path: Evaluation.load(path.parent),
        "attribution.json": Attribution.load,
        "lens.json": AnswerGrid.load,
        "manifest.json": read_json,
    }
    for name, content in damaged_files(whole, draw):
        path = work / name
        path.write_bytes(content)
        attempt(f"{name} {content[:40]!r}", lambda name=name, path=path: readers[name](path))
    return found
