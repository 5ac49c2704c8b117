"""Tables of the studies on a model that refuses by itself, from their committed rows.

Which tokens teach (which_tokens.py), and the two-sided teacher (two_sided.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score
from table_text import over_seeds, percent, ranged

from safesteer.evaluation.changes import paired_change
from safesteer.evaluation.curves import over_refusal_at

ROWS = Path(__file__).parent / "results" / "which_tokens"
TWO_SIDED = ROWS.parent / "two_sided"
HARMFUL_SETS = ("own-val-harmful", "harmbench")
HARMLESS_SETS = {"xstest": "XSTest, safe", "everyday": "everyday", "own-val-harmless": "twins"}
AT = 0.75  # harmful refusals at which arms are compared
NEAR = 0.3  # how far two looks may lie apart, for what is read between them
N_DRAWS = 300
LAST = 4  # the step after which every arm was looked at last
TOKENS = {
    "published 1e-8": "S as published (1e-8), Eq. 6",
    "random": "fifty random ids, Eq. 6",
    "matched": "fifty ids matched in probability, Eq. 6",
    "complement": "all but S, Eq. 6",
    "whole": "whole vocabulary, reverse KL",
    "published 1e-3": "S of tokens that occur (1e-3), Eq. 6",
    "divergence 1e-3": "S of tokens that occur (1e-3), true divergence",
}
OPTIMIZERS = {
    "adam": "Adam",
    "adam 2e-06": "Adam, lr 2e-6",
    "adam 1e-5": "Adam, eps 1e-5",
    "unit sgd": "SGD, steps of one length",
    "sgd": "SGD, one rate",
}


def runs(part: str) -> pd.DataFrame:
    """Read the rows of all arms, with the arm's parts as columns."""
    tables = []
    for path in sorted(ROWS.glob(f"*--*.{part}.csv")):
        tokens, optimizer, seed = path.name.removesuffix(f".{part}.csv").split("--")
        name, _, draw = tokens.rpartition("-")
        labels = {"tokens": name.replace("_", " "), "draw": int(draw)}
        labels |= {"optimizer": optimizer.replace("_", " "), "seed": int(seed)}
        tables.append(pd.read_csv(path).assign(**labels))
    return pd.concat(tables, ignore_index=True)


def _where(table: pd.DataFrame, **values: object) -> pd.DataFrame:
    """Return the rows with these values."""
    for column, value in values.items():
        table = table.loc[table[column] == value]
    return table


def _rates(rows: pd.DataFrame, column: str = "refused") -> dict[str, float]:
    """Return the harmful rate, a mean over prompts, and the rate of each harmless set."""
    rates = {"harmful": float(rows.loc[rows.set.isin(HARMFUL_SETS), column].to_numpy().mean())}
    return rates | {s: float(_where(rows, set=s)[column].to_numpy().mean()) for s in HARMLESS_SETS}


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (tokens, optimizer, rows) in the order of the page."""
    for optimizer in OPTIMIZERS:
        for tokens in TOKENS:
            part = _where(table, tokens=tokens, optimizer=optimizer)
            if len(part):
                yield tokens, optimizer, part


def _cell(rates: dict[str, float]) -> str:
    return " / ".join(f"{100 * rates[name]:.0f}" for name in ("harmful", *HARMLESS_SETS))


def steps_table() -> tuple[list[str], list[list[str]]]:
    """Make the table of refusals by step: harmful / XSTest safe / everyday / twins, means of the runs."""
    base, table = pd.read_csv(ROWS / "base.csv"), runs("rows")
    steps = sorted(table.step.unique())
    lines = [["base", "", "", _cell(_rates(base)), *[""] * (len(steps) - 1)]]
    lines.append(["teacher (steered)", "", "", _cell(_rates(base, "teacher")), *[""] * (len(steps) - 1)])
    for tokens, optimizer, part in _groups(table):
        n_runs = len(part[["seed", "draw"]].drop_duplicates())
        cells = [_cell(_rates(_where(part, step=s))) if (part.step == s).any() else "" for s in steps]
        lines.append([TOKENS[tokens], OPTIMIZERS[optimizer], str(n_runs), *cells])
    return ["trained on", "optimizer", "runs", *(f"step {step}" for step in steps)], lines


def _looks(base: pd.DataFrame, rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return per set an array of looks by prompts, 1 where refused; the first look is the base's."""
    looks = [base, *(part for _, part in rows.groupby(["seed", "draw", "step"]))]
    return {
        str(name): np.stack([_where(look, set=name).sort_values("row").refused.to_numpy() for look in looks])
        for name in base.set.unique()
    }


