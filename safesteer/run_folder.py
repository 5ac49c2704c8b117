"""The run folder: files by name, and a manifest that says which of them are complete.

`manifest.json` holds what identifies a run (model, recipe, prompts, template), its versions, and for every
finished stage its seconds, peak memory and the hash of each file it wrote. A stage counts as finished only
while its files still have those hashes, so a torn file is made again; where it is the training's own, a
sentence says what to delete for that.
"""

import json
import platform
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from rich.console import Console

from safesteer._errors import SafeSteerError
from safesteer._files import digest, json_lines, locked, read_json, write_json
from safesteer._version import __version__
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import require_adapter
from safesteer.judges.judge import Judge, judge_identity
from safesteer.model_card import CARD, renew_robustness
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.hashing import weights_hash
from safesteer.models.loading import best_device, load_model
from safesteer.models.parts import is_quantized
from safesteer.models.placement import require_together, require_trainable
from safesteer.models.precision import as_dtype, cast_weights, settled_precision, weight_dtype
from safesteer.models.templates import template_hash
from safesteer.progress import Progress, progress_bar
from safesteer.prompts.prompt_set import PromptSet
from safesteer.recipes import Recipe
from safesteer.settings import ALIKE
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import TokenSet

STAGES = ("direction", "tokens", "distill", "export", "evaluate", "explain", "report")
NEEDS = {"export": "distill", "evaluate": "export", "explain": "export"}  # whose weights a stage reads
MANIFEST, RECIPE, SEARCH_FILE = "manifest.json", "recipe.toml", "search.json"


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder with what its stages share.

    `model` is the base's name, or the base itself. `chooser` judges answers where something is chosen by them
    (direction, strength, early stopping), `judge` those to test prompts.
    """

    path: Path
    model: str | ChatModel
    recipe: Recipe
    prompts: PromptSet
    chooser: Judge
    judge: Judge
    console: Console
    track: str | None = None

    @property
    def model_name(self) -> str:
        """The base's name."""
        return self.model if isinstance(self.model, str) else self.model.name

    @property
    def device(self) -> torch.device:
        """Where the base is, or will be put."""
        return torch.device(best_device()) if isinstance(self.model, str) else self.model.device

    @cached_property
    def settled(self) -> Recipe:
        """The recipe with a precision for "auto": that of the run or search here, else this machine's."""
        paths, distill = (self.path / MANIFEST, self.path / SEARCH_FILE), self.recipe.distill
        begun = next((read_json(path).get("recipe", {}) for path in paths if path.exists()), {})
        dtype = settled_precision(self.recipe.dtype, self.device, begun.get("dtype"))
        before = begun.get("distill", {}).get("precision")
        precision = settled_precision(distill.precision, self.device, before)
        return replace(self.recipe, dtype=dtype, distill=replace(distill, precision=precision))

    def load_base(self, *, dtype: str | None = None, device: str = "auto", **changes: Any) -> ChatModel:
        """Load the base anew, or copy the open model. "auto" is the precision of its files.

        With a `dtype` it is loaded without quantization. `changes` replace settings of the model's source.
        """
        if isinstance(self.model, str):
            source = self.recipe.source | changes
            if dtype is not None:
                source["quantize"] = None
            return load_model(self.model, dtype=dtype or self.settled.dtype, device=device, **source)
        copied = self.model.copy()
        if dtype not in (None, "auto"):
            cast_weights(copied.model, as_dtype(dtype))
        return copied if device == "auto" else replace(copied, model=copied.model.to(device))

    def load_direction(self, base: ChatModel) -> Direction:
        """Load the direction of stage 1, checked against the base."""
        return Direction.load(self.path / "direction.safetensors", base)

    def load_tokens(self) -> TokenSet:
        """Load the safety tokens of stage 2."""
        return TokenSet.load(self.path / "tokens.json")

    def load_teacher(self, base: ChatModel) -> Teacher:
        """Load what stages 1 and 2 found: the teacher and S."""
        return Teacher(base, self.load_direction(base), self.load_tokens())

    def load_student(self) -> ChatModel:
        """Load the model that stage 4 exported, rounded and placed as the base that it is compared with."""
        dtype = weight_dtype(self.model.model) if isinstance(self.model, ChatModel) else self.settled.dtype
        alike = {name: self.recipe.source[name] for name in ALIKE}
        device = "auto" if self.recipe.device_map else str(self.device)
        return load_model(str(self.path / "model"), dtype=dtype, device=device, **alike)

    def load_answers(self) -> list[dict]:
        """Load the answers of stage 5."""
        return json_lines(self.path / "answers.jsonl")

    def say(self, text: object) -> None:
        """Print one line about the running stage."""
        self.console.print(f"  {text}", highlight=False, markup=False)

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Show a bar on the run's console; the function that it gives takes the share done."""
        return progress_bar(title, self.console)


