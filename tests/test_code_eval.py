"""Generated code: what passes, what cannot get out, and that nothing runs without permission."""

import json

import pytest

from safesteer._errors import SafeSteerError
from safesteer.evaluation import humaneval
from safesteer.evaluation.humaneval import completion, passes, problems, run_humaneval

PROBLEM = {
    "prompt": 'import math\n\n\ndef twice(x):\n    """Two times x."""\n',
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "twice",
}


def isolated() -> bool:
    try:
        return passes("pass")
    except SafeSteerError:
        return False


needs_isolation = pytest.mark.skipif(not isolated(), reason="this system gives no network namespace")


@needs_isolation
@pytest.mark.parametrize(
    ("program", "ends_well"),
    [
        ("print(1)", True),
        ("assert 1 == 2", False),
        ("raise SystemExit(3)", False),
        ("while True: pass", False),
        ("x = bytearray(4 * 2**30)", False),
        ("open('big', 'wb').write(bytes(4 * 2**20))", False),
        ("import os; assert not os.environ.get('HOME')", True),
        ("import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)", False),
    ],
)
def test_a_program_passes_only_within_its_limits(program, ends_well):
    assert passes(program, seconds=1) is ends_well


@needs_isolation
def test_a_program_cannot_reach_a_server_of_this_machine():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)"
        socket.create_connection(("127.0.0.1", port), timeout=1).close()  # this process can
        assert not passes(program)


def test_without_a_namespace_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(humaneval, "_NEW_NETWORK", 0x1000)  # not a flag that can be unshared
    with pytest.raises(SafeSteerError, match="not run"):
        passes(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "answer",
    [
        "Sure:\n```python\ndef twice(x):\n    return 2 * x\n```\nDone.",
        "```\ndef twice(x):\n    return 2 * x",
        "    return 2 * x",
        "def twice(x):\n    return 2 * x",
    ],
)
def test_the_function_is_read_from_an_answer(answer):
    space: dict = {}
    exec(completion(PROBLEM["prompt"], answer), space)
    assert space["twice"](2) == 4


@needs_isolation
def test_problems_are_passed_or_failed(tiny_llama, monkeypatch):
    answers = ["```python\ndef twice(x):\n    return x + x\n```", "def twice(x):\n    return x"]
    monkeypatch.setattr(humaneval, "generate", lambda chat, prompts, **settings: answers)
    assert run_humaneval(tiny_llama, [PROBLEM, PROBLEM], allow_code=True) == [True, False]


def test_nothing_runs_without_permission(tiny_llama):
    with pytest.raises(SafeSteerError, match="allow_code"):
        run_humaneval(tiny_llama, [PROBLEM])


def test_problem_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PROBLEM) + "\n")
    assert problems(path) == [PROBLEM]
    path.write_text("{}\n")
    with pytest.raises(SafeSteerError, match="does not hold HumanEval"):
        problems(path)
    with pytest.raises(SafeSteerError, match="Cannot read"):
        problems(tmp_path / "none")


FULL, BODY = "def twice(x):\n    return 2 * x\n", "    return 2 * x\n"
HELPER = "def half(x):\n    return x\n\n\ndef twice(x):\n    return 2 * half(x)\n"


@pytest.mark.parametrize(
    "answer",
    [
        FULL,
        BODY,
        *(f"```{name}\n{FULL}```" for name in ("", "python", "py", "Python3", " python")),
        f"```python\n{FULL}",
        f"```python\n{BODY}```",
        f"```python\n{HELPER}```",
        f"```python\nimport os\n{FULL}```",
        "```python\n    def twice(x):\n        return 2 * x\n```",
        f"Here it is:\n\n```python\n{FULL}```\nIt doubles x.",
        f"```python\nprint(twice(2))\n```\nand\n```python\n{FULL}```",
        f"```python\n{FULL}```\n```python\nassert twice(2) == 4\n```",
        f"Sure, here it is:\n{FULL}\nThis doubles x.",
        f"Sure:\n{BODY}It doubles.",
        "return 2 * x",
        "y = 2\n    return y * x",
        "if x > 0:\n        return 2 * x\n    return 2 * x",
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_right_solution_is_read_from_every_wrapping(answer, newline):
    space: dict = {}
    exec("import math\n" + completion(PROBLEM["prompt"], answer.replace("\n", newline), "twice"), space)
    assert space["twice"](2) == 4


def test_an_answer_may_leave_out_what_the_asked_function_calls(tiny_llama, monkeypatch):
    if not isolated():
        pytest.skip("this system gives no network namespace")
    prompt = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef twice(x):\n    """Two times x."""\n'
    answer = "```python\ndef twice(x):\n    return int(math.sqrt(16 * half(x) * half(x)))\n```"
    monkeypatch.setattr(humaneval, "generate", lambda chat, prompts, **settings: [answer])
    assert run_humaneval(tiny_llama, [{**PROBLEM, "prompt": prompt}], allow_code=True) == [True]


def test_a_body_with_a_function_of_its_own_is_no_program():
    body = "    def add(y):\n        return y + x\n    return add(x)\n"
    space: dict = {}
    exec(completion(PROBLEM["prompt"], f"```python\n{body}```", "twice"), space)
    assert space["twice"](2) == 4
