"""Take home: a plain Hugging Face folder with a model card, and proof that it reloads equal.

The student is a plain model, so export is one `save_pretrained`. It is written beside the target and
renamed, and `check_reload` compares logits in a fresh process. The student's own lie in `probe.json`: loaders
take every file of weights in a folder for a part of the model.
"""

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, cast

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from safesteer._clock import timed
from safesteer._errors import SafeSteerError
from safesteer._files import read_json, whole_folder, write_text
from safesteer._version import __version__
from safesteer.evaluation.scores import Scores
from safesteer.evaluation.targets import load_target, require_run
from safesteer.judges.judge import Judge, judge_name
from safesteer.judges.sentences import declines
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import last_logits
from safesteer.models.gguf import is_gguf
from safesteer.models.loading import load_model
from safesteer.models.mixing import between
from safesteer.models.named import NAMED
from safesteer.models.parts import hf_model, is_bridge, is_quantized
from safesteer.models.placement import is_offloaded
from safesteer.models.precision import in_precision, weight_dtype
from safesteer.models.quiet import quiet_transformers
from safesteer.report.dial_figure import DIAL_FILE
from safesteer.report.robust_table import STARTS, robustness_line
from safesteer.report.set_table import set_summary
from safesteer.steering.direction import Direction

PROBE = ("What is the capital of France?", "Tell me how rainbows form.")
PROBE_FILE, CARD = "probe.json", "README.md"
TOLERANCE = 1e-4  # of a logit, in float32
_QUANTIZED = """
- The weights in this folder are not quantized; those that were trained and measured were. An adapter was
  trained on the base in 4 bits (nf4) and then merged into the base's own weights. For the numbers above base,
  teacher and this model were loaded in 4 bits. As it is here the model answers otherwise, by what that
  rounding moves, which was not measured."""


def export(student: ModelLike, folder: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
    """Save model and tokenizer (chat template included) as one folder, complete or not at all.

    Args:
        student: The trained model: a ChatModel, (model, tokenizer), or a bridge, whose plain model is saved.
        folder: The folder to write; one that is there is replaced.
        dtype: Precision of the saved weights, as a torch dtype or its name; None: the student's own.

    Raises:
        SafeSteerError: If the model still carries an adapter, its weights are quantized, its logits are not
            finite, or the folder cannot be written.

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
    if is_quantized(student.model):
        raise SafeSteerError(
            "The student's weights are quantized, and an export is not: load the model without quantize, and"
            " merge its adapter into that (`align` does)."
        )
    precision = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with whole_folder(folder) as work, in_precision(student.model, precision):
        logits = _probe_logits(student)
        if not bool(logits.isfinite().all()):
            raise SafeSteerError("The student's logits are not finite, so nothing is exported.")
        with quiet_transformers():
            # Of offloaded weights one file at a time is in memory.
            size = {"max_shard_size": "5GB"} if is_offloaded(student.model) else {}
            cast(Any, hf_model(student.model)).save_pretrained(work, **size)
            student.tokenizer.save_pretrained(work)
        name = str(weight_dtype(student.model)).removeprefix("torch.")
        probe = {"prompts": PROBE, "dtype": name, "logits": logits[:, 0].tolist()}
        write_text(work / PROBE_FILE, json.dumps(probe, allow_nan=False))


def _probe_logits(chat: ChatModel) -> torch.Tensor:
    """Compute first-token logits on a few prompts."""
    batches = [PromptBatch.of(chat.tokenizer, [prompt], device=chat.device) for prompt in PROBE]
    return torch.cat([last_logits(chat, batch) for batch in batches]).float().cpu()


def reload_difference(folder: Path, **options: Any) -> float:
    """Return the largest absolute logit difference between the exported folder and the student."""
    probe = _read_probe(folder)
    loaded = load_model(str(folder), dtype=probe["dtype"], device="cpu", **options)
    return float((_probe_logits(loaded)[:, 0] - torch.tensor(probe["logits"])).abs().max())


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
    earlier = (folder / PROBE_FILE).is_file() and folder.resolve() != (run / "model").resolve()
    if folder.exists() and not earlier:
        raise SafeSteerError(f"{folder} exists and would be replaced: choose another folder.")
    trust = bool(read_json(run / "manifest.json").get("recipe", {}).get("trust_remote_code", False))
    models = load_target(run, run)
    stored = _read_probe(run / "model")["dtype"]
    with between(models["base"], models["student"], strength) as student:
        export(student, folder, dtype=stored)
    write_text(folder / CARD, _card_at(card.read_text(encoding="utf-8"), run, strength))
    check_reload(folder, trust_remote_code=trust)
    return folder


def _card_at(card: str, run: Path, strength: float) -> str:
    """Add to the student's card which strength the weights have, and what was measured there."""
    lines = [
        "## Strength\n",
        f"The weights of this folder are base + {strength:g} x (trained - base): strength {strength:g}, where"
        " 0 is the base and 1 the trained model. **The numbers below are those of strength 1.**",
    ]
    table = pd.read_csv(run / DIAL_FILE) if (run / DIAL_FILE).is_file() else pd.DataFrame({"strength": []})
    rows = table[(table.strength - strength).abs() < 1e-9]
    if rows.empty:
        lines.append("This strength was not measured (`safesteer evaluate RUN --dial` measures some).")
    for row in rows.itertuples():
        lines.append(
            f"At strength {strength:g}, on {row.n} val pairs: {row.counts} {row.harmful:.1%} of harmful and"
            f" {row.over_refusal:.1%} of harmless prompts, KL to base {row.kl:.3f} nats per token."
        )
    return card.replace("\n## ", "\n" + "\n".join(lines) + "\n\n## ", 1)


def _commit(base: ChatModel) -> str | None:
    """Return the commit of a model that came from the Hub; None: it came from elsewhere."""
    return getattr(hf_model(base.model).config, "_commit_hash", None)


def _rounding(base: ChatModel) -> str:
    """Say where the base's weights are rounded ones."""
    if base.name in NAMED and _commit(base) is None:
        return f" ({NAMED[base.name].weights}, dequantized: not those of the Hub)"
    if is_quantized(base.model):
        return " (in 4 bits, nf4, while it was trained and measured)"
    return " (weights of a GGUF file, dequantized)" if is_gguf(base.name) else ""


def _origin(base: ChatModel) -> dict[str, str]:
    """Return what is known of the base: its id on the Hub, and its licence as its own card states it."""
    if base.name in NAMED:
        return {"base_model": NAMED[base.name].base_model, "license": NAMED[base.name].license}
    commit = _commit(base)
    try:
        card = (
            hf_hub_download(base.name, "README.md", revision=commit) if commit else f"{base.name}/README.md"
        )
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):  # no card, or no network
        data = {}
    known = {k: v for k, v in data.items() if k in ("license", "license_name", "license_link") and v}
    return known | ({"base_model": base.name} if commit else {})


