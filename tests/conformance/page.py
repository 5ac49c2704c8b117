"""Write docs/models.md: family by function, with the sentence of every refusal."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from conformance.families import REAL, VARIANTS
from conformance.results import Outcome, Result

# Columns of the page: what a user calls it, and the checks behind it.
FUNCTIONS = {
    "logits": ("logits",),
    "batches": ("batches", "answers"),
    "directions": ("extraction",),
    "add, clamp": ("add", "clamp"),
    "gate": ("gate",),
    "ablate": ("ablate",),
    "sweep": ("scores",),
    "S": ("selection",),
    "distill": ("loss", "step"),
    "export": ("export",),
    "bridge": ("bridge",),
}
HEAD = """# Models

Which functions are right on which models. Each row is a tiny random model with the family's own code in
transformers {version}, three layers and widths cut to 32: its numbers are compared with the model's own
forward pass on one prompt, without padding and without a cache, and losses and gradients with float64.
Weights are random, so the page shows that the computation is right, not that a direction does anything in a
trained model. `make conformance` measures it anew, in about {minutes} minutes.

- **yes**: right.
- **slower**: right by a slower way, because the model has not earned a short cut: prompts do not share
  columns, a prompt is read again for every sample, or answers are decoded without a cache.
- **no (number)**: refused, with the sentence of that number below the tables.

{counts}

The bridge is TransformerLens's: families that it does not know are used as plain models, in every function.

## What is checked when a model is loaded

`load_model` compares on a few tokens, and `chat.check()` shows the table: our logits with the model's own
(which finds the factor and the soft cap that families put on them), a padded batch with single prompts, the
layout that computes common columns once, a cache that is repeated, and cached with uncached decoding. What
fails is done in a slower way that is right. What a block writes to the residual stream is measured when
`ablate` first needs it: where no sum of a block's parts gives the block's change, `ablate` says so.

"""
NAMED = """## Models by name

What is expected of models that people use, from tiny models of their published settings: attention pattern,
rotary scaling, experts, tied or untied head. Layers, widths, experts and vocabulary are cut, and a window
is cut to 8 tokens so that prompts are longer than it.
"""


def write_page(path: Path, results: Sequence[Result], version: str, minutes: int) -> None:
    """Write the page of all results."""
    built = [r for r in results if not r.not_built]
    reasons: dict[str, int] = {}
    lines = [HEAD.format(version=version, minutes=minutes, counts=_counts(built))]
    for title, chosen in (
        (NAMED, [r for r in built if r.name in REAL]),
        ("## Families\n", [r for r in built if r.name not in REAL]),
    ):
        lines += [
            title,
            f"| model | class | {' | '.join(FUNCTIONS)} |",
            "|---|---|" + "---|" * len(FUNCTIONS),
        ]
        lines += [*(_row(result, reasons) for result in chosen), ""]
    lines += ["## Why not", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## Not measured", "", "| family | why |", "|---|---|"]
    lines += [f"| {r.name} | {_escaped(r.not_built)} |" for r in results if r.not_built]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _counts(built: Sequence[Result]) -> str:
    """Say for how many families each function is right."""
    lines = ["| function | right | refused | wrong |", "|---|---|---|---|"]
    for function, checks in FUNCTIONS.items():
        outcomes = Counter(_worst(r, checks).outcome for r in built)
        n_wrong = outcomes["wrong"] + outcomes["crash"]
        lines.append(
            f"| {function} | {outcomes['right']} of {len(built)} | {outcomes['refused']} | {n_wrong} |"
        )
    return "\n".join(lines)


def _worst(result: Result, checks: Sequence[str]) -> Outcome:
    """Return the first outcome that is not right."""
    outcomes = [o for o in result.outcomes if o.check in checks]
    return next((o for o in outcomes if o.outcome != "right"), outcomes[0])


def _row(result: Result, reasons: dict[str, int]) -> str:
    slower = not all(passed for check, passed, _ in result.earned if check != "writes")
    cells = []
    for function, checks in FUNCTIONS.items():
        outcome = _worst(result, checks)
        if outcome.outcome == "right":
            cells.append("slower" if slower and function not in ("logits", "export", "bridge") else "yes")
        elif outcome.outcome == "refused":
            reason = outcome.reason.replace(result.kind, "the model")
            reason = reason[:1].upper() + reason[1:]
            cells.append(f"no ({reasons.setdefault(_escaped(reason), len(reasons) + 1)})")
        else:
            cells.append("**wrong**")
    spoken = result.name in VARIANTS or result.name in REAL or "(" in result.name
    name = result.name if spoken else f"`{result.name}`"
    return f"| {name} | {result.kind} | {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
