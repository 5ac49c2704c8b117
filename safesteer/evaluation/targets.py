"""What is measured: the base and the student of a run folder, or one model."""

from pathlib import Path
from typing import Any

import torch

from safesteer._errors import SafeSteerError
from safesteer._files import read_json
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.generation import generate
from safesteer.models.hashing import weights_hash
from safesteer.models.loading import load_model
from safesteer.models.precision import weight_dtype
from safesteer.prompts.prompt_set import load_prompts
from safesteer.settings import ALIKE, MODEL_SOURCE

PROBE = ("What is the capital of France?", "Tell me how rainbows form.")  # by which a model is recognised
N_HARMFUL = 4  # beside them, of the split that directions are read from: a gate may open on these alone


def run_of(target: str | Path | ModelLike) -> Path | None:
    """Return the target if it is a run folder with a trained model, None for a model.

    Raises:
        SafeSteerError: For a run folder without a trained model.
    """
    if not isinstance(target, str | Path) or not (Path(target) / "manifest.json").is_file():
        return None
    if not (Path(target) / "model" / "config.json").is_file():
        raise SafeSteerError(f"{target} has no exported model yet: finish the run with safesteer align.")
    return Path(target)


def require_run(target: str | Path) -> Path:
    """Return the run folder; raises SafeSteerError for anything else."""
    run = run_of(target)
    if run is None:
        raise SafeSteerError(f"{target} is not a run folder: it has no manifest.json.")
    return run


def load_target(
    target: str | Path | ModelLike, run: Path | None, dtype: str | None = None
) -> dict[str, ChatModel]:
    """Load the models that are measured, by the names of the tables: base and student, or model.

    Args:
        target: The model, where there is no run.
        run: A run folder, whose base is loaded, and its student where training has ended.
        dtype: Their precision; None: the run's own, in which they were measured.

    Raises:
        SafeSteerError: If the run's base is no longer what it was.
    """
    if run is not None:
        manifest = read_json(run / "manifest.json")
        settings = manifest.get("recipe", {})
        source = {name: settings[name] for name in MODEL_SOURCE if name in settings}
        alike = {name: source[name] for name in ALIKE if name in source}
        precision: str = dtype or settings.get("dtype", "float32")  # what was rounded then is rounded alike
        base = load_model(manifest["model"], dtype=precision, **source)
        through = torch.float16 if settings.get("dtype") == "float16" else None
        if manifest.get("weights", hashed := weights_hash(base.model, through=through)) != hashed:
            raise SafeSteerError(
                f"'{manifest['model']}' has other weights than the base that {run} began with: nothing can be"
                " measured against it. Put those weights back (for a model of the Hub --revision at align)."
            )
        if not (run / "model" / "config.json").is_file():
            return {"base": base}
        return {"base": base, "student": load_model(str(run / "model"), dtype=precision, **alike)}
    return {"model": load_model(str(target)) if isinstance(target, str | Path) else as_chat(target)}


def acting_on(chat: ChatModel) -> dict[str, Any]:
    """Describe what makes a model answer as it does, beside the values of its weights.

    That is their precision, the scales of adapters, how many hooks there are (steering), and the model's
    first words to a few harmful prompts of the split "train".
    """
    modules = list(chat.model.modules())
    scales = {v for m in modules if isinstance(s := getattr(m, "scaling", None), dict) for v in s.values()}
    prompts = load_prompts().split("train").across(N_HARMFUL).harmful
    return {
        "precision": str(weight_dtype(chat.model)),
        "adapter scales": sorted(scales),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "first words": generate(chat, prompts, max_new_tokens=8),
    }
