"""The paper's tables on a model that refuses by itself, from the committed rows of the ablations.

Arms stop after the same number of steps, each at another place of its curve. So what stands first is the
over-refusal where a constant on the base's openers takes the arm to AT of the harmful prompts, and how far
it is from that of the published arm: intervals of 95 % over prompts, drawn anew for both arms alike.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from control_tables import AT, over_with_constant
from table_text import percent, ranged

from safesteer.evaluation.changes import change_over_seeds, paired_change

ROWS = Path(__file__).parent / "results" / "qwen2.5-coder-0.5b"
N_DRAWS = 1000
PUBLISHED = ("table4_support", "safety, reverse")
# (study, arm in its csv, name in the table); the published arm is also K = 50, H = 7, vote and so on.
ARMS_OF_THE_PAPER = (
    (*PUBLISHED, "as published: S of 50, H = 7, votes, Eq. 6, 100 prompts"),
    ("table4_support", "safety, forward", "Table 4: S, forward KL"),
    ("table4_support", "topk, reverse", "Table 4: the teacher's top k, reverse"),
    ("table4_support", "topk, forward", "Table 4: the teacher's top k, forward"),
    ("table4_support", "full, reverse", "Table 4: whole vocabulary, reverse"),
    ("table4_support", "full, forward", "Table 4: whole vocabulary, forward"),
    ("table4_support", "topk, reverse, lr 2e-6", "Table 4: top k, reverse, a fifth of the rate"),
    ("table4_support", "full, reverse, lr 2e-6", "Table 4: whole vocabulary, reverse, a fifth of the rate"),
    ("table5_normalizers", "renormalized", "Table 5: renormalised on S"),
    ("table5_normalizers", "generalized", "a divergence on S: generalized"),
    ("table5_normalizers", "tail", "a divergence on S: with a tail"),
    ("selection_rollouts", "base's samples", "S from the base's samples"),
    ("selection_method", "mean", "S by the mean lift"),
    ("selection_size", "K = 10", "K = 10"),
    ("selection_size", "K = 25", "K = 25"),
    ("selection_size", "K = 100", "K = 100"),
    ("selection_size", "K = 200", "K = 200"),
    ("selection_size", "K = 500", "K = 500"),
    ("selection_horizon", "H = 1", "H = 1"),
    ("selection_horizon", "H = 3", "H = 3"),
    ("selection_horizon", "H = 5", "H = 5"),
    ("harmful_samples", "10 prompts", "10 harmful prompts"),
    ("harmful_samples", "25 prompts", "25 harmful prompts"),
    ("harmful_samples", "50 prompts", "50 harmful prompts"),
    ("table3_teachers", "steered teacher, untrained", "Table 3: the steered teacher itself"),
    ("table3_teachers", "system-prompt teacher, untrained", "Table 3: the system-prompt teacher itself"),
    ("table3_teachers", "system-prompt teacher", "Table 3: system-prompt teacher, S of the steered one"),
    ("table3_teachers", "system-prompt teacher, S by it", "Table 3: system-prompt teacher, its own S"),
)


@cache
def rows_of(study: str, part: str) -> pd.DataFrame:
    """Read what a study wrote: its scores ("csv"), or a line per prompt or row of its arms."""
    return pd.read_csv(ROWS / f"{study}.{part}")


def margins(study: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the margins of harmful and of harmless prompts: seeds x prompts."""
    table = rows_of(study, "prompts.csv")
    table = table[table.arm == arm]
    harmful = table.set.str.endswith("harmful")

    def by_seed(part: pd.DataFrame) -> np.ndarray:
        return np.stack([rows.margin.to_numpy() for _, rows in part.groupby("seed")])

    return by_seed(table[harmful]), by_seed(table[~harmful])


@cache
def drawn_over_refusals(study: str, arm: str) -> np.ndarray:
    """Return the over-refusal of an arm for prompts drawn anew, the same ones for every arm."""
    random, (harmful, harmless) = np.random.default_rng(0), margins(study, arm)
    draws = [
        [random.integers(0, m.shape[1], m.shape[1]) for m in (harmful, harmless)] for _ in range(N_DRAWS)
    ]
    return np.array([over_with_constant(harmful[:, i], harmless[:, j]) for i, j in draws])


def interval(value: float, drawn: np.ndarray, form: str) -> str:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ranged(value, float(low), float(high), form)


def lambada(study: str, arm: str) -> str:
    """Write the change of right rows against the base, paired; of several seeds over seeds and rows."""
    table = rows_of(study, "lambada_rows.csv")
    base = table[table.arm == "base"].right.astype(bool).tolist()
    seeds = [rows.right.astype(bool).tolist() for _, rows in table[table.arm == arm].groupby("seed")]
    if len(seeds) > 1:
        return ranged(*change_over_seeds(base, seeds), "+.0f")
    change = paired_change(base, seeds[0])
    return ranged(change.value, change.low, change.high, "+.0f")


def line(study: str, arm: str, title: str) -> list[str]:
    """Write one arm."""
    table = rows_of(study, "csv")
    mean = table[table.arm == arm].mean(numeric_only=True)
    value, drawn = over_with_constant(*margins(study, arm)), drawn_over_refusals(study, arm)
    n_runs = "" if arm == "base" else str(int((table.arm == arm).sum()))
    cells = [n_runs, interval(value, drawn, ".0f")]
    if arm == "base" or (study, arm) == PUBLISHED:
        cells.append("")
    else:
        change = value - over_with_constant(*margins(*PUBLISHED))
        cells.append(interval(change, drawn - drawn_over_refusals(*PUBLISHED), "+.0f"))
    cells += [f"{mean.auc:.2f}", f"{percent(mean.harmful)} / {percent(mean.harmless)}"]
    if arm == "base":
        return [title, *cells, "", "", f"{mean.perplexity:.2f}", percent(mean.lambada)]
    drift = ["" if np.isnan(value) else f"{value:.3f}" for value in (mean.kl_harmless, mean["shift"])]
    drift.append(f"{mean.perplexity:.2f}")
    return [title, *cells, *drift, lambada(study, arm)]


def table() -> tuple[list[str], list[list[str]]]:
    """Make the table of the paper's tables: those arms whose rows are there."""
    lines = [line(PUBLISHED[0], "base", "base")]
    for study, arm, title in ARMS_OF_THE_PAPER:
        if (ROWS / f"{study}.csv").exists() and arm in set(rows_of(study, "csv").arm):
            lines.append(line(study, arm, title))
    titles = ["arm", "runs", f"over-refusal at {percent(AT)}", "against the published arm, points", "AUC"]
    return [*titles, "refused, harmful / harmless", "KL", "shift", "perplexity", "LAMBADA"], lines
