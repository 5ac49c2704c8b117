"""Recipes for a model that hardly refuses, measured on val as a search measures its trials, over seeds.

    python analysis/recipes_on_val.py --runs FOLDER [--seeds 0 1 2] [--recipes preset gentle]

Claim (ours): what one trial of a search found holds over seeds. Refuted where the seeds of the two recipes
cannot be told apart.

"preset" is the preset "quick", "gentle" a trial of a search over it with its numbers rounded. Both train on
train and distill, since val is what they are measured on (32 pairs, answers of 64 tokens, `declines`); a row
per prompt. No test prompt is read.
"""

import argparse
from pathlib import Path

import pandas as pd

import safesteer as ss
from safesteer.evaluation.measuring import Measured, measure
from safesteer.judges.sentences import declines
from safesteer.prompts.prompt_set import LABELS
from safesteer.run_folder import STAGES
from safesteer.settings import EvaluateConfig

GENTLE = {
    "direction.coeff": 1.6,
    "direction.max_layer_share": 0.6,
    "distill.n_steps": 42,
    "distill.lr": 1e-4,
    "distill.anchor_weight": 1.2,
    "distill.late_anchor_weight": 3.5,
}
RECIPES = {"preset": {}, "gentle": GENTLE}
ALIKE = {"dtype": "bfloat16", "distill.precision": "bfloat16", "distill.splits": "distill,train"}


def rows(measured: Measured, prompts: ss.PromptSet) -> list[dict]:
    """Return a row per prompt: refused or not, and the drift of harmless ones."""
    drifts = {"harmful": [None] * len(prompts.harmful), "harmless": measured.kls}
    return [
        {"label": label, "prompt": number, "refused": bool(refused), "kl": kl}
        for label in LABELS
        for number, (refused, kl) in enumerate(zip(getattr(measured, label), drifts[label], strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--out", type=Path, default=Path("analysis/results/recipes_on_val"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base, val = ss.load_model(args.model, dtype="bfloat16"), ss.load_prompts().split("val")

    def write(name: str, chat: ss.ChatModel) -> None:
        measured = measure(chat, base, val, EvaluateConfig(), declines)
        print(name, [round(value, 3) for value in measured.objectives], flush=True)
        pd.DataFrame(rows(measured, val)).to_csv(args.out / f"{name}.rows.csv", index=False)

    if not (args.out / "base.rows.csv").exists():
        write("base", base)
    for seed in args.seeds:
        for name in args.recipes:
            if (args.out / f"{name}--{seed}.rows.csv").exists():
                continue
            recipe = ss.recipe("quick", seed, **ALIKE, **RECIPES[name])
            run = ss.align(args.model, args.runs / f"{name}-{seed}", recipe, stages=STAGES[:4])
            write(f"{name}--{seed}", ss.load_model(str(run / "model"), dtype="bfloat16"))


if __name__ == "__main__":
    main()
