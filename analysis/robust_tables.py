"""The tables of the page on depth, from what `safesteer evaluate --suite robust` wrote.

A file of analysis/results/robust is the `results.csv` of one suite: NAME.csv, or NAME--SEED.csv of one seed.
The seeds of a name stand in one line: prompts are counted once per seed, and a model that all seeds share
(the base) once.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from table_text import markdown, over_seeds, percent, ranged, with_interval

from safesteer.evaluation.changes import drawn_over_seeds, paired_change
from safesteer.report.robust_table import (
    ATTACKED,
    CHANGED,
    COST,
    KL_HARMFUL,
    KL_HARMLESS,
    OPENED,
    OPENED_BY_BASE,
    PLAIN,
    SPENT,
    WRAPPED_HARMFUL,
    WRAPPED_HARMLESS,
    of_kind,
    opened_by,
)

ROWS = Path(__file__).parent / "results" / "robust"
OPENINGS = (0, 1, 2, 5, 10, 20, 50)
POSITIONS = (1, 2, 5, 10, 20, 50)
NOTHING = "Not measured yet."
CHANGES = {  # how the names of changed weights begin, and what the table calls them
    "best direction ablated": "best direction ablated",
    "4 main directions": "four main directions ablated",
    "training's change removed": "training's change removed",
    "training's change at rank 1": "at rank 1",
    "training's change at rank 8": "at rank 8",
}


def models(folder: Path) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (name, model, rows of all seeds) of what was measured."""
    names = sorted({path.stem.partition("--")[0] for path in folder.glob("*.csv")})
    for name in names:
        paths = sorted([*folder.glob(f"{name}.csv"), *folder.glob(f"{name}--*.csv")])
        tables = [pd.read_csv(path).assign(seed=i) for i, path in enumerate(paths)]
        for model in tables[0].model.unique():
            parts = [table[table.model == model] for table in tables]
            same = all(part.drop(columns="seed").equals(parts[0].drop(columns="seed")) for part in parts)
            yield name, str(model), pd.concat(parts[:1] if same else parts)


def _named(rows: pd.DataFrame, kind: str, name: str) -> pd.DataFrame:
    """Return the rows of a kind that have this name."""
    return pd.DataFrame(rows[(rows.kind == kind) & (rows["name"] == name)])


def _beginning(rows: pd.DataFrame, kind: str, start: str) -> pd.DataFrame:
    """Return the rows of a kind whose names begin so."""
    return pd.DataFrame(rows[(rows.kind == kind) & rows["name"].str.startswith(start)])


def _pooled(rows: pd.DataFrame) -> float:
    """Return the rate over all prompts of some rows."""
    return float((rows.value * rows.n).sum() / rows.n.sum())


def _rate(rows: pd.DataFrame) -> str:
    """Write the rate over all seeds, with its interval; nothing where there is none.

    All seeds and wrappers have the same prompts: the interval counts each once.
    """
    return with_interval(_pooled(rows), int(rows.n.max())) if len(rows) else ""


def _mean(rows: pd.DataFrame, digits: int) -> str:
    return f"{rows.value.mean():.{digits}f}" if len(rows) else ""


def depth_table(folder: Path = ROWS) -> str:
    """Write refusals where k tokens have opened the answer, and how far base and student are apart there."""
    lines = []
    for name, model, rows in models(folder):
        for kind, title in ((OPENED, "our text"), (OPENED_BY_BASE, "the base's answer")):
            if len(of_kind(rows, kind)):
                cells = [_rate(_named(rows, kind, opened_by(k))) for k in OPENINGS]
                lines.append([name, model, str(rows.seed.nunique()), f"refused, opened by {title}", *cells])
        for kind, title in ((KL_HARMFUL, "harmful"), (KL_HARMLESS, "harmless")):
            if len(of_kind(rows, kind)):
                cells = ["", *(_mean(_named(rows, kind, f"position {k}"), 2) for k in POSITIONS)]
                lines.append([name, model, str(rows.seed.nunique()), f"KL at token k, {title}", *cells])
    heads = ["measured", "model", "seeds", "", *(f"k = {k}" for k in OPENINGS)]
    return markdown(heads, lines) if lines else NOTHING


def wrapper_table(folder: Path = ROWS) -> str:
    """Write refusals of harmful / harmless requests by family of wrappers."""
    measured = list(models(folder))
    if not measured:
        return NOTHING
    families = dict.fromkeys(
        str(name).partition(":")[0]
        for _, _, rows in measured
        for name in of_kind(rows, WRAPPED_HARMLESS)["name"]
    )

    def cell(rows: pd.DataFrame, family: str) -> str:
        harmful, harmless = (_beginning(rows, kind, family) for kind in (WRAPPED_HARMFUL, WRAPPED_HARMLESS))
        if family == PLAIN:
            harmful = _named(rows, OPENED, opened_by(0))
        return " / ".join(percent(_pooled(part)) for part in (harmful, harmless))

    lines = [[name, model, *(cell(rows, family) for family in families)] for name, model, rows in measured]
    return markdown(["measured", "model", *families], lines)


