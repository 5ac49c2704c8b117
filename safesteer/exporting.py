"""Take home: a plain Hugging Face folder with a model card, and proof that it reloads equal.

The student is a plain model, so export is one `save_pretrained`. It is written beside the target and
renamed, and `check_reload` compares logits in a fresh process. The student's own lie in `probe.json`: loaders
take every file of weights in a folder for a part of the model.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from safesteer._clock import timed
from safesteer._errors import SafeSteerError, first_line
from safesteer._files import locked, read_json, whole_folder, write_json, write_text
from safesteer.evaluation.targets import PROBE, load_target, require_run
from safesteer.model_card import CARD, card_at
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import last_logits
from safesteer.models.loading import load_model
from safesteer.models.mixing import between
from safesteer.models.parts import hf_model, is_adapted, is_bridge, is_quantized
from safesteer.models.passes import bare
from safesteer.models.placement import is_offloaded
from safesteer.models.precision import as_dtype, in_precision, weight_dtype
from safesteer.models.quiet import quiet_transformers

PROBE_FILE = "probe.json"
TOLERANCE = 1e-4  # of a logit, in float32
MOST = 0.95  # of the change of the weights: an export that keeps less says so


def export(
    student: ModelLike,
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    card: str | None = None,
    replace: bool = False,
) -> None:
    """Save model and tokenizer (chat template included) as one folder, complete or not at all.

    Args:
        student: The trained model: a ChatModel, (model, tokenizer), or a bridge, whose plain model is saved.
        folder: The folder to write; an empty one and an earlier export are replaced.
        dtype: Precision of the saved weights, as a torch dtype or its name; None: the student's own.
        card: Text of a model card (README.md); None: no card.
        replace: Replace the folder whatever it holds.

    Raises:
        SafeSteerError: If the model still carries an adapter, its weights are quantized, its logits are not
            finite, its generation_config is not valid, or the folder holds something else or cannot be
            written.

    Example:
        >>> ss.export(chat, folder / "my-model")
        >>> ss.check_reload(folder / "my-model") < 1e-4
        True
    """
    student, folder = as_chat(student), Path(folder)
    if is_bridge(student.model):
        student = student.copy()
    if is_adapted(student.model):
        raise SafeSteerError("The student still carries an adapter: merge it first (models.adapter.merged).")
    if is_quantized(student.model):
        raise SafeSteerError(
            "The student's weights are quantized, and an export is not: load the model without quantize, and"
            " merge its adapter into that (`align` does)."
        )
    precision = None if dtype is None else as_dtype(dtype)
    if not replace:
        _require_free(folder)
    try:
        with whole_folder(folder) as work, in_precision(student.model, precision):
            _write(student, work)
            if card is not None:
                write_text(work / CARD, card)
    except OSError as error:
        raise SafeSteerError(f"{folder} cannot be written: {error.strerror or error}.") from error


@torch.no_grad()
def rounding_note(base: ChatModel, student: ChatModel, dtype: torch.dtype | str) -> str:
    """Say how much of what training changed is left in weights of `dtype`; "" for nearly all of it.

    That share is the rounded change, projected on the change. Small steps from weights that bfloat16 holds
    exactly are rounded back to them. Quantized and offloaded weights are left out.
    """
    before, kind = dict(hf_model(base.model).named_parameters()), as_dtype(dtype)
    if kind == torch.float32:  # what trains has it
        return ""
    left = changed = 0.0
    for name, weight in hf_model(student.model).named_parameters():
        start = before.get(name)
        if start is not None and start.shape == weight.shape and not (start.is_meta or weight.is_meta):
            start = start.to(weight)
            change, rounded = weight - start, weight.to(kind).to(weight) - start
            left += float((change * rounded).sum(dtype=torch.float64))
            changed += float((change * change).sum(dtype=torch.float64))
    if left >= MOST * changed:
        return ""
    name = str(kind).removeprefix("torch.")
    return f"{left / changed:.0%} of what training changed is left in {name}: export.dtype=float32 keeps all"


def _require_free(folder: Path) -> None:
    """Raise SafeSteerError for a folder that holds anything but an earlier export."""
    known = folder.is_dir() and ((folder / PROBE_FILE).is_file() or not any(folder.iterdir()))
    if folder.exists() and not known:
        raise SafeSteerError(f"{folder} exists and would be replaced: choose another folder.")


def _write(student: ChatModel, work: Path) -> None:
    """Write the model, its tokenizer and the probe into a folder."""
    logits = _probe_logits(student)
    if not bool(logits.isfinite().all()):
        raise SafeSteerError("The student's logits are not finite, so nothing is exported.")
    with quiet_transformers():
        # Of offloaded weights one file at a time is in memory.
        size = {"max_shard_size": "5GB"} if is_offloaded(student.model) else {}
        try:
            cast(Any, hf_model(student.model)).save_pretrained(work, **size)
        except ValueError as error:  # one that was changed after loading is checked strictly
            raise SafeSteerError(
                f"The model cannot be written ({first_line(error)}): put its generation_config right."
            ) from error
        student.tokenizer.save_pretrained(work)
    _write_ends(work / "generation_config.json", student.eos_ids)
    name = str(weight_dtype(student.model)).removeprefix("torch.")
    probe = {"prompts": PROBE, "dtype": name, "logits": logits.tolist()}
    write_text(work / PROBE_FILE, json.dumps(probe, allow_nan=False))


def _write_ends(path: Path, eos_ids: list[int]) -> None:
    """Write every id that ended an answer here, so that answers end there elsewhere too.

    The end of a turn may come from the template alone: one that a base model was given, for instance.
    """
    config = read_json(path) if path.is_file() else {}
    ends = config.get("eos_token_id")
    if eos_ids and (ends if isinstance(ends, list) else [ends]) != eos_ids:
        write_json(path, config | {"eos_token_id": eos_ids})


def _probe_logits(chat: ChatModel, prompts: Sequence[str] = PROBE) -> Float[Tensor, "n d_vocab"]:
    """Compute first-token logits on a few prompts."""
    batches = [PromptBatch.of(chat.tokenizer, [prompt], device=chat.device) for prompt in prompts]
    with bare():  # of steering that is on nothing is exported
        return torch.cat([last_logits(chat, batch)[:, 0] for batch in batches]).float().cpu()


def reload_difference(folder: Path, **options: Any) -> float:
    """Return the largest absolute logit difference between the exported folder and the student."""
    probe = _read_probe(folder)
    loaded = load_model(str(folder), dtype=probe["dtype"], device="cpu", **options)
    return float((_probe_logits(loaded, probe["prompts"]) - torch.tensor(probe["logits"])).abs().max())


def _read_probe(folder: Path) -> dict[str, Any]:
    probe = read_json(folder / PROBE_FILE)
    if not isinstance(probe, dict) or not {"prompts", "dtype", "logits"} <= probe.keys():
        raise SafeSteerError(f"{folder / PROBE_FILE} is not a file that this version of SafeSteer wrote.")
    return probe


def _tolerance(folder: Path) -> float:
    """Return the difference that is rounding: in half precision one step of the largest logit."""
    probe = _read_probe(folder)
    if probe["dtype"] in ("float32", "float64"):
        return TOLERANCE
    largest = float(torch.tensor(probe["logits"]).abs().max())
    return largest * torch.finfo(getattr(torch, probe["dtype"])).eps


@timed("loading")
def check_reload(
    folder: str | Path,
    tolerance: float | None = None,
    *,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> float:
    """Reload an exported model in a fresh process, as it was written, and compare its logits.

    Args:
        folder: What `export` wrote.
        tolerance: Largest absolute difference of logits that is allowed; None: 1e-4 for weights in float32,
            one rounding step of the largest logit for weights in half precision.
        trust_remote_code: Run the code that the folder holds.
        device_map: "disk" leaves the blocks there, for a model that does not fit the CPU's memory.

    Returns:
        The largest absolute difference from the student in that precision.

    Raises:
        SafeSteerError: If the model does not load, or differs by more than `tolerance`.
    """
    folder = Path(folder)
    tolerance = _tolerance(folder) if tolerance is None else tolerance
    code = (
        "import json, sys; from pathlib import Path; from safesteer.exporting import reload_difference;"
        " print('difference', reload_difference(Path(sys.argv[1]), **json.loads(sys.argv[2])))"
    )
    options = {"trust_remote_code": trust_remote_code, "device_map": device_map}
    command = [sys.executable, "-c", code, str(folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise SafeSteerError(f"The exported model in {folder} does not load: {reason}")
    difference = float(done.stdout.split("difference")[-1])
    if not difference <= tolerance:
        raise SafeSteerError(
            f"The exported model in {folder} differs from the trained student by {difference:.2g} in"
            f" its logits (allowed: {tolerance:.2g})."
        )
    return difference


def export_strength(run: str | Path, strength: float, folder: str | Path | None = None) -> Path:
    """Write the model at a strength between the base and the student of a run, with a card that says so.

    Args:
        run: A finished run folder.
        strength: 0 is the base, 1 the student; `evaluation.dial` measures what lies between.
        folder: The folder to write; None: `model-STRENGTH` in the run folder.

    Returns:
        The folder, proven to reload.

    Raises:
        SafeSteerError: For a folder that is no finished run, or a strength that is negative or not finite.
    """
    if strength < 0:
        raise SafeSteerError("Below 0 lie models that refuse less than the base: they are not written.")
    run = require_run(run)
    card = run / "model" / CARD
    if not card.is_file():
        raise SafeSteerError(f"{run} has no model card yet: finish the run with safesteer align.")
    folder = Path(folder) if folder else run / f"model-{strength:g}"
    if folder.resolve() == (run / "model").resolve():
        raise SafeSteerError(f"{folder} exists and would be replaced: choose another folder.")
    _require_free(folder)
    trust = bool(read_json(run / "manifest.json").get("recipe", {}).get("trust_remote_code", False))
    stored = _read_probe(run / "model")["dtype"]
    models = load_target(run, run, dtype=stored)  # the run's passes may take less
    with locked(run):  # which clears away what a killed process left: never what another one is writing
        text = card_at(card.read_text(encoding="utf-8"), run, strength)
        with between(models["base"], models["student"], strength) as student:
            export(student, folder, dtype=stored, card=text)
    check_reload(folder, trust_remote_code=trust)
    return folder