def _over_of_looks(looks: Mapping[str, np.ndarray], name: str) -> float:
    """Return the over-refusal on a set where the curve through the looks reaches AT."""
    harmful = np.concatenate([looks[s] for s in HARMFUL_SETS], 1).mean(1)
    return over_refusal_at(pd.DataFrame({"harmful": harmful, "over_refusal": looks[name].mean(1)}), AT)


def _over_of_constant(margins: Mapping[str, np.ndarray], name: str) -> float:
    """Return the over-refusal on a set where a constant on the base's openers reaches AT."""
    harmful = np.concatenate([margins[s][0] for s in HARMFUL_SETS])
    return over_with_constant(harmful, margins[name][0])


def _with_interval(
    measure: Callable[[Mapping[str, np.ndarray], str], float], values: Mapping[str, np.ndarray], name: str
) -> str:
    """Write a measure with its 95 % interval over prompts, drawn anew within each set."""
    random, drawn = np.random.default_rng(0), []
    for _ in range(N_DRAWS):
        again = {s: v[:, random.integers(0, v.shape[1], v.shape[1])] for s, v in values.items()}
        drawn.append(measure(again, name))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ranged(measure(values, name), float(low), float(high))


def at_equal_harm() -> tuple[list[str], list[list[str]]]:
    """Make the table of over-refusal at equal harmful refusals, beside the base's line of a constant.

    Of arms with looks of students near AT on both sides: on a chord from the untrained base to a student that
    refuses everything lies no model.
    """
    base, table = pd.read_csv(ROWS / "base.csv"), runs("rows")
    margins = {str(s): _where(base, set=s).margin.to_numpy()[None] for s in base.set.unique()}
    cells = [_with_interval(_over_of_constant, margins, name) for name in HARMLESS_SETS]
    lines = [["no training: a constant on the base's openers", "", *cells]]
    for tokens, optimizer, part in _groups(table):
        looks = _looks(base, part)
        harmful = np.concatenate([looks[s] for s in HARMFUL_SETS], 1).mean(1)[1:]
        below, above = harmful[harmful <= AT], harmful[harmful >= AT]
        if len(below) and len(above) and above.min() - below.max() <= NEAR:
            cells = [_with_interval(_over_of_looks, looks, name) for name in HARMLESS_SETS]
            lines.append([TOKENS[tokens], OPTIMIZERS[optimizer], *cells])
    return ["trained on", "optimizer", *HARMLESS_SETS.values()], lines


def instruments() -> tuple[list[str], list[list[str]]]:
    """Make the table of what the first step does, and of where the residual stream is after the last."""
    steps, shift = runs("steps"), runs("shift")
    teacher = pd.read_csv(ROWS / "teacher.shift.csv")
    top = int(shift.layer.max())

    def along(rows: pd.DataFrame, label: str) -> tuple[float, float]:
        at = _where(rows, layer=top, prompts=label)
        return at.along.mean(), at.cosine.mean()

    lines = []
    whole = {label: along(teacher, label)[0] for label in ("harmful", "harmless")}
    for tokens, optimizer, part in _groups(steps):
        first = _where(part, step=1)
        moved = _where(shift, tokens=tokens, optimizer=optimizer, step=LAST)
        shares = [along(moved, label)[0] / whole[label] for label in ("harmful", "harmless")]
        lines.append(
            [
                TOKENS[tokens],
                OPTIMIZERS[optimizer],
                "1" if tokens == "whole" else f"{first.mass_teacher.mean():.1e}",
                f"{first.gradient_norm.mean():.2g}",
                f"{first.gradient_cosine.mean():.2f}",
                f"{first.update_cosine.mean():.2f}",
                *map(percent, shares),
                f"{along(moved, 'harmful')[1]:.2f}",
            ]
        )
    titles = [
        "trained on",
        "optimizer",
        "teacher's mass",
        "gradient's length",
        "its cosine with that of all tokens",
    ]
    titles += ["the update's", "shift along d, harmful", "harmless", "its cosine with d"]
    return titles, lines


CHOOSING = {  # of two_sided.py: public prompts that are there for choosing, and val splits of our own
    "pairs harmful": "harmful: our pairs (val)",
    "kinds harmful": "harmful: our other kinds (val)",
    "public harmful": "harmful: AdvBench, MaliciousInstruct, TDC 2023",
    "pairs harmless": "harmless: our pairs (val)",
    "kinds harmless": "harmless: our other kinds (val)",
    "public harmless": "harmless: Alpaca",
}


