"""HumanEval: the model completes a function, and its tests run in a process that can do little harm.

Generated code runs only where the caller says so (`allow_code`). Each program has a process of its own:
no network (a network namespace of its own, Linux), limits on processor time, memory and file size, an
empty environment and an empty folder. Where the namespace cannot be had, nothing is run.
The prompt is ours; pass@1 of one greedy completion.
"""

import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safesteer._errors import SafeSteerError, first_line
from safesteer._files import json_lines
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # linux/sched.h
_NOT_ISOLATED = 97


def _confine(seconds: int, memory_mb: int) -> None:
    """Runs in the child before the program: gives up the network, then everything beyond the limits."""
    try:
        cut_off = ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_NETWORK) == 0
    except (OSError, AttributeError):
        cut_off = False
    if not cut_off:
        os._exit(_NOT_ISOLATED)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def passes(program: str, *, seconds: int = 5, memory_mb: int = 1024) -> bool:
    """True where `program` ends without an error within the limits.

    Raises SafeSteerError where a process cannot be cut off from the network.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * seconds,
                preexec_fn=lambda: _confine(seconds, memory_mb),
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode == _NOT_ISOLATED:
        raise SafeSteerError(
            "Generated code is not run: this system gives a process no network namespace of its own."
        )
    return done.returncode == 0


def completion(prompt: str, answer: str) -> str:
    """The function in an answer: its first code block, else all of it, after the prompt if it is a body."""
    block = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", answer, re.S)
    code = block[1] if block else answer
    return code if re.search(r"^\s*def ", code, re.M) else prompt + code


def humaneval(
    chat: ChatModel,
    rows: Sequence[dict],
    *,
    allow_code: bool = False,
    max_new_tokens: int = 256,
    seconds: int = 5,
) -> list[bool]:
    """Which of the problems the model's function passes. `rows`: prompt, test (or tests), entry_point.

    Raises SafeSteerError without `allow_code`.
    """
    if not allow_code:
        raise SafeSteerError("HumanEval runs what the model wrote: allow it with allow_code=True.")
    asked = [
        f"Complete this Python function. Answer with the whole function only.\n\n{r['prompt']}" for r in rows
    ]
    said = generate(chat, asked, max_new_tokens=max_new_tokens)
    found = []
    for row, answer in zip(rows, said, strict=True):
        head = row["prompt"].split("def ")[0]  # the imports that the tests expect
        tests = row.get("test") or row["tests"]
        code = completion(row["prompt"], answer)
        found.append(passes(f"{head}\n{code}\n{tests}\ncheck({row['entry_point']})\n", seconds=seconds))
    return found


def problems(data: str | Path | None = None, limit: int | None = None) -> list[dict]:
    """HumanEval's rows: from the file `data` (JSON Lines) or the Hub. Raises SafeSteerError otherwise."""
    if data is None:
        from datasets import load_dataset  # heavy, and only needed here

        try:
            return list(load_dataset("openai/openai_humaneval", split="test"))[:limit]  # type: ignore[arg-type]
        except Exception as error:  # the Hub raises whatever it likes
            raise SafeSteerError(f"Cannot load HumanEval from the Hub: {first_line(error)}") from error
    try:
        rows = json_lines(data)[:limit]
        if not all({"prompt", "entry_point"} <= r.keys() and {"test", "tests"} & r.keys() for r in rows):
            raise KeyError
    except OSError as error:
        raise SafeSteerError(f"Cannot read {data}: {error.strerror}.") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise SafeSteerError(f"{data} does not hold HumanEval's problems.") from error
    return rows
