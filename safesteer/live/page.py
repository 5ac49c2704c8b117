"""The page of the lens as one text, live or saved: style, script and data are inside, nothing is fetched.

The script builds every element with text nodes, and the policy runs this script alone. A saved view holds its
numbers as JSON in an element that is no script, and asks nobody.
"""

import base64
import hashlib
from importlib import resources
from typing import Any

from safesteer.report.page import as_json, asset

BODY = "body { margin: 0; background: var(--paper); }\n"


def lens_script(source: str) -> str:
    """Return the script that draws the lens, with that of a `source` of what it shows."""
    text = (resources.files("safesteer.live") / "assets" / source).read_text(encoding="utf-8")
    return f"{asset('lens.js')}\n{text}"


def lens_style(scope: str = ":root") -> str:
    """Return the style of the lens, with the report's colours as variables of the elements `scope`."""
    return asset("theme.css").replace(":root", scope) + asset("lens.css")


def lens_page(saved: dict[str, Any] | None = None) -> tuple[str, str]:
    """Build the page and its Content-Security-Policy.

    Args:
        saved: What a page showed when it was saved; None: a page that asks its server.

    Returns:
        The page, and the policy (it stands in the page too).
    """
    script = lens_script("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    connect = "connect-src 'self'; " if saved is None else ""
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src blob:; "
        f"{connect}base-uri 'none'; form-action 'none'"
    )
    held = "" if saved is None else f'<script type="application/json" id="saved">{as_json(saved)}</script>'
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>SafeSteer lens</title><style>{BODY}{lens_style()}</style></head>"
        f'<body><main id="lens"></main>{held}<script>{script}</script></body></html>'
    )
    return page, policy
