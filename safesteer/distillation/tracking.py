"""Live training records in a tracker, through accelerate: tensorboard, wandb, mlflow and others."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safesteer._errors import SafeSteerError


@contextmanager
def open_tracker(kind: str | None, folder: Path, settings: dict) -> Iterator[Callable[[dict, int], None]]:
    """Open a tracker and yield log(values, step). Files go to `folder`; None tracks nothing.

    With several processes the main one logs.

    Raises:
        SafeSteerError: If accelerate does not know the tracker, or it is not installed.
    """
    if kind is None:
        yield lambda values, step: None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if kind not in LOGGER_TYPE_TO_CLASS:
        raise SafeSteerError(f"There is no tracker '{kind}': use one of {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    if kind not in map(str, get_available_trackers()):
        raise SafeSteerError(f"Tracking with {kind} needs its package: pip install {kind}.")
    tracker_type = LOGGER_TYPE_TO_CLASS[kind]
    options = {"logging_dir": str(folder)} if tracker_type.requires_logging_directory else {}
    tracker = tracker_type("safesteer", **options)
    tracker.start()
    # One flat level of plain values, which every tracker takes.
    flat = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in settings.items()}
    tracker.store_init_configuration(flat)
    try:
        yield lambda values, step: tracker.log(values, step=step)
    finally:
        tracker.finish()
