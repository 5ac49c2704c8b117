"""What the site adds while it is built: notebooks, the changelog, a run's report, the table of settings.

mkdocs loads the functions `on_*` (mkdocs.yml: hooks), mkdocstrings the class `Examples` (extensions).
"""

import json
import re
from pathlib import Path
from typing import Any

import griffe
import plotly.io
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).parent.parent
PREPARED = ROOT / ".cache" / "site"  # notebooks with their figures as HTML
PLOTLY, PLOTLY_JSON = "assets/plotly.min.js", "application/vnd.plotly.v1+json"
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]+\)\]")  # an image that lies elsewhere
SETTINGS = "<!-- settings: the table is made when the site is built -->"


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: Any) -> Files:
    """Add the files of the site that lie outside docs/."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        prepared = PREPARED / "notebooks" / path.name
        prepared.parent.mkdir(parents=True, exist_ok=True)
        prepared.write_text(with_figures(path.read_text(encoding="utf-8")), encoding="utf-8")
        files.append(
            File(f"notebooks/{path.name}", str(PREPARED), config.site_dir, config.use_directory_urls)
        )
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    files.append(File.generated(config, "showcase/report.html", content=report_page()))
    return files


def report_page() -> str:
    """Return the report of the committed run, as `safesteer report` writes it."""
    from safesteer.report.page import build_page
    from safesteer.report.page_data import load_page_data

    return build_page(load_page_data(ROOT / "docs" / "showcase"))


def with_figures(notebook: str) -> str:
    """Return the notebook with what needs no network and no kernel: plotly outputs as HTML, no badge."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        cell["source"] = [BADGE.sub("[Open in Colab]", line) for line in cell["source"]]
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).get(PLOTLY_JSON)
            if figure is not None:
                drawn = plotly.io.to_html(
                    {key: figure[key] for key in ("data", "layout")},
                    include_plotlyjs=f"../../{PLOTLY}",
                    full_html=False,
                    default_width="100%",
                    config={"displayModeBar": False, "responsive": True},
                )
                output["data"] = {"text/html": [f'<div class="figure-card">{drawn}</div>']}
    return json.dumps(content)


def on_post_build(config: Any) -> None:
    """Put plotly's script beside the pages."""
    path = Path(config.site_dir) / PLOTLY
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(get_plotlyjs(), encoding="utf-8")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of settings where a page asks for it."""
    return markdown.replace(SETTINGS, settings_tables()) if SETTINGS in markdown else markdown


def settings_tables() -> str:
    """Return one table per section of a recipe, with the value of every preset."""
    from safesteer.recipes import PRESETS, SECTIONS, recipe

    presets = [name for name in PRESETS if name != "paper"]  # that is one of two others
    tables: dict[str, list[str]] = {"": [], **{name: [] for name in SECTIONS}}
    for row in zip(*(recipe(preset).rows() for preset in presets), strict=True):
        name, _, unit, text = row[0]
        section, _, key = name.rpartition(".")
        first, *others = (_shown(value) or "-" for _, value, *_ in row)
        cells = [first, *(other if other == first else f"**{other}**" for other in others)]
        meaning = text.replace("|", "\\|") + (f" ({unit})" if unit else "")
        tables[section].append(f"| `{key}` | {' | '.join(cells)} | {meaning} |")
    head = f"| setting | {' | '.join(presets)} | meaning |\n{'|---' * (len(presets) + 2)}|\n"
    titles = {"": "## Of the whole run", **{name: f"## {name}" for name in SECTIONS}}
    parts = (
        f'{titles[name]}\n\n<div class="settings" markdown>\n\n{head}' + "\n".join(rows) + "\n\n</div>"
        for name, rows in tables.items()
    )
    return "\n\n".join(parts)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]} ..."


class Examples(griffe.Extension):
    """Read "Example:" in a docstring as "Examples:", the one word that griffe knows for code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
