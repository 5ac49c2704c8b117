"""What the documents show exists: code parses, names are real, linked files are there."""

import ast
import json
import re
from pathlib import Path

import pytest

import safesteer
from safesteer.directions import formats as interop
from safesteer.directions import inspection as reading
from safesteer.report import direction_figures

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODULES = {"ss": safesteer, "reading": reading, "interop": interop, "figures": direction_figures}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_there_is_code_to_check():
    assert sum(len(blocks(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_parses_and_names_exist(page):
    for code in blocks(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = MODULES.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_settings_named_in_documents_are_settings():
    """`distill.x` and `sweep.x` in the README are fields that --set takes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for setting in set(re.findall(r"--set ([a-z_.]+)=", text)):
        stage, name = setting.rpartition(".")[::2]
        owner = safesteer.recipe()
        assert hasattr(getattr(owner, stage) if stage else owner, name), setting


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_keep_small_outputs_of_a_run_from_top_to_bottom(path):
    text = path.read_text(encoding="utf-8")
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for c in cells for output in c["outputs"]}
    assert kinds
    assert "error" not in kinds
    assert len(text) < 300_000
    assert not re.search(r"/tmp/|/home/|/root/", text)