def _set_table(sets: pd.DataFrame | None) -> str:
    """Write the rates on other prompts as a Markdown table."""
    if sets is None or sets.empty:
        return "Prompts of other forms, or of other people, were not measured."
    lines = ["| prompts | kind | n | base | this model | answers that repeat themselves: base, this model |"]
    lines.append("|---|---|---|---|---|---|")
    for row in set_summary(sets).to_dict("records"):
        rates = f"{row['base']:.1%} | {row['student']:.1%}"
        repeats = f"{row['base repeats']:.1%}, {row['student repeats']:.1%}"
        lines.append(f"| {row['name']} | {row['kind']} | {row['n']} | {rates} | {repeats} |")
    return "\n".join(lines)


def write_card(
    folder: Path,
    base: ChatModel,
    direction: Direction,
    recipe: str,
    scores: dict[str, Scores],
    sets: pd.DataFrame | None = None,
    judge: Judge = declines,
    robust: pd.DataFrame | None = None,
) -> None:
    """Write the model card: metadata for the Hub, how it was made, what was measured, what was not.

    Args:
        folder: The exported model.
        base: The model that was aligned. Metadata names it where it came from the Hub.
        direction: The direction that steered the teacher.
        recipe: The settings of the run, as a recipe file.
        scores: Scores by model; not empty.
        sets: What `score_sets` says of other prompts; None: nothing.
        judge: The judge that they were made with.
        robust: The table of the suite "robust" on these very weights; None: it was not measured.
    """
    rows = [
        f"| {name} | {s.refusal_rate_harmful:.1%} ({s.refusal_rate_harmful_ci[0]:.1%} to"
        f" {s.refusal_rate_harmful_ci[1]:.1%}) | {s.refusal_rate_harmless:.1%}"
        f" ({s.refusal_rate_harmless_ci[0]:.1%} to {s.refusal_rate_harmless_ci[1]:.1%}) |"
        f" {s.kl_harmless:.3f} | {s.perplexity:.2f} |"
        for name, s in scores.items()
    ]
    by_wording = (
        "Refusals are recognized by the wording of an answer's sentences, in English: whether an answer that"
        " does not refuse is harmful was not judged."
    )
    origin, first = _origin(base), next(iter(scores.values()))
    metadata = ModelCardData(
        base_model=origin.get("base_model"),
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        pipeline_tag="text-generation",
        library_name="transformers",
        tags=["safesteer", "safety", "localized-distillation"],
    )
    text = (resources.files("safesteer") / "model_card.md").read_text(encoding="utf-8")
    filled = Template(text).substitute(
        metadata=metadata.to_yaml(),
        base=origin.get("base_model", Path(base.name).name),
        weights=_rounding(base),
        version=__version__,
        extraction=direction.extraction,
        layer=direction.layer,
        coeff=f"{direction.coeff:g}",
        prompts=direction.prompts_hash,
        n=first.n,
        counts=first.counts,
        quantized=_QUANTIZED if is_quantized(base.model) else "",
        judged=by_wording if judge is declines else f"Answers are judged by `{judge_name(judge)}`.",
        rows="\n".join(rows),
        sets=_set_table(sets),
        robustness=robustness_line(robust),
        recipe=recipe.rstrip(),
    )
    write_text(folder / CARD, filled)


def renew_robustness(folder: Path, robust: pd.DataFrame) -> None:
    """Put what the suite "robust" has measured into the card that `write_card` wrote.

    Args:
        folder: The exported model.
        robust: The suite's table.
    """
    card, line = (folder / CARD).read_text(encoding="utf-8"), robustness_line(robust)
    write_text(folder / CARD, re.sub(rf"^{STARTS}\b.*$", lambda _: line, card, count=1, flags=re.M))
