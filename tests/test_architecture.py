"""Data flows one way, and no file outgrows a reader."""

import ast

import pytest

from conftest import PACKAGE

MAY_IMPORT = {  # the rooms that each room may look into
    "errors": set(),
    "divergence": set(),
    "files": {"errors"},
    "prompts": {"errors", "divergence", "files"},
    "judges": set(),
    "endpoint": {"errors"},
    "stats": set(),
    "benchmarks": {"errors", "files"},
    "settings": {"errors"},
}
for below, above in [
    ("models", "prompts"),
    ("generation", "models"),
    ("hooks", "models"),
    ("steering", "hooks"),
    ("perplexity", "models"),
    ("capability", "models"),
    ("code_eval", "generation"),
    ("guards", "generation"),
    ("refusal", "guards"),
    ("extraction", "refusal"),
    ("directions", "extraction"),
    ("scoring", "directions"),
    ("sweep", "scoring"),
    ("calibration", "directions"),
    ("tokens", "directions"),
    ("lora", "models"),
    ("sharding", "models"),
    ("objective", "divergence"),
    ("onpolicy", "directions"),
    ("student", "tokens"),
    ("distill", "student"),
    ("server", "onpolicy"),
]:
    MAY_IMPORT[below] = {above} | MAY_IMPORT[above]
for room in (
    "extraction",
    "directions",
    "scoring",
    "sweep",
    "calibration",
    "tokens",
    "onpolicy",
    "student",
    "distill",
):
    MAY_IMPORT[room] |= {"hooks", "steering"}
MAY_IMPORT["guards"] |= {"endpoint"}
for room in ("sweep", "tokens", "student", "distill"):
    MAY_IMPORT[room] |= {"settings"}
MAY_IMPORT["sweep"] |= {"stats"}
MAY_IMPORT["calibration"] |= {"perplexity"}
MAY_IMPORT["onpolicy"] |= {"lora", "sharding"}
MAY_IMPORT["server"] |= {"onpolicy", "lora", "sharding", "endpoint"}
MAY_IMPORT["student"] |= {"lora", "objective", "sharding"}
MAY_IMPORT["distill"] |= {"onpolicy", "lora", "objective", "sharding"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(module: str) -> set[str]:
    """Names of safesteer's own modules that a module imports, wherever the import stands."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    own = {name.split(".")[1] for name in found if name.startswith("safesteer.")}
    return {name for name in own if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_imports_go_one_way(module):
    assert imported(module) <= MAY_IMPORT[module]


def test_imports_are_seen():
    assert {"extraction", "steering", "models"} <= imported("directions")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_is_longer_than_350_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
