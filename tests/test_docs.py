"""What the documents say holds: code runs, names and settings exist, links lead somewhere."""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_architecture import LAYERS

import safesteer
from conftest import random_vector
from safesteer.directions.extraction import from_vector
from safesteer.recipes import recipe
from safesteer.run_folder import STAGES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted([*FRONT, *DOCS.glob("*.md"), *DOCS.glob("*/*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Their code runs from top to bottom on a tiny model, but for blocks under "<!-- not run: why -->".
RUNNABLE = (
    "README.md",
    "docs/quickstart.md",
    "docs/how-to/dial.md",
    "docs/how-to/directions.md",
    "docs/how-to/fine-tuning.md",
    "docs/how-to/gated-steering.md",
    "docs/how-to/judges.md",
    "docs/how-to/models.md",
    "docs/how-to/prompts.md",
    "docs/how-to/transformer-lens.md",
)
ROOMS = [room for row in LAYERS for room in row.split() if not room.startswith("_")]
SETTINGS = {name for name, *_ in recipe().rows()}
FILES = ("json", "jsonl", "safetensors", "csv", "md", "html", "toml", "pt")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *, runnable: bool = False) -> list[str]:
    """The page's Python, with the line breaks before it, so that errors name the line of the page."""
    text, found = text_of(page), []
    for match in re.finditer(r"(<!-- not run: [^>]+-->\n)?```python\n(.*?)```", text, re.S):
        if not (runnable and match[1]):
            found.append("\n" * text[: match.start(2)].count("\n") + match[2])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_parses_and_names_exist(page):
    for code in blocks(page):
        tree = ast.parse(code)
        owners = {"ss": safesteer}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safesteer"):
                for alias in node.names:
                    value = resolve(f"{node.module}.{alias.name}")
                    owners[alias.asname or alias.name] = value
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = owners.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"


def resolve(name: str):
    """A module, or what a module or a class in it holds under that name."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_in_the_text_exist(page):
    """`directions.extraction.mean_difference` is a function, `distill.lr` a setting, `ss.align` is public."""
    if page.name in ("CHANGELOG.md", "README.md") and page.parent != DOCS:
        text = text_of(page).partition("Names that changed")[0]  # the changelog has old names too
    else:
        text = text_of(page)
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        public = re.match(r"ss\.(\w+)", code)
        if public:
            assert public[1] in safesteer.__all__, code
        name = re.fullmatch(r"([a-z_]+)\.([a-z_]+)((?:\.\w+)*)(?:=.*)?", code)
        if name and name[2] not in FILES and name[1] in [*ROOMS, *STAGES]:
            known = f"{name[1]}.{name[2]}" in SETTINGS and not name[3]
            assert known or resolve(f"safesteer.{name[1]}.{name[2]}{name[3]}"), code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page):
    text = text_of(page).partition("Names that changed")[0]
    named = set(re.findall(r"--set ([a-z_.]+)=", text))
    for table in re.findall(r"```toml\n(.*?)```", text, re.S):
        section = ""
        for line in table.splitlines():
            section = line.strip("[]") + "." if line.startswith("[") else section
            if "=" in line:
                named.add(section + line.partition("=")[0].strip())
    assert named <= SETTINGS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of(page)):
        assert (page.parent / target).exists(), target


def test_readme_is_short_and_has_a_picture():
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 90
    pictures = re.findall(r'(?:srcset|src)="([^"]+)"', text)
    assert len(pictures) == 2
    assert all((ROOT / picture).exists() for picture in pictures)


def test_api_pages_show_what_is_there():
    index = text_of(DOCS / "api" / "index.md")
    cells = re.findall(r"^\| (`[^|]+) \|", index, re.M)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(safesteer.__all__)
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", text_of(page), re.M):
            assert resolve(name).__doc__, name


def test_the_map_is_the_rule_that_is_tested():
    rows = re.findall(r"^\| (`[^|]+) \|", text_of(DOCS / "architecture.md"), re.M)
    assert [" ".join(re.findall(r"`(\w+)`", row)) for row in rows] == list(LAYERS)


def test_the_stages_have_one_name():
    rows = re.findall(r"^\| \d (\w+) \|", text_of(DOCS / "command-line.md"), re.M)
    assert tuple(rows) == STAGES


def test_figures_are_those_of_the_script(tmp_path, monkeypatch):
    path = DOCS / "figures" / "make.py"
    spec = importlib.util.spec_from_file_location("make_figures", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.main()
    made = {p.name: p.read_bytes() for p in tmp_path.glob("*.svg")}
    assert made == {p.name: p.read_bytes() for p in path.parent.glob("*.svg")}


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_llama):
    """`load_model` returns a tiny model, and what a call does not set is small."""
    configs = {
        "find_direction": safesteer.DirectionConfig(
            n_train=4, n_val=2, n_compare_prompts=2, extraction="prefill"
        ),
        "select_tokens": safesteer.TokenConfig(n_samples=1, horizon=3),
        "distill": safesteer.DistillConfig(
            n_steps=2, harmful_per_step=2, harmless_per_step=2, max_new_tokens=3
        ),
        "evaluate": safesteer.EvaluateConfig(n_prompts=2, max_new_tokens=4, perplexity_tokens=64),
        "explain": safesteer.ExplainConfig(
            n_prompts=4, n_harmful=2, n_traces=1, max_tokens=8, n_sets=2, n_splits=2
        ),
    }
    for name, config in configs.items():
        monkeypatch.setattr(safesteer, name, partial(getattr(safesteer, name), config=config))
    monkeypatch.setattr(safesteer, "load_model", lambda name, **options: tiny_llama)
    monkeypatch.setattr(safesteer, "check_reload", lambda folder: 0.0)  # a fresh process takes seconds
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", RUNNABLE)
def test_code_runs(page, small):
    names: dict = {"__name__": "__main__"}
    for code in blocks(ROOT / page, runnable=True):
        exec(compile(code, page, "exec"), names)


def test_a_direction_in_a_plain_hook_is_ours(tiny_llama):
    code = next(code for code in blocks(DOCS / "how-to" / "other-tools.md") if "forward_pre_hook" in code)
    direction = from_vector(tiny_llama, 9 * random_vector(32)).direction(tiny_llama, "given", 1)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 6, "do_sample": False}
    names = {"direction": direction, "model": tiny_llama.model, "inputs": inputs}
    exec(code, names)
    with safesteer.steer(tiny_llama, direction):
        ours = tiny_llama.model.generate(**inputs)
    assert torch.equal(names["answer"], ours)
    assert not torch.equal(ours, tiny_llama.model.generate(**inputs))


def test_every_runnable_page_has_code_to_run():
    assert all(blocks(ROOT / page, runnable=True) for page in RUNNABLE)


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "api" / "directions" / "index.html").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_open_in_colab(path):
    """The first cell has a badge; all of them, and mkdocs.yml, name one repository."""
    repository = re.search(r"^  repository: (\S+)", text_of(ROOT / "mkdocs.yml"), re.M)[1]
    first = "".join(json.loads(text_of(path))["cells"][0]["source"])
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/assets/colab-badge.svg)]({link})" in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_keep_small_outputs_of_a_run_from_top_to_bottom(path):
    text = text_of(path)
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for c in cells for output in c["outputs"]}
    assert kinds
    assert "error" not in kinds
    assert len(text) < 300_000
    assert not re.search(r"/tmp/|/home/|/root/|/work/", text)
