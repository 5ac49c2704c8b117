"""Tables of the test prompts on a model that refuses by itself (held_out.py), from their committed rows.

Base, gated steering without training, and students of some seeds; changes are those of students against the
base, prompt by prompt, with intervals over seeds and prompts together.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from table_text import percent, ranged

from safesteer.evaluation.changes import change_over_seeds
from safesteer.evaluation.curves import bias_curve, over_refusal_at

ROWS = Path(__file__).parent / "results" / "held_out"
WIDE = ROWS.parent / "held_out_wide"  # prompts=all, distill.train_layers=blocks
QUICK = ROWS.parent / "held_out_quick"  # the preset "quick" on SmolLM2-135M-Instruct
GENTLE = ROWS.parent / "held_out_gentle"  # a recipe that a search found, on the same prompts
UNSEEN = ROWS.parent / "held_out_unseen"  # the preset on prompts of no earlier look, gated by WIDE's readers
PUBLIC = ("harmbench", "do-not-answer", "harmfulqa", "xstest-unsafe")
OVER = ("xstest", "everyday", "own-harmless")
HARMLESS = (*OVER, "own-hazard-words")
POOLS: Mapping[str, tuple[str, ...]] = {
    "harmful, public: HarmBench, Do-Not-Answer, HarmfulQA, XSTest": PUBLIC,
    "harmful, public: XSTest's unsafe prompts alone": ("xstest-unsafe",),
    "harmful, our own in other forms": ("own-short", "own-questions"),
    "harmful, our own pairs": ("own-harmful",),
    "harmless: XSTest, everyday and twins of our pairs": OVER,
    "harmless, public: XSTest": ("xstest",),
    "harmless, public: everyday instructions": ("everyday",),
    "harmless, our own pairs": ("own-harmless",),
    "harmless, our own with a hazard word": ("own-hazard-words",),
}
AT = (0.5, 0.6, 0.7)  # public harmful prompts refused
NATS = tuple(x / 4 for x in range(-40, 61))  # on the logits of the tokens that open refusals
TASKS = {"lambada_openai": "LAMBADA, right", "arc_easy": "ARC-Easy, right", "mmlu_stem": "MMLU-STEM, right"}


def rows_of(part: Sequence[str], folder: Path | None = None) -> pd.DataFrame:
    """Read the rows of sets or tasks, of all models; None: those of the preset."""
    files = [path for name in part for path in sorted((folder or ROWS).glob(f"*--{name}.csv"))]
    return pd.concat(map(pd.read_csv, files), ignore_index=True)


def outcomes(rows: pd.DataFrame, kind: str, metric: str, keys: list[str]) -> np.ndarray:
    """Return an array of models of a kind ("base", "gated", "student") by prompts."""
    table = rows.loc[rows.model.str.startswith(kind)].pivot(index="model", columns=keys, values=metric)
    return table.sort_index().to_numpy(dtype=float)


def rate(values: np.ndarray) -> str:
    """Write the mean of the seeds, and their range where they differ."""
    rates = values.mean(1)
    text = percent(float(rates.mean()))
    if len(rates) > 1:
        text += f" ({100 * rates.min():.0f} to {100 * rates.max():.0f})"
    return text


def line(title: str, rows: pd.DataFrame, metric: str = "declines") -> list[str]:
    """Make a line of the table: n, the rates of all kinds, and how the students changed."""
    keys = ["task" if metric == "right" else "set", "row"]
    kinds = {kind: outcomes(rows, kind, metric, keys) for kind in ("base", "gated", "student")}
    keep = ~np.isnan(kinds["base"][0])
    kinds = {kind: values[:, keep] for kind, values in kinds.items() if values.size}
    change = change_over_seeds(kinds["base"][0].astype(bool).tolist(), kinds["student"].astype(bool).tolist())
    gated = rate(kinds["gated"]) if "gated" in kinds else ""
    cells = [rate(kinds["base"]), gated, rate(kinds["student"]), ranged(*change, "+.0f")]
    return [title, str(int(keep.sum())), *cells]


def short(sets: Sequence[str], metric: str = "declines", folder: Path = UNSEEN) -> tuple[str, str]:
    """Write how students changed, "base -> student", and the gated base."""
    _, _, base, gated, student, _ = line("", rows_of(sets, folder), metric)
    return f"{base} → {student.split(' (')[0]}", gated.split(" (")[0]


def table(folder: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Make the table of refusals, text quality and capability."""
    there = {path.stem.partition("--")[2] for path in (folder or ROWS).glob("base--*.csv")}
    titles = {
        title if "harmbench" in there else title.replace("HarmBench, ", ""): s for title, s in POOLS.items()
    }
    lines = [line(title, rows_of(sets, folder)) for title, sets in titles.items()]
    harmless = rows_of(HARMLESS, folder)
    lines.append(line("answers to harmless prompts that repeat four words", harmless, "repeats"))
    lines.append(line("code asked for, code given", harmless, "code"))
    lines += [line(title, rows_of((task,), folder), "right") for task, title in TASKS.items()]
    titles = ["refused, unless said otherwise", "n", "base", "gated, no training", "students"]
    titles.append("students - base, points")
    shown = [i for i in range(len(titles)) if any(cells[i] for cells in lines)]  # not all looks are gated
    return [titles[i] for i in shown], [[cells[i] for i in shown] for cells in lines]


def margins_table(folder: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Make the table of what a constant on the openers' logits makes of each model: its own line.

    The over-refusal where half, 60 and 70 % of the public harmful prompts are refused at the first token, and
    how well the margin tells. The first title names sets that were answered and whose margins of the base
    were not read: all models have the same sets.
    """
    lines, folder = [], folder or ROWS
    read = set(pd.read_csv(folder / "base--margins.csv").set)
    answered = [s for s in (*PUBLIC, *OVER) if (folder / f"base--{s}.csv").exists()]
    missing = [s for s in answered if s not in read]
    for path in sorted(folder.glob("*--margins.csv")):
        rows = pd.read_csv(path)
        rows = rows[rows.set.isin(read)]
        harmful, over = (rows.loc[rows.set.isin(sets), "margin"].to_numpy() for sets in (PUBLIC, OVER))
        curve = bias_curve(harmful, over, NATS)
        rates = [percent(over_refusal_at(curve, rate)) for rate in AT]
        told = roc_auc_score([1] * len(harmful) + [0] * len(over), np.concatenate([harmful, over]))
        lines.append([str(rows.model.iloc[0]).replace("-", ", seed "), *rates, f"{told:.2f}"])
    first = "with a constant" + (f" (not read: {', '.join(missing)})" if missing else "")
    return [first, *(f"over-refusal at {percent(rate)}" for rate in AT), "AUC"], lines
