"""Data flows one way: the rooms from top to bottom, and what every module must keep."""

import ast
from graphlib import TopologicalSorter

import pytest

from conftest import PACKAGE

# A module imports only rooms further down (or its own room). The docs draw this list.
LAYERS = (
    "cli",
    "alignment",
    "run_folder",
    "recipes exporting",
    "evaluation",
    "report distillation",
    "attribution",
    "tokens",
    "directions",
    "steering judges",
    "models",
    "prompts",
    "_settings",
    "_files _endpoint _token_text _intervals",
    "_errors _version _progress",
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


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_no_file_is_longer_than_350_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
