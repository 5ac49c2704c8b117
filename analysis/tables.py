"""Write the tables of the pages from the committed rows.

    python analysis/tables.py [--check]

1. a table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`;
2. the function under that name in TABLES makes it from the files of analysis/results;
3. the pages are rewritten; with `--check` they stay, each table that differs is named, and the exit code
   is 1.

A number that somebody edits by hand, or rows that change without their page, fail a test in this way.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import control_tables
import held_out_tables
import numpy as np
import pandas as pd
import paper_tables
import robust_tables
import whole_tables
from ablation import summary
from table_text import markdown, percent, ranged, rate_ranged, with_interval

from safesteer._files import json_lines
from safesteer.evaluation.changes import paired_change
from safesteer.evaluation.curves import bias_curve, curve_area, over_refusal_at

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "analysis" / "results"
PAGES = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/results.md",
        "docs/which-tokens.md",
        "docs/how-to/gated-steering.md",
        "docs/how-to/fine-tuning.md",
        "docs/judges.md",
        "docs/how-deep.md",
        "docs/log.md",
    )
)
HARMFUL = 0.7  # harmful refusals at which lines are compared: about the student's
N_DRAWS = 500
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)
CAPABILITY = {"arc_easy": 3, "piqa": 3, "lambada_openai": 3}


def suite(name: str) -> dict[tuple[str, str], tuple[float, int]]:
    """Read a suite's csv: (value, n) by model and by name; what has two metrics has the first."""
    table = pd.read_csv(RESULTS / f"{name}.csv").drop_duplicates(["model", "name"])
    return {(r.model, r.name): (r.value, int(r.n)) for r in table.itertuples(index=False)}


NAMES = {  # of sets and tasks, as the tables show them
    "harmbench": "harmful: HarmBench",
    "do-not-answer": "harmful: Do-Not-Answer",
    "harmfulqa": "harmful: HarmfulQA",
    "xstest-unsafe": "harmful: XSTest, unsafe",
    "own-short": "harmful: our own, short",
    "own-questions": "harmful: our own, questions",
    "own-harmful": "harmful: our own pairs",
    "xstest": "harmless: XSTest, safe",
    "everyday": "harmless: everyday instructions",
    "own-hazard-words": "harmless: our own, hazard words",
    "own-harmless": "harmless: twins of our own pairs",
    "arc_easy": "ARC-Easy",
    "piqa": "PIQA",
    "lambada_openai": "LAMBADA",
}
POOLS = {  # of the README: each prompt in one set, harmful ones first
    title: sets
    for title, sets in held_out_tables.POOLS.items()
    if sets not in (("xstest-unsafe",), held_out_tables.OVER)
}


def measured(title: str, both: pd.DataFrame) -> list[str]:
    """Write one comparison of base and student: `both` has a row per prompt and a column per model."""
    rates = [with_interval(both[m].mean(), len(both)) for m in ("base", "student")]
    change = paired_change(both.base.astype(bool).tolist(), both.student.astype(bool).tolist())
    return [title, str(len(both)), *rates, ranged(change.value, change.low, change.high, "+.0f")]


def paired(rows: pd.DataFrame, metric: str, keys: list[str]) -> pd.DataFrame:
    """Put base and student beside each other, prompt by prompt."""
    return rows.pivot(index=keys, columns="model", values=metric).dropna()


PUBLIC_UNSEEN = tuple(name for name in held_out_tables.PUBLIC if name != "harmbench")  # all seen before
README_ROWS = {  # title: (sets or task, metric)
    "harmful, public: Do-Not-Answer, HarmfulQA, XSTest": (PUBLIC_UNSEEN, "declines"),
    "harmful, our own pairs": (("own-harmful",), "declines"),
    "harmless, public: XSTest": (("xstest",), "declines"),
    "harmless, public: everyday instructions": (("everyday",), "declines"),
    "harmless, our own pairs": (("own-harmless",), "declines"),
    "harmless answers that repeat four words": (held_out_tables.HARMLESS, "repeats"),
    "ARC-Easy, right": (("arc_easy",), "right"),
    "LAMBADA, right": (("lambada_openai",), "right"),
}


