"""HumanEval: the model completes a function, and its tests run in a process that can do little harm.

The task of that name in lm-evaluation-harness executes generated code unconfined, with the rights of the
user, so this one has a sandbox instead. Code runs only where the caller allows it (`allow_code`), and each
program in namespaces of its own (Linux): without network, and without a process that outlives it; with
limits on processor time, memory and file size, an empty environment and an empty folder. Beyond that folder
it writes and removes nothing where the kernel has Landlock (Linux 5.13); elsewhere it may do to files what
you may: run it in a container. Where there are no such namespaces, nothing is run. The prompt is ours; the
score is pass@1 of one greedy completion: a program passes that comes to its end, tests included, as the
published harness counts it.
"""

import ast
import ctypes
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from safesteer._errors import SafeSteerError, first_line
from safesteer._files import json_lines
from safesteer.models.chat_model import ModelLike
from safesteer.models.generation import generate

_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000  # linux/sched.h
_CREATE_RULES, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls of Landlock
_WRITES = 0b1_1111_1111_0010  # its rights to write, remove and make files
_TRUNCATES, _TRUNCATES_SINCE = 1 << 14, 3
_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT = 38, 1  # linux/prctl.h
_NOT_ISOLATED, _AT_ITS_END = 97, 113  # exit statuses


