"""The model card of an export: metadata for the Hub, how it was made, what was measured, what was not.

1. `write_card` fills the template `model_card.md` when a run has measured its student.
2. `card_at` adds what is known of a strength of the dial; `renew_robustness` the line of the suite "robust".
"""

import re
from importlib import resources
from pathlib import Path
from string import Template

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from safesteer._files import write_text
from safesteer._version import __version__
from safesteer.evaluation.scores import Scores
from safesteer.judges.judge import Judge, judge_name
from safesteer.judges.sentences import declines
from safesteer.models.chat_model import ChatModel
from safesteer.models.gguf import is_gguf
from safesteer.models.named import NAMED
from safesteer.models.parts import hf_model, is_quantized
from safesteer.models.templates import leaves_thinking_out
from safesteer.report.dial_figure import DIAL_FILE
from safesteer.report.robust_table import STARTS, robustness_line
from safesteer.report.set_table import set_summary
from safesteer.steering.direction import Direction

CARD = "README.md"
_QUANTIZED = """
- The weights in this folder are not quantized; those that were trained and measured were. An adapter was
  trained on the base in 4 bits (nf4) and then merged into the base's own weights. For the numbers above base,
  teacher and this model were loaded in 4 bits. As it is here the model answers otherwise, by what that
  rounding moves, which was not measured."""

_NOT_THINKING = """
- All numbers are of answers without thinking: the prompts were rendered with `enable_thinking=False`. With
  thinking, which this chat template switches on where nothing is said, nothing was measured."""


def card_at(card: str, run: Path, strength: float) -> str:
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
    except Exception:  # no card, no network, or metadata that YAML's parser refuses
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
    n, n_harmless = first.n_each
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
        n=n,
        n_harmless=n_harmless,
        counts=first.counts,
        quantized=_QUANTIZED if is_quantized(base.model) else "",
        thinking=_NOT_THINKING if leaves_thinking_out(base.tokenizer) else "",
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