def _two_sided_rows(name: str) -> pd.DataFrame:
    return pd.read_csv(TWO_SIDED / f"{name}.csv")


def _base_rows() -> pd.DataFrame:
    """Read the base's look, with the sets that came later."""
    return pd.concat([_two_sided_rows("base"), _two_sided_rows("base-wide")])


def gated() -> tuple[list[str], list[list[str]]]:
    """Make the table of what a reader's gate does without training."""
    base, one, band = (_two_sided_rows(name) for name in ("base", "gated", "gated-band"))
    lines = []
    for name, title in CHOOSING.items():
        before, single, both = (_where(t, set=name).sort_values("row") for t in (base, one, band))
        cells = [f"{100 * values.mean():.0f}" for values in (before.refused, single.refused, both.refused)]
        change = paired_change(before.refused.astype(bool).tolist(), both.refused.astype(bool).tolist())
        cells.append(ranged(change.value, change.low, change.high, "+.0f"))
        lines.append([title, str(len(before)), *cells])
    return ["set, % refused", "n", "base", "one threshold", "a band", "change, points"], lines


KINDS = ("pairs", "kinds", "public", "wide")  # of the sets for choosing; the last came later
TWO_SIDED_ARMS = {  # files of two_sided.py, and what the page calls them
    "long_on_S": "8 + 8 prompts, 12 tokens, all alike",
    "first_tokens": "12 + 12 prompts, 8 tokens, early ones count most",
    "first_tokens,_both_on_S": "the same, harmless answers on S too",
    "both_on_S,_harmless_by_1.5": "the same, harmless answers count 1.5: the preset",
    "both_on_S,_wide_prompts": "the same with wider prompts, 32 steps",
    "both_on_S,_wide_prompts,_blocks": "the same, 24 steps, vocabulary frozen",
    "both_over_all_tokens": "both over all tokens in place of S",
    "both_on_random_tokens": "both on fifty random ids in place of S",
    "both_on_matched_tokens": "both on fifty ids as frequent as those of S",
}


def two_sided_arms() -> tuple[list[str], list[list[str]]]:
    """Make the table of the arms on the sets for choosing: refusals by set, and the margin's AUC."""
    base = _base_rows()
    looks = [("base", "", base), ("gated steering, no training", "", _two_sided_rows("gated-band"))]
    looks.append(("the same, reader fitted on wider prompts too", "", _two_sided_rows("gated-wide")))
    for file, title in TWO_SIDED_ARMS.items():
        rows = _two_sided_rows(f"{file}--0.rows")  # the arms were compared with one seed
        looks += [(title, str(step), look) for step, look in rows.groupby("step")]
    titles = ["harmful prompts steered, harmless ones ablated", "step", "harmful, % refused", "harmless"]
    return [*titles, "AUC of the margin"], [[title, step, *look_cells(rows)] for title, step, rows in looks]


def look_cells(rows: pd.DataFrame) -> list[str]:
    """Write a look: refusals of harmful prompts by kind, of harmless ones, and the margin's AUC."""
    rates = 100 * rows.groupby("set").refused.mean()
    cells = [
        " / ".join(f"{rates[f'{kind} {label}']:.0f}" for kind in KINDS if f"{kind} {label}" in rates)
        for label in ("harmful", "harmless")
    ]
    return [*cells, _aucs(rows) if "margin" in rows else ""]


def _auc(rows: pd.DataFrame) -> dict[str, float]:
    """Measure how well the first-token margin tells harmful from harmless, by kind of prompts."""
    parts = {kind: rows.loc[rows.set.str.startswith(kind)] for kind in KINDS}
    return {
        kind: float(roc_auc_score(part.set.str.endswith("harmful"), part.margin))
        for kind, part in parts.items()
        if len(part)
    }


def _aucs(rows: pd.DataFrame) -> str:
    return " / ".join(f"{area:.2f}" for area in _auc(rows).values())


SETS_OF_TOKENS = {  # arms of two_sided.py that differ in one thing, and what that is
    "first_tokens,_both_on_S": "S",
    "both_over_all_tokens": "the whole vocabulary",
    "both_on_matched_tokens": "fifty ids as frequent as those of S",
    "both_on_random_tokens": "fifty random ids",
    "both_on_S,_one-sided": "S, harmless answers held to the base (one-sided)",
}
STEP = 24
MEASURED = (  # titles of what `_measured` writes
    *(f"AUC, {kind}" for kind in KINDS),
    f"over-refusal at {percent(AT)}",
    "harmful refused",
    "harmless refused",
)