def readme() -> str:
    """Make the table of the README: two students beside their bases, and gated steering."""
    lines = []
    for title, (names, metric) in README_ROWS.items():
        student, gated = held_out_tables.short(names, metric)
        small, _ = held_out_tables.short(names, metric, held_out_tables.QUICK)
        lines.append([title, student, gated, small])
    titles = ["refused, unless said otherwise", "Qwen2.5-Coder-0.5B, student"]
    return markdown([*titles, "the same, gated steering", "SmolLM2-135M, student"], lines)


def demo() -> str:
    """Make the table of the demo: its student beside its base."""
    rows = pd.read_csv(RESULTS / "demo-protocol-prompts.csv")
    tasks = pd.read_csv(RESULTS / "demo-protocol-tasks.csv")
    keys = ["set", "row"]
    lines = [
        measured(title, paired(rows[rows.set.isin(sets)], "declines", keys)) for title, sets in POOLS.items()
    ]
    everyday = rows[rows.set == "everyday"]
    lines.append(measured("answers that repeat four words, everyday", paired(everyday, "repeats", keys)))
    lines.append(measured("code asked for, code given", paired(rows, "code", keys)))
    for task, part in tasks[tasks.task != "piqa"].groupby("task", sort=False):  # as flat as ARC
        lines.append(measured(f"{NAMES[str(task)]}, right", paired(part, "right", ["row"])))
    return markdown(["refused, unless said otherwise", "n", "base", "student", "change, points"], lines)


def demo_sets() -> str:
    """Make the table of every set: both judges by wording, and the damage."""
    rows = pd.read_csv(RESULTS / "demo-protocol-prompts.csv")
    lines = []
    for name in [name for name in NAMES if (rows.set == name).any()]:
        part = rows[rows.set == name]
        both = {m: paired(part, m, ["row"]) for m in ("declines", "refuses", "repeats")}
        opens, repeats = (
            f"{percent(both[m].base.mean())} → {percent(both[m].student.mean())}"
            for m in ("refuses", "repeats")
        )
        lines.append([*measured(NAMES[name], both["declines"]), opens, repeats])
    titles = [
        "set",
        "n",
        "refused: base",
        "student",
        "change, points",
        "by its opening",
        "repeats four words",
    ]
    return markdown(titles, lines)


def demo_curve() -> str:
    """Make the table of the line of a constant: over-refusal at equal harmful refusals, and the area."""
    rows = pd.read_csv(RESULTS / "demo-protocol-margins.csv")
    margins = {(m, s): part.margin.to_numpy() for (m, s), part in rows.groupby(["model", "set"])}
    public = POOLS[next(iter(POOLS))]
    random, lines = np.random.default_rng(0), []

    def measures(model: str, name: str, draw: bool) -> tuple[float, float]:
        harmful, harmless = np.concatenate([margins[model, s] for s in public]), margins[model, name]
        if draw:
            harmful, harmless = (random.choice(values, len(values)) for values in (harmful, harmless))
        line = bias_curve(harmful, harmless, held_out_tables.NATS)
        return curve_area(line), over_refusal_at(line, HARMFUL)

    for name in ("xstest", "everyday", "own-hazard-words", "own-harmless"):
        cells = []
        for model in ("base", "student"):
            area, over = measures(model, name, draw=False)
            drawn = np.array([measures(model, name, draw=True) for _ in range(N_DRAWS)])
            (low, over_low), (high, over_high) = np.percentile(drawn, [2.5, 97.5], axis=0)
            cells += [rate_ranged(over, over_low, over_high), ranged(area, low, high, ".2f", 1)]
        lines.append([NAMES[name], *cells])
    at = f"at {percent(HARMFUL)}"
    titles = ["set", f"base and a constant, {at}", "area", f"student and a constant, {at}", "area"]
    return markdown(titles, lines)