def weight_table(folder: Path = ROWS) -> str:
    """Write refusals left after changes of the weights, with their KL, and after the gradient attack."""
    lines = []
    for name, model, rows in models(folder):
        left = [_changed(rows, start) for start in CHANGES]
        before = _rate(_named(rows, OPENED, opened_by(0)))
        steps, attacked = _named(rows, SPENT, "steps taken"), of_kind(rows, ATTACKED)
        left.append(f"{_rate(attacked)}, n = {int(attacked.n.sum())}" if len(attacked) else "")
        lines.append([name, model, before, *left, _mean(steps, 0)])
    heads = ["measured", "model", "as it is", *CHANGES.values(), "attacked, of those refused", "steps"]
    return markdown(heads, lines) if lines else NOTHING


def _changed(rows: pd.DataFrame, start: str) -> str:
    """Write the refusals left after one change, and what it costs in KL."""
    left, cost = (_beginning(rows, kind, start) for kind in (CHANGED, COST))
    return f"{_rate(left)}, KL {_mean(cost, 2)}" if len(left) else ""


TUNED = {  # folders of fine_tuning.py, and the prompts of their looks
    "fine_tuning_smollm2": "32 val pairs, 24 of them trained on",
    "fine_tuning_unseen": "66 wider pairs, none trained on",
}
SEALS = ("unsealed", "sealed", "sealed_tenfold")  # arms of fine_tuning.py


def seal_table() -> str:
    """Make the table of benign fine-tuning: refusals before and after, with and without the seal."""
    lines, named = [], {}
    for place, (folder, asked) in enumerate(TUNED.items()):
        for path in (ROWS.parent / folder).glob("*.rows.csv"):
            task, arm, *adapter, seed = path.name.removesuffix(".rows.csv").split("--")
            named[place, task, SEALS.index(arm), tuple(adapter), int(seed)] = asked, path
    for (_, task, arm, adapter, seed), (asked, path) in sorted(named.items()):
        rows = pd.read_csv(path)
        steps = pd.read_csv(path.with_name(path.name.replace("rows", "steps")))
        last, cells = int(rows.step.max()), []
        for label in ("harmful", "harmless"):
            before, after = (_refused(rows, label, step) for step in (0, last))
            change = paired_change(before, after)
            cells.append(f"{percent(sum(before) / len(before))} → {percent(sum(after) / len(after))}")
            cells.append(ranged(change.value, change.low, change.high, "+.0f"))
        right = rows[(rows.set == "task") & (rows.step == last)].right.to_numpy()
        loss = steps[steps.step == last].task_loss.iloc[0]
        divergence = steps.seal_divergence.tail(25).mean()
        cells += [percent(right.mean()), f"{loss:.3f}", f"{divergence:.4f}"]
        seal = ", ".join((SEALS[arm], *adapter)).replace("_", " ")
        lines.append([asked, task, seal, str(seed), *cells])
    titles = [
        "asked",
        "task",
        "seal",
        "seed",
        "harmful refused",
        "points",
        "harmless refused",
        "points",
        "task right",
    ]
    return markdown([*titles, "task loss", "divergence on S"], lines) if lines else NOTHING


def _refused(rows: pd.DataFrame, label: str, step: int) -> list[bool]:
    """Return which prompts of a kind were refused after a step, in their order."""
    at = rows[(rows.set == label) & (rows.step == step)].sort_values("row")
    return at.refused.astype(bool).tolist()


DEEPER = ROWS.parent / "deeper"  # rows of deeper.py
PRACTICE = {  # of deeper.py, and what the table calls them
    "plain": "the preset",
    "opened": "half of the answers opened",
    "wrapped": "half of the prompts wrapped",
    "both": "a third of each",
    "opened harmful": "half of the answers to harmful prompts opened",
    "longer, all tokens": "no practice, 12 tokens that weigh alike, all tokens",
    "opened longer": "half of the answers opened, 12 tokens that weigh alike",
    "opened longer, all tokens": "half of the answers opened, 12 tokens that weigh alike, all tokens",
    "both longer, all tokens": "a third of each, 12 tokens that weigh alike, all tokens",
}
READABLE = "wrapped, not encoded"
ATTACKS = ("wrapped", READABLE, "opened by 2", "opened by 10")
GAPS = ("wrapped", "opened by 10")  # what practice is to close


