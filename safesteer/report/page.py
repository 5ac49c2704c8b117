"""Write report.html: one self-contained page that opens from disk, offline.

1. `load_page_data` reads the run folder into one JSON value.
2. The shell (`report.html`), style, script, plotly and data are put together, each exactly once.
   Data sits in <script type="application/json"> with <, > and & escaped; the script builds every
   element with textContent, so no text from a model or a prompt is ever parsed as markup.
3. A Content-Security-Policy allows the page's own two scripts by hash and nothing else: no
   network, no inline handlers. Plotly is stored as inert text and started when a figure is seen.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from safesteer._files import write_text
from safesteer._version import __version__
from safesteer.report.figures import suite_figure
from safesteer.report.page_data import load_page_data
from safesteer.report.robust_figures import robust_figure
from safesteer.report.robust_table import KL_HARMFUL, KL_HARMLESS, is_robust

NAME = "report.html"


def write_report(run: str | Path) -> Path:
    """Build report.html from the files in a run folder.

    Args:
        run: The run folder. Only manifest.json must exist; a section without its file says what is missing.

    Returns:
        The path of the page.

    Raises:
        SafeSteerError: Where the folder holds no readable manifest.json.

    Example:
        >>> from safesteer.report.page import write_report
        >>> _ = (folder / "manifest.json").write_text('{"model": "my-model"}')
        >>> tokens.save(folder / "tokens.json")
        >>> write_report(folder).name
        'report.html'
    """
    run = Path(run)
    write_text(run / NAME, build_page(load_page_data(run)))
    return run / NAME


def build_page(data: dict[str, Any]) -> str:
    """Return the whole page as text, from what `load_page_data` returns."""
    facts = data["run"]
    about = [facts["date"], *(f"{name} {facts[name]}" for name in ("preset", "seed") if facts[name])]
    texts = {
        "title": f"SafeSteer: {facts['model']}",
        "model": facts["model"],
        "about": " · ".join(filter(None, [*about, f"SafeSteer {__version__}"])),
    }
    return fill_page(
        "report.html", ("report.js", "lens.js", "report_lens.js", "report_tokens.js"), data, texts
    )


def fill_page(shell: str, scripts: Sequence[str], data: Any, texts: Mapping[str, str]) -> str:
    """Put a page together in the report's look and under its policy.

    Args:
        shell: The asset with the placeholders {{policy}}, {{style}}, {{data}}, {{plotly}} and {{script}}, and
            those of `texts`.
        scripts: Assets that run, one after the other, after dom.js.
        data: What the script reads, as JSON.
        texts: Texts by placeholder; they are escaped.
    """
    script = "\n".join(map(asset, ("dom.js", *scripts)))
    plotly = _lines(get_plotlyjs())
    if "</script" in plotly.lower() or "<!--" in plotly:
        plotly = plotly.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    parts = {name: html.escape(text) for name, text in texts.items()} | {
        "policy": html.escape(_policy(script, plotly)),
        "style": asset("theme.css") + asset("report.css") + asset("lens.css"),
        "data": as_json(data),
        "plotly": plotly,
        "script": script,
    }
    # One pass, so that a placeholder inside the data stays what it is: text.
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], asset(shell))


def suite_page(table: pd.DataFrame, title: str) -> str:
    """Return a page with a suite's figure and table: offline, light or dark as the reader's system is.

    Args:
        table: The table of `suite.run_suite`.
        title: The page's heading.
    """
    note = "low and high are 95 % intervals."
    if not is_robust(table):
        return figure_page(suite_figure(table), table, title, note)
    shown = pd.DataFrame(table[~table.kind.isin((KL_HARMFUL, KL_HARMLESS))])
    return figure_page(
        robust_figure(table), shown, title, f"{note} results.csv has the KL of every position."
    )


def figure_page(figure: go.Figure, table: pd.DataFrame, title: str, note: str) -> str:
    """Return a page with a figure and its table: offline, light or dark as the reader's system is.

    Args:
        figure: Drawn in the light theme; the page gives it the ink of the dark one.
        table: What stands below.
        title: The page's heading.
        note: A sentence between figure and table.
    """
    drawn = _lines(figure.to_html(include_plotlyjs=True, full_html=False))
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", drawn, re.DOTALL)
    cells = table.to_html(index=False, border=0, na_rep="", float_format=lambda x: f"{x:.3f}")
    name, style = html.escape(title), asset("suite.css")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_policy(*scripts))}">'
        f"<title>{name}</title><style>{style}</style>"
        f"<h1>{name}</h1>{drawn}<p>{html.escape(note)}</p>{cells}"
    )


def as_json(value: Any) -> str:
    """Return JSON that can stand inside a script element: no <, > or & and no line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _policy(*scripts: str) -> str:
    """Return a policy that loads nothing and runs only these scripts. Plotly needs inline styles."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )


def asset(name: str) -> str:
    """Return the text of an asset of the pages: the report, and the lens that it shares with `live`."""
    return _lines((resources.files("safesteer.report") / "assets" / name).read_text(encoding="utf-8"))


def _lines(text: str) -> str:
    """Return line ends as a browser reads them, so that the hashes agree."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