def model_source(model: str | Path | ModelLike, recipe: Recipe) -> str | ChatModel:
    """Return the name of a model that is loaded, or the open model.

    Raises:
        SafeSteerError: For settings of loading and an open model.
    """
    if isinstance(model, str | Path):
        return str(model)
    if recipe.template or recipe.template_args or recipe.quantize or recipe.device_map:
        raise SafeSteerError(
            "template, template_args, quantize and device_map are settings of a model that is loaded by name:"
            " give them to load_model, or pass the name."
        )
    return as_chat(model)


def check_base(run: Run, base: ChatModel, *, trains: bool) -> None:
    """Raise SafeSteerError for a base that cannot train, or not as the recipe says.

    Args:
        run: The run.
        base: Its base.
        trains: Whether stages 3 and 4 are to run, which load the base once more.
    """
    recipe, opened = run.recipe, isinstance(run.model, ChatModel)
    if not trains:
        return
    require_adapter(base.model, recipe.distill)
    if is_quantized(base.model) and not recipe.quantize:
        raise SafeSteerError(
            f"The export needs the weights of '{base.name}' as they were before they were quantized: pass"
            " the name of an unquantized model, and the setting quantize=4bit."
        )
    if opened:
        require_together(base.model)
    if not recipe.distill.lora_rank:
        require_trainable(base.model.parameters())


def identity(run: Run, base: ChatModel) -> dict:
    """Return what must agree for a folder to be continued."""
    return {
        "model": run.model_name,
        "fingerprint": base.fingerprint,
        "weights": weights_hash(base.model),
        "judge": judge_identity(run.judge),
        "recipe": json.loads(json.dumps(asdict(run.settled)), parse_constant=str),  # JSON has no infinity
        "prompts_hash": run.prompts.hash,
        "template_hash": template_hash(base.tokenizer),
    }


def open_run(run: Run, base: ChatModel) -> None:
    """Write the manifest and the recipe of a new run, or check those of an earlier one.

    Raises:
        SafeSteerError: If the folder holds a run with other settings, or something else.
    """
    manifest, ours = run.path / MANIFEST, identity(run, base)
    if manifest.exists():
        theirs = read_json(manifest)
        different = [k for k, v in ours.items() if theirs.get(k) != v]
        if different:
            raise SafeSteerError(
                f"{run.path} holds a run with another {', '.join(different)}: choose another folder,"
                " or delete it to start again."
            )
        return
    if any(p.name not in (".lock", RECIPE) for p in run.path.iterdir()):
        raise SafeSteerError(f"{run.path} is not empty and holds no SafeSteer run: choose another folder.")
    packages = ["torch", "transformers", "transformer-lens", "safetensors"]
    packages += ["bitsandbytes"] if run.recipe.quantize else []
    versions = {n: version(n) for n in packages}
    run.recipe.save(run.path / RECIPE)
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


def is_due(run: Run, stage: str) -> bool:
    """Say whether a stage is still to be done.

    Raises:
        SafeSteerError: Where the weights that it reads are not those that the run has made.
    """
    earlier = NEEDS.get(stage)
    if finished(run, stage):
        return False
    if earlier is not None and not finished(run, earlier):
        raise SafeSteerError(
            f"{run.path} does not hold what its stage {earlier} has written, and the stage {stage} reads it:"
            f" run the stage {earlier} first."
        )
    return True


def finished(run: Run, stage: str) -> bool:
    """Say whether every file of the stage is there with the hash it was recorded with."""
    done = read_json(run.path / MANIFEST)["stages"].get(stage)
    if done is None:
        return False
    files = [(run.path / name, recorded) for name, recorded in done["files"].items()]
    return all(path.is_file() and digest(path) == recorded for path, recorded in files)


def record_stage(run: Run, stage: str, written: list[str], seconds: float) -> None:
    """Write a finished stage into the manifest; later stages, made from its old files, leave it."""
    manifest = read_json(run.path / MANIFEST)
    peak_mb = _peak_memory() / 2**20
    manifest["stages"][stage] = {
        "seconds": round(seconds, 1),
        "peak_mb": round(peak_mb),
        "files": {name: digest(run.path / name) for name in written},
    }
    for later in STAGES[STAGES.index(stage) + 1 :]:
        manifest["stages"].pop(later, None)
    write_json(run.path / MANIFEST, manifest)


def renew_card(run: str | Path, robust: pd.DataFrame) -> None:
    """Write what the suite "robust" has measured on a run's student into its model card, if it has one.

    Args:
        run: The run folder.
        robust: What `run_suite(run, "robust")` returned.

    Raises:
        SafeSteerError: While another process is at work in the folder.
    """
    folder = Path(run) / "model"
    if (folder / CARD).exists():
        with locked(Path(run)):
            before = digest(folder / CARD)
            renew_robustness(folder, robust)
            _record_again(Path(run), f"model/{CARD}", before)


def _record_again(run: Path, name: str, before: str) -> None:
    """Record a file that was changed on purpose, where it was recorded with the hash that it had before."""
    manifest = read_json(run / MANIFEST)
    for stage in manifest.get("stages", {}).values():
        if stage["files"].get(name) == before:
            stage["files"][name] = digest(run / name)
    write_json(run / MANIFEST, manifest)


def _peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
