"""The widget in a real JupyterLab, driven by a real Chromium: a cell runs, a prompt is typed, a slider moves.

Server, kernel and browser belong to the test and end with it, however it ends.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import browser
import psutil
import pytest
from browser import plain
from test_live import PROMPT, answers

from safesteer.live.reading import Subject, View

pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
pytest.importorskip("anywidget", reason="the extra 'explore' is not installed")
browser.require_browser()
from selenium.webdriver.common.keys import Keys  # noqa: E402
from test_live_browser import one, settle, shown, slide, wait  # noqa: E402

pytestmark = pytest.mark.slow
# Runs in the notebook, and here: the same seeds give the same three models.
SETUP = """\
import torch, safesteer as ss
from conftest import copy_of, random_vector, tiny_chat
chat = tiny_chat()
student = copy_of(chat)
torch.manual_seed(0)
for p in student.model.parameters():
    p.data += 0.05 * torch.randn_like(p)
direction = ss.Direction(random_vector(32, seed=3), 1, "-1", "given", coeff=2.0)
config = ss.TokenConfig(k=8, horizon=3, n_samples=2, min_steered_prob=0.0)
tokens = ss.select_tokens(chat, direction, ["Name a river.", "How do tides work?"], config)
"""
CELL = SETUP + "ss.lens(chat, direction, tokens, student)"


def notebook() -> str:
    cell = {"cell_type": "code", "id": "lens", "metadata": {}, "source": CELL, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": [cell | {"execution_count": None}], "metadata": {"kernelspec": kernel}}
    return json.dumps(whole | {"nbformat": 4, "nbformat_minor": 5})


@contextmanager
def jupyter(folder: Path):
    """A JupyterLab of its own in a folder, on a free port: yields its address and its token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, here = "a-token-of-this-test", Path(__file__).parent
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | own | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": paths}
    options = [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    options += ["--no-browser", "--allow-root", "--expose-app-in-browser", "--LabApp.news_url=None"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", token
    finally:
        ours = server.children(recursive=True) if server.is_running() else []
        server.terminate()  # it stops its kernels
        _, left = psutil.wait_procs([server, *ours], timeout=10)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def answered(address: str, token: str) -> bool:
    """Whether the server is up."""
    with suppress(OSError), urlopen(f"{address}/api/status?token={token}", timeout=5) as reply:
        return reply.status == 200
    return False


KERNEL = "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"
RUN = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
READY = "return document.querySelector('.lens')?.dataset.ready"


def test_the_widget_answers_in_jupyterlab(tmp_path):
    made: dict = {}
    exec(SETUP, made)
    subject = Subject(made["chat"], made["direction"], made["tokens"], made["student"])
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "lens.ipynb").write_text(notebook(), encoding="utf-8")
    with jupyter(folder) as (address, token), browser.open_browser(tmp_path / "profile") as driver:
        wait(driver, lambda: answered(address, token), 40)
        driver.get(f"{address}/doc/tree/lens.ipynb?token={token}")
        wait(driver, lambda: driver.execute_script(KERNEL) == "idle", 40)
        driver.execute_script(RUN)
        wait(driver, lambda: driver.execute_script(READY) == "true", 60)
        box = one(driver, ".lens textarea")
        driver.execute_script("arguments[0].value = arguments[1]", box, PROMPT)
        box.send_keys(Keys.ENTER)
        settle(driver)
        before = shown(driver)
        slide(driver, "strength", 0.5)
        settle(driver)
        after = shown(driver)
        for texts, coeff in ((before, 2.0), (after, 0.5)):
            expected = answers(subject, View(PROMPT, layer=1, coeff=coeff, max_new_tokens=24))
            assert texts == plain(driver, expected)
    assert len(before) == 3
    assert before[1] != after[1]
    assert before[0] == after[0]
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())
    ]