def sets_of_tokens() -> tuple[list[str], list[list[str]]]:
    """Make the table of what teaches a two-sided student: means and ranges of the seeds, after STEP steps."""
    base = _base_rows()
    lines = [["base", "", *_measured([base])]]
    for file, title in SETS_OF_TOKENS.items():
        if looks := _last_looks(sorted(TWO_SIDED.glob(f"{file}--*.rows.csv"))):
            lines.append([title, str(len(looks)), *_measured(looks)])
    return ["taught on", "seeds", *MEASURED], lines


def _last_looks(paths: Sequence[Path]) -> list[pd.DataFrame]:
    """Read the look after STEP steps of each seed."""
    return [_where(pd.read_csv(path), step=STEP) for path in paths]


def _measured(looks: list[pd.DataFrame]) -> list[str]:
    """Write AUCs by kind; over-refusal at equal harm and the rates are without the kind that came later."""
    areas, others = {kind: [] for kind in KINDS}, []
    for look in looks:
        for kind, area in _auc(look).items():
            areas[kind].append(area)
        part = look[~look.set.str.startswith(KINDS[-1])]
        others.append([over_at_equal_harm(part), *_refusals(part)])
    cells = [over_seeds(values, ".2f", 1) for values in areas.values()]
    return cells + [over_seeds(values, ".0f", 100) for values in zip(*others, strict=True)]


def _refusals(look: pd.DataFrame) -> list[float]:
    """Return the shares of harmful and of harmless prompts that are refused."""
    harmful = look.set.str.endswith("harmful")
    return [float(look.refused[rows].to_numpy().mean()) for rows in (harmful, ~harmful)]


def over_at_equal_harm(look: pd.DataFrame) -> float:
    """Return the over-refusal of a look where a constant on the openers refuses AT of its harmful prompts."""
    harmful = look.set.str.endswith("harmful")
    return over_with_constant(look.margin[harmful].to_numpy(), look.margin[~harmful].to_numpy())


def over_with_constant(harmful: np.ndarray, harmless: np.ndarray) -> float:
    """Return the share of harmless prompts above the margin that AT of the harmful ones reach."""
    limits = np.quantile(harmful, 1 - AT, axis=-1, keepdims=True)
    return float((harmless > limits).mean())


METHODS = TWO_SIDED.parent / "methods"
OURS_RATE = 1e-5  # of two_sided.py
DISTILLED = {  # arms of two_sided.py: as many steps and prompts, the same rate
    "first_tokens,_both_on_S": "S, two-sided",
    "both_on_S,_one-sided": "S, one-sided",
    "both_over_all_tokens": "the whole vocabulary, two-sided",
}
TAUGHT = {  # methods of methods.py, and what the page calls them
    "two-sided_on_S": "S, two-sided, harmless answers count 1.5: the preset",
    "one-sided_on_S": "S, one-sided, harmless answers count 1.5",
    "published": "S as published (1e-8), Eq. 6, harmful prompts alone",
    "whole_vocabulary": "the whole vocabulary, one-sided",
    "top-k": "the teacher's fifty likeliest tokens, one-sided",
    "sft": "SFT: refusals and the base's own answers",
    "kl_and_margin": "SFT: refusals, KL and a margin on harmless prompts",
    "dpo": "DPO",
    "dpo_of_any_answers": "DPO, the base's own refusals rejected too: a mistake",
    "sft_early": "SFT, the first tokens weighed as with S",
    "null_space": "SFT in the null space of harmless prompts",
    "null_space_of_gradients": "SFT, gradients, not updates, in that null space: a mistake",
}


def methods() -> tuple[list[str], list[list[str]]]:
    """Make the table of ways to teach: after STEP steps, each rate of each, means and ranges of the seeds."""
    base = _base_rows()
    lines = [["base", "", "", *_measured([base])]]
    gate = _refusals(_two_sided_rows("gated-band"))
    lines.append(["gated steering, no training", *[""] * (3 + len(KINDS)), *(f"{100 * r:.0f}" for r in gate)])
    taught: dict[tuple[str, float], list[Path]] = {}
    for file, title in DISTILLED.items():
        taught[title, OURS_RATE] = sorted(TWO_SIDED.glob(f"{file}--*.rows.csv"))
    for file, title in TAUGHT.items():
        for path in sorted(METHODS.glob(f"{file}--*.rows.csv")):
            taught.setdefault((title, float(path.name.split("--")[1])), []).append(path)
    for (title, rate), paths in taught.items():
        looks = _last_looks(paths)
        lines.append([title, f"{rate:g}", str(len(looks)), *_measured(looks)])
    return ["taught on", "rate", "seeds", *MEASURED], lines
