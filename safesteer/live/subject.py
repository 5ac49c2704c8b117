"""Open what the live lens looks at, from a run folder or a model.

A run folder has everything. A model alone gets the direction and the tokens that are given, or those of
stages 1 and 2 with small settings, which take a minute or two on a small machine.
"""

from pathlib import Path

from safesteer._errors import SafeSteerError
from safesteer.attribution.result import Attribution
from safesteer.directions.finding import find_direction
from safesteer.evaluation.targets import load_target
from safesteer.live.reading import Subject
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.loading import best_device, load_model
from safesteer.models.precision import settled_precision
from safesteer.report.reader_figures import READER_FILE
from safesteer.steering.direction import Direction
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenSet


def open_subject(target: str | Path | ModelLike, *, dtype: str = "auto") -> Subject:
    """Open a run folder with all that it holds so far, or a model by name.

    Args:
        target: A run folder with a direction and safety tokens, a model's name or folder, or an open model.
        dtype: Precision of base and student, where they are loaded here; "auto": the fast one of the machine.

    Raises:
        SafeSteerError: For a run folder whose direction or safety tokens are missing, or whose base has
            other weights by now.
    """
    dtype = settled_precision(dtype, best_device())
    if isinstance(target, str | Path) and (Path(target) / "manifest.json").is_file():
        return _of_run(Path(target), dtype)
    chat = load_model(str(target), dtype=dtype) if isinstance(target, str | Path) else as_chat(target)
    direction = find_direction(chat)
    return Subject(chat, direction, select_tokens(chat, direction))


def _of_run(run: Path, dtype: str) -> Subject:
    """Open the files of a run folder; those of later stages may be missing."""
    for name, stage in {"direction.safetensors": "direction", "tokens.json": "tokens"}.items():
        if not (run / name).is_file():
            raise SafeSteerError(
                f"{run} has no {name} yet: go on with safesteer {stage}, or safesteer align."
            )
    models = load_target(run, run, dtype)
    base = models["base"]
    reader = HarmfulnessReader.load(run / READER_FILE, base) if (run / READER_FILE).is_file() else None
    told, tokens = run / "attribution.json", TokenSet.load(run / "tokens.json")
    tokens.check(base)
    return Subject(
        base,
        Direction.load(run / "direction.safetensors", base),
        tokens,
        models.get("student"),
        reader,
        Attribution.load(told).stories if told.is_file() else {},
    )