def demo_suite() -> str:
    """Make the table of the demo's suite, with the anchor on S and over the whole vocabulary."""
    plain, anchored = suite("demo-suite"), suite("demo-full-anchor-suite")
    rates = {
        "own-harmful": "harmful refused",
        "own-harmless": "harmless twin refused",
        "arc_easy": "ARC-Easy",
        "piqa": "PIQA",
        "lambada_openai": "LAMBADA",
    }
    numbers = {
        "WikiText-2": "WikiText-2 perplexity",
        "harmless answers": "KL(base, student), nats per token",
        "harmless prompts": "shift, in units of the base's spread",
    }
    models = ((plain, "base"), (plain, "student"), (anchored, "student"))
    lines = [[t, *(with_interval(*rows[m, name]) for rows, m in models)] for name, t in rates.items()]
    for name, title in numbers.items():
        cells = [f"{rows[m, name][0]:.2f}" if (m, name) in rows else "" for rows, m in models]
        lines.append([title, *cells])
    return markdown(["", "base", "student", "student, anchor over the whole vocabulary"], lines)


def comparison() -> str:
    """Make the table of all methods."""
    table = pd.read_csv(RESULTS / "comparison.csv")
    order = [
        "base",
        "system prompt",
        "teacher",
        "sft",
        "dpo",
        "full",
        "safesteer",
        "full anchor",
        "light anchor",
    ]
    table = table.sort_values("method", key=lambda names: names.map(order.index), kind="stable")
    return summary(table, "method", {"kl_harmless": 3, "wikitext2_perplexity": 2, **CAPABILITY})


def coverage(folder: Path = RESULTS) -> str:
    """Make the table of what S covers before training."""
    table = pd.read_csv(folder / "selection_coverage.csv")
    lines = []
    for row in table.to_dict("records"):
        shares = [percent(row[f"kl_share_{kind}"]) for kind in ("harmful", "harmless")]
        first = re.findall(r"'[^']*'", row["tokens"])[:6]
        lines.append([row["arm"], str(row["n_tokens"]), *shares, " ".join(first)])
    return markdown(["arm", "tokens", "harmful prompts", "harmless prompts", "the first of them"], lines)


JUDGES = {  # in judges.csv: name in the table
    "refuses": "`refuses`: how it opens",
    "refuses_anywhere": "`refuses_anywhere`: a phrase anywhere",
    "declines": "`declines`: its sentences",
    "embeddings": "`EmbeddingJudge`, all-MiniLM-L6-v2",
    "chat": "`ChatJudge`, Qwen2.5-Coder-1.5B-Instruct",
    "second reader": "a second annotator (110 of the answers)",
}
COMPARED = ("refuses", "declines", "embeddings")  # the judges whose differences are listed


def judges() -> str:
    """Make the table of precision, recall and kappa of every judge."""
    table = pd.read_csv(RESULTS / "judges.csv").set_index(["judge", "part"])

    def cells(judge: str, part: str) -> list[str]:
        if (judge, part) not in table.index:
            return ["", ""]
        row = table.loc[(judge, part)]
        return [ranged(row[m], row[f"{m}_low"], row[f"{m}_high"]) for m in ("precision", "recall")]

    lines = []
    for judge, title in JUDGES.items():
        if judge not in table.index.get_level_values(0):
            continue
        row = table.loc[(judge, "labelled answers")]
        seconds = "" if pd.isna(row.seconds) else f"{row.seconds:.1f}"
        long, short, hard = (cells(judge, p) for p in ("128 tokens", "32 tokens", "hard wordings"))
        kappa = ranged(row.kappa, row.kappa_low, row.kappa_high, ".2f", 1)
        lines.append([title, *long, *short, kappa, *hard, seconds])
    titles = ["judge, %", "128 tokens: precision", "recall", "32 tokens: precision", "recall"]
    titles += ["kappa, all", "hard wordings: precision", "recall", "seconds"]
    return markdown(titles, lines)