def deeper_table(folder: Path = DEEPER, split: str = "test") -> str:
    """Write what practice does to refusals of wrapped and opened prompts of a split, and what it costs."""
    if not (folder / "base.csv").exists():
        return NOTHING
    arms = {arm: _deeper_rows(sorted(folder.glob(f"{arm}--*.csv")), split) for arm in PRACTICE}
    plain, base = arms["plain"], _deeper_rows([folder / "base.csv"], split)
    # The wrappers of "val" hold no encodings.
    attacks = [attack for attack in ATTACKS if _encoded(base).any() or attack != READABLE]
    last = [f"gap closed, {attack}" for attack in GAPS] + ["over-refusal, points"]
    last += ["the same, not encoded"] if READABLE in attacks else []
    lines = [["base", "", *_put(base, attacks), *[""] * len(last)]]
    for arm, title in PRACTICE.items():
        if len(arms[arm]):
            beside = [""] * len(last) if arm == "plain" else _beside(plain, arms[arm])[: len(last)]
            lines.append([title, str(arms[arm].seed.nunique()), *_put(arms[arm], attacks), *beside])
    return markdown(["recipe", "seeds", "plain", *attacks, *last], lines)


def _deeper_rows(paths: list[Path], split: str) -> pd.DataFrame:
    """Read the rows of an arm's seeds in a split, every wrapper as "wrapped"."""
    tables = [pd.read_csv(path).assign(seed=path.stem.partition("--")[2]) for path in paths]
    rows = pd.concat(tables) if tables else pd.DataFrame(columns=["split", "label", "how", "seed"])
    rows = pd.DataFrame(rows[rows.split == split])
    return rows.assign(put=rows["how"].where(rows["how"].isin(["plain", *ATTACKS]), "wrapped"))


def _rates(rows: pd.DataFrame, by: list[str]) -> pd.Series:
    """Return shares by how prompts were put and `by`; wrappers count once more without encodings."""
    readable = rows[(rows.put == "wrapped") & ~_encoded(rows)].assign(put=READABLE)
    return pd.concat([rows, readable]).groupby(["put", *by]).refused.mean()


def _encoded(rows: pd.DataFrame) -> pd.Series:
    """Say which prompts stood in an encoding, which a small model cannot read."""
    return rows["how"].str.startswith("encoding")


def _put(rows: pd.DataFrame, attacks: list[str]) -> list[str]:
    """Write refusals, harmful / harmless, plain and under each attack; over seeds with their range."""
    means = _rates(rows, ["label", "seed"])
    return [
        " / ".join(over_seeds(means[put][label].tolist(), ".0f", 100) for label in ("harmful", "harmless"))
        for put in ("plain", *attacks)
    ]


def _beside(plain: pd.DataFrame, practised: pd.DataFrame) -> list[str]:
    """Write which share of the gap of the same seeds closes, and how over-refusal changes, paired."""
    plain = plain[plain.seed.isin(practised.seed)]
    before, after = (_rates(rows[rows.label == "harmful"], []) for rows in (plain, practised))
    gaps = {attack: before["plain"] - before[attack] for attack in GAPS}
    closed = [
        percent((after[attack] - before[attack]) / gap) if gap > 0 else "no gap"
        for attack, gap in gaps.items()
    ]
    harmless = [
        rows[(rows.label == "harmless") & ~rows.put.str.startswith("opened")] for rows in (plain, practised)
    ]
    readable = [rows[~_encoded(rows)] for rows in harmless]
    return [*closed, _change(harmless), _change(readable)]


def _change(both: list[pd.DataFrame]) -> str:
    """Write the mean change from the first rows to the second, in points, over seeds and prompts."""
    before, after = (rows.pivot_table(index="seed", columns="row", values="refused") for rows in both)
    return ranged(*drawn_over_seeds((after - before).to_numpy()), "+.0f")


READ = ROWS.parent / "opened"  # rows of opened.py
OPENED_BY = (0, 2, 10)  # tokens


def opened_table(folder: Path = READ) -> str:
    """Write how many opened answers refuse, and how likely each of a refusal's first tokens is there."""
    if not (folder / "refused.csv").exists():
        return NOTHING
    written = pd.read_csv(folder / "refused.csv").set_index(["model", "coefficient", "opened_by"])
    read = pd.read_csv(folder / "probabilities.csv").set_index(["model", "opened_by", "token"]).probability
    lines = []
    for model, coefficient in dict.fromkeys((m, c) for m, c, _ in written.index):
        of = [written.loc[(model, coefficient, k)] for k in OPENED_BY]
        title = PRACTICE.get(model, model) + ("" if coefficient == 1 else f", coefficient x {coefficient:g}")
        refused = " / ".join(f"{100 * row.refused:.0f}" for row in of)
        repeats = " / ".join(f"{100 * row.repeats:.0f}" for row in of)
        likely = [
            " / ".join(f"{read[(model, k, token)]:.2f}" for k in OPENED_BY) if coefficient == 1 else ""
            for token in (1, 2, 3)
        ]
        lines.append([title, refused, repeats, *likely])
    after = " / ".join(map(str, OPENED_BY))
    titles = [f"refused after {after} tokens", "repeats", *(f"p of token {t}" for t in (1, 2, 3))]
    return markdown(["model", *titles], lines)
