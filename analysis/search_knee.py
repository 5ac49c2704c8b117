"""Does what a search chose hold on the test split? The knee's recipe on prompts that no trial has seen.

    safesteer search smollm2-135m --out SEARCH --set distill.n_steps=20 --trials 30
    python analysis/search_knee.py SEARCH RUNS [--seeds 0 1 2]

Claim (ours): the knee's numbers on val, with the luck of the best of many taken off (`corrected.csv`), are
those of the test split. Refuted where the test lies outside their 95 % intervals.

1. The first seed is the search's own: its direction and S were scored on val, and its student is the trial's.
2. The other seeds train the same recipe; the seed draws prompts' order, answers and S.
3. Base and students answer all test pairs, measured and judged as in the search. A row per prompt.
Each look is in the ledger. The search's own tables are copied beside the rows: they are what was promised.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
from ablation import LEDGER

import safesteer as ss
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.measuring import drift_answers, measure
from safesteer.evaluation.targets import load_target
from safesteer.judges.sentences import declines
from safesteer.run_folder import STAGES

PROMISED = ("corrected.csv", "trials.csv", "recipe.toml")  # of the search's folder


def rows_of(
    name: str, seed: int, chat: ss.ChatModel, base: ss.ChatModel, recipe: ss.Recipe, along: list[list[int]]
) -> pd.DataFrame:
    """Measure a model on the test pairs, and log the looks; a row per prompt, without its text."""
    test = ss.load_prompts().split("test")
    seen = measure(chat, base, test, recipe.evaluate, declines, along)
    for label in ("harmful", "harmless"):
        log_look(LEDGER, chat, f"own-{label}", len(test.texts(label)), f"study search_knee: {name} {seed}")
    kinds = [
        pd.DataFrame({"label": "harmful", "refused": seen.harmful, "kl": None}),
        pd.DataFrame({"label": "harmless", "refused": seen.harmless, "kl": seen.kls}),
    ]
    rows = pd.concat([kind.reset_index(names="row") for kind in kinds]).assign(model=name, seed=seed)
    return rows.assign(refused=rows.refused.astype(int), kl=rows.kl.astype(float).round(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("search", type=Path, help="the folder of a finished search")
    parser.add_argument("runs", type=Path, help="a folder that receives a run per seed")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("analysis/results/search"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in PROMISED:
        shutil.copy(args.search / name, args.out / name)
    stages = STAGES[: STAGES.index("export") + 1]
    for seed in args.seeds:
        path = args.out / f"test--{seed}.csv"
        if path.exists():
            continue
        recipe = ss.Recipe.load(args.search / "recipe.toml", seed=seed)
        run = ss.align(args.model, args.runs / str(seed), recipe, stages=stages)
        base, student = load_target(run, run).values()
        along = drift_answers(base, ss.load_prompts().split("test"), recipe.evaluate)
        if not (args.out / "base.csv").exists():
            rows_of("base", seed, base, base, recipe, along).to_csv(args.out / "base.csv", index=False)
        named = replace(student, name=f"student of seed {seed}")
        rows = rows_of("student", seed, named, base, recipe, along)
        rows.to_csv(path, index=False)
        print(seed, rows.groupby("label")[["refused", "kl"]].mean().round(3).to_dict(), flush=True)


if __name__ == "__main__":
    main()