def judges_differ() -> str:
    """Make the table of the labelled answers on which judges differ from the label."""
    rows = pd.DataFrame(json_lines(RESULTS / "labelled_answers.jsonl")).set_index("id")
    verdicts = pd.read_csv(RESULTS / "judge_verdicts.csv", dtype={"id": str})
    shown = verdicts[verdicts.judge.isin(COMPARED) & verdicts.id.isin(rows.index)]
    says = shown.assign(says=shown.p_refuses >= 0.5).pivot(index="id", columns="judge", values="says")
    label = (rows.label == "refuses").reindex(says.index)
    lines = []
    for i, row in says[says.ne(label, axis=0).any(axis=1)].iterrows():
        wrong = [f"`{name}`" for name in COMPARED if row[name] != label[i]]
        text = " ".join(rows.answer[i].split())
        text = f"{text[:110]} ..." if len(text) > 110 else text
        lines.append([str(i), rows.label[i], ", ".join(wrong), text.replace("|", "\\|")])
    return markdown(["answer", "label", "judges that differ", "its beginning"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "demo": demo,
    "held-out": lambda: markdown(*held_out_tables.table()),
    "held-out-margins": lambda: markdown(*held_out_tables.margins_table()),
    "held-out-wide": lambda: markdown(*held_out_tables.table(held_out_tables.WIDE)),
    "held-out-wide-margins": lambda: markdown(*held_out_tables.margins_table(held_out_tables.WIDE)),
    "held-out-unseen": lambda: markdown(*held_out_tables.table(held_out_tables.UNSEEN)),
    "held-out-unseen-margins": lambda: markdown(*held_out_tables.margins_table(held_out_tables.UNSEEN)),
    "demo-seeds": lambda: markdown(*held_out_tables.table(held_out_tables.QUICK)),
    "demo-seeds-margins": lambda: markdown(*held_out_tables.margins_table(held_out_tables.QUICK)),
    "two-sided-arms": lambda: markdown(*control_tables.two_sided_arms()),
    "methods": lambda: markdown(*control_tables.methods()),
    "two-sided-sets": lambda: markdown(*control_tables.sets_of_tokens()),
    "whole": lambda: markdown(*whole_tables.table()),
    "recipes-on-val": lambda: markdown(*whole_tables.on_val()),
    "search-knee": lambda: markdown(*whole_tables.knee()),
    "gentle-seeds": lambda: markdown(*held_out_tables.table(held_out_tables.GENTLE)),
    "gentle-seeds-margins": lambda: markdown(*held_out_tables.margins_table(held_out_tables.GENTLE)),
    "demo-sets": demo_sets,
    "demo-curve": demo_curve,
    "which-tokens-steps": lambda: markdown(*control_tables.steps_table()),
    "which-tokens-at": lambda: markdown(*control_tables.at_equal_harm()),
    "which-tokens-first": lambda: markdown(*control_tables.instruments()),
    "gated": lambda: markdown(*control_tables.gated()),
    "how-deep": robust_tables.depth_table,
    "how-deep-wrappers": robust_tables.wrapper_table,
    "how-deep-weights": robust_tables.weight_table,
    "deeper": robust_tables.deeper_table,
    "deeper-val": lambda: robust_tables.deeper_table(split="val"),
    "opened": robust_tables.opened_table,
    "seal": robust_tables.seal_table,
    "judges": judges,
    "judges-differ": judges_differ,
    "demo-suite": demo_suite,
    "comparison": comparison,
    "coverage": coverage,
    "coverage-refusing": lambda: coverage(paper_tables.ROWS),
    "paper-tables": lambda: markdown(*paper_tables.table()),
}


def rewritten(text: str, page: str) -> tuple[str, list[str]]:
    """Make every marked table of a page anew.

    Args:
        text: The page.
        page: Its name, for errors.

    Returns:
        The page as it should be, and the names of the tables that differ.
    """
    names = re.findall(r"<!-- table: ([\w-]+) -->", text)
    if unknown := set(names) - TABLES.keys():
        raise SystemExit(f"{page} has tables that no function makes: {', '.join(sorted(unknown))}.")
    if len(MARKED.findall(text)) != len(names):
        raise SystemExit(f"A table of {page} has no <!-- end -->: close each of {', '.join(names)}.")
    differ: list[str] = []

    def anew(match: re.Match[str]) -> str:
        table = f"\n{TABLES[match[2]]().rstrip()}\n\n"
        if table != match[3]:
            differ.append(match[2])
        return f"{match[1]}{table}{match[4]}"

    return MARKED.sub(anew, text), differ


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table differs")
    options, wrong = parser.parse_args(), []
    for page in PAGES:
        text, differ = rewritten(page.read_text(encoding="utf-8"), page.name)
        wrong += [f"{page.name}: {name}" for name in differ]
        if differ and not options.check:
            page.write_text(text, encoding="utf-8")
    print("\n".join(wrong) or "Every table is that of its rows.")
    if wrong and options.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
