"""What a training folder holds: the weights and moments of the last checkpoint, and the history so far.

A checkpoint names what it belongs to: settings, S, prompts and direction. It is continued by a training with
the same ones alone.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from safesteer._errors import SafeSteerError
from safesteer._files import json_lines, write_json_lines
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import DistillState
from safesteer.distillation.step import StepRecord
from safesteer.prompts.prompt_set import PromptSet

CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.jsonl"


def resume(
    state: DistillState, teacher: Teacher, prompts: PromptSet, folder: Path | None
) -> tuple[list[StepRecord], dict[str, str]]:
    """Load what `folder` holds of this training; return its history and the stamp of its checkpoints.

    Raises:
        SafeSteerError: For a checkpoint that is damaged or of other settings, or a history that lacks steps.
    """
    settings = json.dumps(asdict(replace(state.config, sharded=False)), sort_keys=True)
    origin = (settings, json.dumps(asdict(teacher.tokens), sort_keys=True), prompts.hash)
    vector = teacher.direction.vector.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.sha256(repr((origin, teacher.direction.metadata)).encode() + vector)
    stamp = {"training": digest.hexdigest()[:32]}
    if folder is None or not (folder / CHECKPOINT).exists():
        return [], stamp
    state.load(folder / CHECKPOINT, stamp)
    rows: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        rows = json_lines(folder / HISTORY)[: state.step]
    if len(rows) < state.step:
        raise SafeSteerError(
            f"{folder / HISTORY} lacks steps of the checkpoint beside it: delete both to train again."
        )
    return [StepRecord(**row) for row in rows], stamp


def save(folder: Path, state: DistillState, stamp: dict[str, str], history: list[StepRecord]) -> None:
    """Write history and checkpoint. History first: it may run ahead of the checkpoint, never behind it."""
    writes = PartialState().is_main_process
    if writes:
        write_json_lines(folder / HISTORY, map(asdict, history))
    state.save(folder / CHECKPOINT, stamp, writes=writes)
