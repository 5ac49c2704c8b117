"""Data flows one way: the rooms from top to bottom, and what every module must keep."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

import safesteer
from conftest import PACKAGE

VAGUE = {"found", "said", "asked", "mine", "these", "rest", "how", "few", "given", "kept", "own", "three"}

# A module imports only rooms further down (or its own room). The docs draw this list.
LAYERS = (
    "__main__",
    "cli",
    "alignment live searching",
    "run_folder",
    "recipes exporting profiling",
    "model_card",
    "evaluation",
    "report distillation",
    "attribution",
    "tokens",
    "directions",
    "steering judges",
    "models",
    "prompts",
    "settings",
    "_settings",
    "_files _endpoint _token_text _intervals",
    "_errors _version progress _clock _options",
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms.split()}
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imported(module: str) -> set[str]:
    """The package's own modules that a module imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("safesteer.") for name in names} & MODULES.keys()


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for lower in imported(module):
        assert room(lower) == room(module) or LEVEL[room(lower)] > LEVEL[room(module)], lower


def test_no_module_imports_itself_through_others():
    order = TopologicalSorter({module: imported(module) for module in MODULES}).static_order()
    assert set(order) == set(MODULES)


def test_every_room_is_on_the_map():
    assert {room(module) for module in MODULES} == LEVEL.keys()


def test_imports_are_seen():
    assert {"steering.interventions", "models.chat_model"} <= imported("steering.direction")


def functions(module: str) -> list[ast.FunctionDef]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def names_bound(module: str) -> set[str]:
    """Every variable, parameter and field that a module binds."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_small(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 350
    for node in functions(module):
        docstring = ast.get_docstring(node, clean=False)
        words = len(docstring.splitlines()) if docstring else 0
        length = node.end_lineno - node.lineno + 1
        assert length - words <= 60, f"{node.name} has {length - words} lines of code"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        taken = [a.arg for a in arguments if a.arg not in ("self", "cls")]
        assert len(taken) <= 8, f"{node.name} has {len(taken)} parameters"


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_they_hold(module):
    assert not names_bound(module) & VAGUE


@pytest.mark.parametrize("module", MODULES)
def test_no_function_shadows_its_module(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert module.rpartition(".")[2] not in defined


def test_public_names_do_not_hide_modules():
    assert 25 <= len(safesteer.__all__) <= 40
    assert not set(safesteer.__all__) & {room(module) for module in MODULES}
    for name in safesteer.__all__:
        assert getattr(safesteer, name) is not None


def test_types_are_rarely_suppressed():
    lines = [line for path in MODULES.values() for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum("type: ignore" in line or "pyright: ignore" in line for line in lines) <= 15
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("code", ["import safesteer", "import safesteer.cli; safesteer.cli.app(['--help'])"])
def test_importing_and_asking_for_help_load_nothing_heavy(code):
    heavy = "{'torch', 'pandas', 'transformers', 'plotly', 'sklearn'} & set(sys.modules)"
    check = f"import atexit, sys; atexit.register(lambda: print({heavy}, file=sys.stderr)); {code}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