def _confine(folder: str, seconds: int, memory_mb: int) -> None:
    """Give up the network, then everything beyond the limits: runs in the child, before the program."""
    import resource  # POSIX only, as is this function

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        cut_off = libc.unshare(_NEW_USER | _NEW_PROCESSES | _NEW_NETWORK) == 0
    except (OSError, AttributeError):
        cut_off = False
    if not cut_off:
        os._exit(_NOT_ISOLATED)
    program = os.fork()  # the first process of its namespace: with it all others there end
    if program:
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # on which the parent waits
        os._exit(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) & 0xFF)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    _write_only_in(folder, libc)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _write_only_in(folder: str, libc: ctypes.CDLL) -> None:
    """Give up writing elsewhere, where the kernel has Landlock."""
    version = libc.syscall(_CREATE_RULES, None, 0, 1)
    if version < 1:
        return
    rights = _WRITES | (_TRUNCATES if version >= _TRUNCATES_SINCE else 0)
    rules = libc.syscall(_CREATE_RULES, struct.pack("=Q", rights), 8, 0)
    beneath = struct.pack("=Qi", rights, os.open(folder, os.O_PATH))
    libc.syscall(_ADD_RULE, rules, 1, beneath, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.syscall(_RESTRICT_SELF, rules, 0) != 0:
        os._exit(_NOT_ISOLATED)


def passes(program: str, *, seconds: int = 5, memory_mb: int = 1024) -> bool:
    """Say whether a program comes to its end, as an imported module, within its limits.

    Args:
        program: Python source.
        seconds: Limit of processor time; twice that of time on the clock.
        memory_mb: Limit of memory, in MB.

    Raises:
        SafeSteerError: If a process cannot be cut off from the network here; nothing has run then.
    """
    # An exit before the end is no pass, and what a script does under `__main__` is not run.
    whole = f"exec({program!r}, {{'__name__': 'humaneval'}})\nimport os\nos._exit({_AT_ITS_END})"
    with tempfile.TemporaryDirectory() as folder:
        running = subprocess.Popen(
            [sys.executable, "-I", "-c", whole],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: _confine(folder, seconds, memory_mb),
            start_new_session=True,
        )
        try:
            status = running.wait(2 * seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    if status == _NOT_ISOLATED:
        raise SafeSteerError(
            "Generated code is not run: this system gives a process no namespaces of its own."
        )
    return status == _AT_ITS_END


def completion(prompt: str, answer: str, entry_point: str = "") -> str:
    """Return the program in an answer, as a whole function or as a body after the prompt.

    Of several code blocks the first that defines `entry_point` counts, else the first that defines
    anything, else the first. Without a block, the lines from the first that looks like Python count, up to
    where they no longer parse. A body whose first line has lost its indent gets it back.
    """
    answer = answer.replace("\r\n", "\n")
    blocks = re.findall(r"```[^\S\n]*\w*[^\S\n]*\n(.*?)(?:```|\Z)", answer, re.S)
    defines = re.compile(
        rf"^\s*(?:async )?def {re.escape(entry_point)}\b" if entry_point else r"^\s*def ", re.M
    )
    chosen = [block for block in blocks if defines.search(block)]
    chosen += [block for block in blocks if re.search(r"^\s*def ", block, re.M)]
    code = (chosen or blocks or [_python_lines(answer, prompt)])[0]
    whole = defines if entry_point else re.compile(r"^[^\S\n]*(?:async )?def ", re.M)
    if whole.search(textwrap.dedent(code)) and _compiles(textwrap.dedent(code)):
        return textwrap.dedent(code)
    return prompt + _indented(code)


def _compiles(code: str) -> bool:
    """Say whether code is a program: a body with its `return` parses and is none."""
    try:
        compile(code, "answer", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def _python_lines(answer: str, prompt: str) -> str:
    """Cut prose before and after the code of an answer without a code block."""
    lines = answer.split("\n")
    looks = re.compile(
        r"\s*(?:def |async def |import |from \w+ import |class |@\w|return\b|for |while |if |#)|\s+\S"
        r"|\w+ ?[=+(\[]"
    )
    first = next((i for i, line in enumerate(lines) if looks.match(line)), 0)
    for last in range(len(lines), first, -1):
        code = "\n".join(lines[first:last])
        if _parses(textwrap.dedent(code)) or _parses(prompt + _indented(code)):
            return code
    return answer


def _indented(body: str) -> str:
    """Indent a body by four spaces, also one whose first line alone has lost its indent."""
    lines = body.strip("\n").split("\n")
    others = [line for line in lines[1:] if line.strip()]
    depth = min((len(line) - len(line.lstrip()) for line in others), default=0)
    if not lines[0].startswith((" ", "\t")) and depth >= 4 and not lines[0].rstrip().endswith(":"):
        lines[0] = " " * depth + lines[0]
    return textwrap.indent(textwrap.dedent("\n".join(lines)), "    ") + "\n"


def run_humaneval(
    chat: ModelLike,
    rows: Sequence[dict],
    *,
    allow_code: bool = False,
    max_new_tokens: int = 256,
    seconds: int = 5,
) -> list[bool]:
    """Complete each problem greedily and run its tests.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        rows: Problems, with the keys prompt, test (or tests) and entry_point.
        allow_code: Allow to run what the model wrote, confined.
        max_new_tokens: Length of a completion, in tokens.
        seconds: Processor time per program.

    Returns:
        For each problem whether its tests pass.

    Raises:
        SafeSteerError: Without `allow_code`, or where a process cannot be confined.
    """
    if not allow_code:
        raise SafeSteerError("HumanEval runs what the model wrote: allow it with allow_code=True.")
    task = "Complete this Python function. Answer with the whole function only."
    requests = [f"{task}\n\n{row['prompt']}" for row in rows]
    answers = generate(chat, requests, max_new_tokens=max_new_tokens)
    passed = []
    for row, answer in zip(rows, answers, strict=True):
        # Imports, and functions that the asked one calls: an answer may leave them out.
        head = re.split(rf"^def {re.escape(row['entry_point'])}\b", row["prompt"], maxsplit=1, flags=re.M)[0]
        tests = row.get("test") or row["tests"]
        code = completion(row["prompt"], answer, row["entry_point"])
        passed.append(passes(f"{head}\n{code}\n{tests}\ncheck({row['entry_point']})\n", seconds=seconds))
    return passed


def problems(data: str | Path | None = None, limit: int | None = None) -> list[dict]:
    """Load the first `limit` problems from the file `data` (JSON Lines), or from the Hub.

    Raises:
        SafeSteerError: If they cannot be loaded, or the file holds something else.
    """
    if data is None:
        from datasets import load_dataset  # heavy, and only needed here

        try:
            rows = cast(Iterable[dict], load_dataset("openai/openai_humaneval", split="test"))
            return list(rows)[:limit]
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
