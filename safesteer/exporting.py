"""Take home: a plain Hugging Face folder with a model card, and proof that it reloads equal.

The student is a plain model, so export is one `save_pretrained`. It is written beside the target and
renamed, and `check_reload` compares logits in a fresh process.
"""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from string import Template

import torch

from safesteer._errors import SafeSteerError
from safesteer._files import read_tensors, whole_folder, write_tensors, write_text
from safesteer._version import __version__
from safesteer.evaluation.scores import Scores
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import last_logits
from safesteer.models.loading import load_model, quiet_transformers
from safesteer.models.parts import hf_model, is_bridge
from safesteer.steering.direction import Direction

PROBE = ("What is the capital of France?", "Tell me how rainbows form.")


def export(student: ModelLike, folder: str | Path) -> None:
    """Save model and tokenizer (chat template included) as one folder, complete or not at all.

    Args:
        student: The trained model: a ChatModel, (model, tokenizer), or a bridge, whose plain model is saved.
        folder: The folder to write; one that is there is replaced.

    Raises:
        SafeSteerError: If the model still carries an adapter, or the folder cannot be written.

    Example:
        >>> ss.export(chat, folder / "my-model")
        >>> ss.check_reload(folder / "my-model") < 1e-4
        True
    """
    student, folder = as_chat(student), Path(folder)
    if is_bridge(student.model):
        student = student.copy()
    if hf_model(student.model) is not student.model:
        raise SafeSteerError("The student still carries an adapter: merge it first (models.adapter.merged).")
    with whole_folder(folder) as work:
        with quiet_transformers():
            hf_model(student.model).save_pretrained(work)
            student.tokenizer.save_pretrained(work)
        logits = _probe_logits(student)
        write_tensors(work / "probe.safetensors", {"logits": logits}, {"prompts": list(PROBE)})


def _probe_logits(chat: ChatModel) -> torch.Tensor:
    """Compute first-token logits on a few prompts."""
    batches = [PromptBatch.of(chat.tokenizer, [prompt], device=chat.device) for prompt in PROBE]
    return torch.cat([last_logits(chat, batch) for batch in batches]).float().cpu()


def reload_difference(folder: Path) -> float:
    """Return the largest absolute logit difference between the exported folder and the student."""
    tensors, _ = read_tensors(folder / "probe.safetensors")
    return float((_probe_logits(load_model(str(folder), device="cpu")) - tensors["logits"]).abs().max())


def check_reload(folder: str | Path, tolerance: float = 1e-4) -> float:
    """Reload an exported model in a fresh process and compare its logits with the student's.

    Args:
        folder: What `export` wrote.
        tolerance: Largest absolute difference of logits that is allowed.

    Returns:
        The largest absolute difference.

    Raises:
        SafeSteerError: If the model does not load, or differs by more than `tolerance`.
    """
    code = (
        "import sys; from pathlib import Path; from safesteer.exporting import reload_difference;"
        " print('difference', reload_difference(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise SafeSteerError(f"The exported model in {folder} does not load: {reason}")
    difference = float(done.stdout.split("difference")[-1])
    if difference > tolerance:
        raise SafeSteerError(
            f"The exported model in {folder} differs from the trained student by {difference:.2g} in"
            f" its logits (allowed: {tolerance:g})."
        )
    return difference


def write_card(
    folder: Path, base: str, direction: Direction, settings: dict, scores: dict[str, Scores]
) -> None:
    """Write the model card: how it was aligned, what was measured, where it still fails."""
    rows = [
        f"| {name} | {s.refusal_rate_harmful:.1%} ({s.refusal_rate_harmful_ci[0]:.1%} to"
        f" {s.refusal_rate_harmful_ci[1]:.1%}) | {s.refusal_rate_harmless:.1%}"
        f" ({s.refusal_rate_harmless_ci[0]:.1%} to {s.refusal_rate_harmless_ci[1]:.1%}) |"
        f" {s.kl_harmless:.3f} | {s.perplexity:.2f} |"
        for name, s in scores.items()
    ]
    text = (resources.files("safesteer") / "model_card.md").read_text(encoding="utf-8")
    filled = Template(text).substitute(
        base=base,
        version=__version__,
        extraction=direction.extraction,
        layer=direction.layer,
        coeff=f"{direction.coeff:g}",
        n=next(iter(scores.values())).n if scores else 0,
        rows="\n".join(rows),
        settings=json.dumps(settings, indent=1),
    )
    write_text(folder / "README.md", filled)
