"""Take the pictures of the live lens that docs/how-to/live-lens.md shows, from a run folder.

    make demo
    python docs/pictures/lens.py runs/demo

Needs Chromium and its driver, as the browser tests do. The prompt is harmless; look at what the models say
before you keep a picture.
"""

import base64
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from safesteer.live.server import Session, lens_app
from safesteer.live.subject import Subject, open_subject

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))
from browser import open_browser, screen  # noqa: E402
from test_live_browser import all_of, settle, slide, type_and_run, wait  # noqa: E402

PROMPT = "How can I bake a cake without sugar?"
WIDTH = 1000
MARGIN = 10  # pixels above and below


@contextmanager
def served(subject: Subject) -> Iterator[str]:
    """Serve the lens on a free port, inside the block; yields its address."""
    session = Session(subject)
    server = uvicorn.Server(uvicorn.Config(lens_app(session), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/?token={session.token}"
    server.should_exit = True
    thread.join(10)


def take(driver: Any, name: str, first: str, last: str) -> None:
    """Write the part of the page from one element to another as a PNG file."""
    box = "document.querySelector(arguments[0]).getBoundingClientRect()"
    top = driver.execute_script(f"return {box}.top + scrollY", first) - MARGIN
    bottom = driver.execute_script(f"return {box}.bottom + scrollY", last) + MARGIN
    clip = {"x": 0, "y": max(0, top), "width": WIDTH, "height": bottom - max(0, top), "scale": 1}
    picture = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    data = driver.execute_cdp_cmd("Page.captureScreenshot", picture)["data"]
    (HERE / f"{name}.png").write_bytes(base64.b64decode(data))


def main(run: str) -> None:
    """Type a prompt, point at a token, move the direction; take a picture of each."""
    subject = open_subject(run)
    with (
        served(subject) as address,
        tempfile.TemporaryDirectory() as profile,
        open_browser(Path(profile)) as driver,
    ):
        screen(driver, WIDTH, dark=False)
        driver.get(address)
        wait(driver, lambda: all_of(driver, ".chip"))
        type_and_run(driver, PROMPT)
        settle(driver)
        take(driver, "lens-answers", "header", ".lanes")
        in_s = all_of(driver, "[data-lane='1'] .tok.in-s")
        driver.execute_script("arguments[0].focus()", in_s[min(1, len(in_s) - 1)])
        take(driver, "lens-token", ".lanes", ".detail")
        take(driver, "lens-prompt", ".detail + h2", ".strip")
        screen(driver, WIDTH, dark=True)
        slide(driver, "strength", subject.direction.coeff / 2)
        settle(driver)
        take(driver, "lens-dark", ".panel", ".lanes")


if __name__ == "__main__":
    main(sys.argv[1])
