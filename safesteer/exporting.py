"""Take home: a plain Hugging Face folder with a model card, and proof that it reloads equal.

The student was never wrapped, so export is one `save_pretrained`. It is written beside the target
and renamed, and `check_reload` compares logits in a fresh process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from safesteer._errors import SafeSteerError
from safesteer._files import read_tensors, whole_folder, write_tensors, write_text
from safesteer._version import __version__
from safesteer.evaluation.scores import Scores
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, hf_model
from safesteer.models.forward import last_logits
from safesteer.models.loading import load_model, quiet_transformers
from safesteer.steering.direction import Direction

PROBE = ("What is the capital of France?", "Tell me how rainbows form.")


def export(student: ChatModel, folder: Path) -> None:
    """Save model and tokenizer (chat template included) as one folder, whole or not at all."""
    with whole_folder(folder) as work:
        with quiet_transformers():
            hf_model(student.model).save_pretrained(work)
            student.tokenizer.save_pretrained(work)  # type: ignore[attr-defined]
        logits = _probe_logits(student)
        write_tensors(work / "probe.safetensors", {"logits": logits}, {"prompts": list(PROBE)})


def _probe_logits(chat: ChatModel) -> torch.Tensor:
    batch = PromptBatch.of(chat.tokenizer, PROBE, device=chat.device)
    return last_logits(chat, batch).float().cpu()


def reload_difference(folder: Path) -> float:
    """Largest absolute logit difference between the exported folder and the trained student."""
    tensors, _ = read_tensors(folder / "probe.safetensors")
    return float((_probe_logits(load_model(str(folder), device="cpu")) - tensors["logits"]).abs().max())


def check_reload(folder: Path, tolerance: float = 1e-4) -> float:
    """Reload in a fresh process; raises SafeSteerError if logits differ by more than `tolerance`."""
    code = (
        "import sys; from pathlib import Path; from safesteer.exporting import reload_difference;"
        " print('difference', reload_difference(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ},
    )
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
    """The model card: how it was aligned, what was measured, where it still fails."""
    rows = [
        f"| {name} | {s.refusal_rate_harmful:.1%} ({s.refusal_rate_harmful_ci[0]:.1%} to"
        f" {s.refusal_rate_harmful_ci[1]:.1%}) | {s.refusal_rate_harmless:.1%}"
        f" ({s.refusal_rate_harmless_ci[0]:.1%} to {s.refusal_rate_harmless_ci[1]:.1%}) |"
        f" {s.kl_harmless:.3f} | {s.perplexity:.2f} |"
        for name, s in scores.items()
    ]
    n = next(iter(scores.values())).n if scores else 0
    write_text(
        folder / "README.md",
        f"""---
library_name: transformers
tags: [safesteer, safety, localized-distillation]
---

# {base}, aligned with SafeSteer

This model was made from `{base}` by localized on-policy distillation
([arXiv 2606.02530](https://arxiv.org/abs/2606.02530), SafeSteer {__version__}): a refusal direction
({direction.extraction}, resid_pre of layer {direction.layer}, coefficient {direction.coeff:g}) steers
the base into a teacher, and the model learned from that teacher on a few output tokens only.

## Measured

Greedy answers to {n} harmful and {n} matched harmless prompts that no choice was made on, 95 %
intervals. Refusals are recognised by their wording in English.

| model | refuses harmful | refuses harmless | KL to base (nats/token) | perplexity |
|---|---|---|---|---|
{chr(10).join(rows)}

## Limits

- Refusing is recognised by words at the start of an answer. Whether an answer that does not refuse
  is harmful was not judged, nor is a refusal proof of understanding.
- Jailbreaks, other languages, long conversations and system prompts of your own were not tested.
- Harmless requests are refused at the rate above; matched look-alikes are the hard case.
- The steering direction is dual-use: subtracted instead of added, it weakens refusals.

## Settings

```json
{json.dumps(settings, indent=1)}
```
""",
    )
