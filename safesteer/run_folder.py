"""The run folder: a contract of files, and a manifest that says which of them are whole.

`manifest.json` holds what identifies a run (model, settings, prompts, template), its versions, and
for every finished stage its seconds, peak memory and the hash of each file it wrote. A stage counts
as finished only while its files still have those hashes, so a torn file is made again.
"""

import json
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from safesteer._errors import SafeSteerError
from safesteer._files import digest, read_json, write_json
from safesteer._version import __version__
from safesteer.judges.judge import Judge
from safesteer.models.batch import template_hash
from safesteer.models.chat_model import ChatModel
from safesteer.prompts.prompt_set import PromptSet
from safesteer.recipes import Recipe

STAGES = ("direction", "tokens", "distill", "export", "evaluate", "explain", "report")


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder with what its stages share."""

    path: Path
    model: str
    recipe: Recipe
    prompts: PromptSet
    judge: Judge
    console: Console
    track: str | None = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def progress(self, what: str, total: float = 1.0) -> Iterator[Callable[[float], None]]:
        """A bar for one stage, with time left; the yielded function sets how much is done."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # In a notebook rich draws bars with ipywidgets; without it, it would warn at every change.
        off = self.console.is_jupyter and find_spec("ipywidgets") is None
        with Progress(*columns, console=self.console, transient=True, disable=off) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)


def identity(run: Run, base: ChatModel) -> dict:
    """What must agree for a folder to be continued."""
    return {
        "model": run.model,
        "fingerprint": base.fingerprint,
        "config": json.loads(json.dumps(asdict(run.recipe))),
        "prompts_hash": run.prompts.hash,
        "template_hash": template_hash(base.tokenizer),
    }


def open_run(run: Run, base: ChatModel) -> None:
    manifest, ours = run.path / "manifest.json", identity(run, base)
    if manifest.exists():
        theirs = read_json(manifest)
        different = [k for k, v in ours.items() if theirs.get(k) != v]
        if different:
            raise SafeSteerError(
                f"{run.path} holds a run with another {', '.join(different)}: choose another folder,"
                " or delete it to start again."
            )
        return
    if any(p.name != ".lock" for p in run.path.iterdir()):
        raise SafeSteerError(f"{run.path} is not empty and holds no SafeSteer run: choose another folder.")
    versions = {n: version(n) for n in ("torch", "transformers", "transformer-lens", "safetensors")}
    write_json(
        manifest,
        {
            "name": "safesteer",
            **ours,
            "preset": run.recipe.preset,
            "seed": run.recipe.seed,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {"safesteer": __version__, "python": platform.python_version(), **versions},
            "threads": torch.get_num_threads(),
            "stages": {},
        },
    )


def finished(run: Run, stage: str) -> bool:
    """True where every file of the stage is there with the hash it was recorded with."""
    done = read_json(run.path / "manifest.json")["stages"].get(stage)
    if done is None:
        return False
    files = [(run.path / name, recorded) for name, recorded in done["files"].items()]
    return all(path.is_file() and digest(path) == recorded for path, recorded in files)


def record_stage(run: Run, stage: str, written: list[str], seconds: float) -> None:
    manifest = read_json(run.path / "manifest.json")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    manifest["stages"][stage] = {
        "seconds": round(seconds, 1),
        "peak_mb": round(peak_mb),
        "files": {name: digest(run.path / name) for name in written},
    }
    # What came after this stage was made from its old files.
    for later in STAGES[STAGES.index(stage) + 1 :]:
        manifest["stages"].pop(later, None)
    write_json(run.path / "manifest.json", manifest)
