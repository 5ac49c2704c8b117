"""The demo's student beside its base, once, by the protocol: other people's prompts first, and the damage.

    safesteer align smollm2-135m --preset quick --out runs/demo
    python analysis/demo.py runs/demo --data ROWS [--out analysis/results]

Claim: 100 harmful prompts and fifty tokens make a model refuse harmful requests and leave others alone. It
is refuted here if over-refusal on other people's harmless prompts rises by a like share, or if answers break.

1. Run the suite "small" with 500 rows per task (harmful and harmless sets, tasks, perplexity, drift).
2. Judge every answer by how it opens (`refuses`) and by its sentences (`declines`, the default), and look for
   damage: repeated runs of four words, length, code where code was asked for.
3. Read the margin of the tokens that open refusals, for base and student: with a constant on their logits a
   model without training refuses as many. A student that tells harmful from harmless no better lies on the
   line of its base.
4. Write a row per model and prompt without its text (the sets are other people's), and the table from them:
   rates, the paired change with its 95 % interval and McNemar's p.
Every look is a row of `looks.csv`. The answers stay in the suite's folder.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
from ablation import LEDGER
from tables import RESULTS, paired

from safesteer._files import json_lines, read_json
from safesteer._intervals import wilson
from safesteer.directions.refusal_tokens import RefusalTokens
from safesteer.evaluation.changes import paired_change
from safesteer.evaluation.curves import refusal_margins
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.quality import repeats_itself, text_quality
from safesteer.evaluation.sets import set_kind
from safesteer.evaluation.suite import SUITES, run_suite
from safesteer.judges.judge import judge_version
from safesteer.judges.sentences import declines
from safesteer.judges.wording import refuses
from safesteer.models.chat_model import ChatModel
from safesteer.models.loading import load_model

N_ROWS = 500
TASKS = SUITES["small"].tasks


def read_answers(folder: Path) -> pd.DataFrame:
    """Read the suite's answers, each with its place in its set."""
    answers = pd.DataFrame(json_lines(folder / "suite_answers.jsonl"))
    return answers.assign(row=answers.groupby(["model", "set"]).cumcount())


def prompt_rows(answers: pd.DataFrame) -> pd.DataFrame:
    """Judge every answer again; a row per model and prompt, without the texts."""
    rows = []
    for asked in answers.itertuples():
        quality = text_quality([asked.prompt], [asked.answer])
        rows.append(
            {
                "set": asked.set,
                "row": asked.row,
                "model": asked.model,
                "refuses": refuses(asked.prompt, asked.answer),
                "declines": declines(asked.prompt, asked.answer),
                "repeats": repeats_itself(asked.answer),
                "words": quality.words,
                "code": quality.code,
            }
        )
    return pd.DataFrame(rows)


def task_rows(folder: Path) -> pd.DataFrame:
    """Read which rows of the tasks were answered right."""
    rows = []
    for task in TASKS:
        for model in ("base", "student"):
            correct = read_json(folder / "parts" / f"{model}--{task}.json")["correct"]
            rows += [
                {"task": task, "row": i, "model": model, "right": c["verdict"]} for i, c in enumerate(correct)
            ]
    return pd.DataFrame(rows)


def compared(name: str, kind: str, metric: str, both: pd.DataFrame) -> dict:
    """Compare base and student on the same rows, of which `both` has one per model."""
    values = {model: both[model].astype(bool).tolist() for model in ("base", "student")}
    row = {"name": name, "kind": kind, "metric": metric, "n": len(both)}
    for model, holds in values.items():
        low, high = wilson(sum(holds), len(holds))
        row |= {model: sum(holds) / len(holds), f"{model}_low": low, f"{model}_high": high}
    change = paired_change(values["base"], values["student"])
    return row | {"change": change.value, "low": change.low, "high": change.high, "p": change.p}


def table(prompts: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    """Make the table: a row per set and measure, and per task."""
    rows = []
    for name, part in prompts.groupby("set", sort=False):
        for metric in ("declines", "refuses", "repeats", "code"):
            both = paired(part, metric, ["row"])
            if len(both):
                rows.append(compared(str(name), set_kind(str(name)), metric, both))
    for name, part in tasks.groupby("task", sort=False):
        rows.append(compared(str(name), "capability", "right", paired(part, "right", ["row"])))
    return pd.DataFrame(rows)


def single_numbers(folder: Path) -> pd.DataFrame:
    """Read what has one number per model: perplexity, drift, length."""
    results = pd.read_csv(folder / "results.csv")
    kept = results[results.kind.isin(("perplexity", "drift")) | (results.metric == "words per answer")]
    return kept[["model", "kind", "name", "metric", "value", "low", "high", "n"]]


def margin_rows(run: Path, models: dict[str, ChatModel], answers: pd.DataFrame) -> pd.DataFrame:
    """Measure how near every prompt is to a refusal at the first token; a row per model and prompt."""
    ids = RefusalTokens.load(run / "refusal_tokens.csv").ids
    prompts = answers[answers.model == "base"]
    parts = [
        prompts[["set", "row"]].assign(
            model=model, margin=refusal_margins(chat, ids, prompts.prompt.tolist())
        )
        for model, chat in models.items()
    ]
    return pd.concat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run on smollm2-135m")
    parser.add_argument("--data", type=Path, help="a folder of local benchmark rows; none: the Hub's")
    parser.add_argument("--suite", type=Path, help="the suite's folder; none: in the run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = args.suite or args.run / "suite-protocol"
    # Judged by `refuses` while it runs: both judges read the answers below.
    run_suite(args.run, replace(SUITES["small"], n_rows=N_ROWS), folder, data=args.data, judge=refuses)
    answers = read_answers(folder)
    prompts, tasks = prompt_rows(answers), task_rows(folder)
    prompts.to_csv(args.out / "demo-protocol-prompts.csv", index=False)
    tasks.to_csv(args.out / "demo-protocol-tasks.csv", index=False)
    made = table(prompts, tasks).assign(judge_version=judge_version(declines))
    made.round(4).to_csv(args.out / "demo-protocol.csv", index=False)
    single_numbers(folder).round(4).to_csv(args.out / "demo-protocol-numbers.csv", index=False)
    sources = {"base": "smollm2-135m", "student": str(args.run / "model")}
    models = {model: replace(load_model(name), name=f"demo {model}") for model, name in sources.items()}
    margins = margin_rows(args.run, models, answers)
    margins.round(4).to_csv(args.out / "demo-protocol-margins.csv", index=False)
    for model, chat in models.items():
        for split, n in prompts[prompts.model == model].groupby("set", sort=False).size().items():
            log_look(args.out / LEDGER.name, chat, str(split), int(n), "study demo: README's table")


if __name__ == "__main__":
    main()
