"""A real headless Chromium for tests, with its logs; modules skip with the reason where one is missing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
DRIVER = shutil.which("chromedriver") or ""
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


def require_browser() -> None:
    """Skip the module that calls this where there is no browser to drive."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("Chromium or chromedriver is not installed", allow_module_level=True)
    pytest.importorskip("selenium.webdriver", reason="selenium is not installed")


@contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """Start a browser with an empty profile, and close it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    # Not every headless Chromium gives its page the focus, by which JupyterLab knows the current notebook.
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    try:
        yield browser
    finally:
        browser.quit()


def screen(driver: Any, width: int, *, dark: bool, height: int = 900) -> None:
    """Set the size and the colour scheme of the window."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": theme})


def complaints(driver: Any) -> list[str]:
    """Return what the browser warned of since it was asked last."""
    return [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def plain(driver: Any, rows: Any) -> list[list[str]]:
    """Return the texts of tokens as the lens shows them."""
    script = (
        r"return arguments[0].map(r => r.map(t => t.replace(/\n/g, '↵').replace(/\t/g, '⇥').replace("
        r"/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,"
        r" c => `⟨${c.codePointAt(0).toString(16)}⟩`) || '∅'))"
    )
    return driver.execute_script(script, [[t.text for t in row] for row in rows])
