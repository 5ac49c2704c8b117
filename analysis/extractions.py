"""How the extractions differ on one model: which one finds a direction that makes it refuse?

    python analysis/extractions.py [--model smollm2-135m] [--pairs 8] [--out analysis/results]

Directions are read from the train split, at the first and the last template position, and scored on
the first pairs of val; the best few are scored beside a random direction of the same length and one
from shuffled labels, and again on the other pairs of val. The best by steering score is then looked at
by what counts, greedy answers to harmful prompts that it never saw. Writes `extractions.csv` (all
candidates) and `extractions.md` (the table).
"""

import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console

import safesteer as ss
from safesteer.directions.calibration import choose_coeff
from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import (
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.directions.refusal_tokens import learn_refusal_tokens
from safesteer.directions.sweeping import sweep

EXTRACTIONS = {
    "prefill contrast": prefill_contrast,
    "difference of means": mean_difference,
    "system prompts": system_contrast,
    "PCA of pairs": pca_difference,
    "logistic probe": logistic_probe,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("analysis/results"))
    options = parser.parse_args()
    console, chat, prompts = Console(), ss.load_model(options.model), ss.load_prompts()
    train, val = prompts.split("train").first(64), prompts.split("val")
    refusal = learn_refusal_tokens(chat, val.harmful, val.harmless, ss.refuses)
    console.print(refusal)
    config = ss.DirectionConfig(rank_by="steering", n_val=options.pairs, n_controls=2, n_held_out=1)
    held_out = val.after(options.pairs)
    assert held_out is not None
    tables, rows = [], []
    for name, extract in EXTRACTIONS.items():
        candidates = extract(chat, train)
        ends = sorted({0, len(candidates.positions) - 1})
        shuffled = None if candidates.shuffled is None else candidates.shuffled[ends]
        names = tuple(candidates.positions[i] for i in ends)
        at_ends = Candidates(candidates.vectors[ends], names, candidates.extraction, shuffled)
        result = sweep(chat, at_ends, val, refusal.ids, config, held_out=held_out)
        tables.append(result.table.assign(extraction=name))
        best = result.best
        direction, rates = choose_coeff(
            chat, result.directions(chat)[:1], held_out.harmful[:16], ss.refuses, coeffs=(1.0, 1.8, 3.0)
        )
        ablated = result.table.ablation_refusal.min()
        rows.append(
            {
                "extraction": name,
                "position": best.position,
                "layer": best.layer,
                "steering": f"{best.steering_refusal:.2f} ({best.steering_refusal_low:.2f} to"
                f" {best.steering_refusal_high:.2f})",
                "held out": f"{best.steering_refusal_held_out:.2f}",
                "random": f"{best.steering_refusal_random:.2f}",
                "shuffled": f"{best.steering_refusal_shuffled:.2f}",
                "lowest ablation": f"{ablated:.2f}",
                "KL of ablation": f"{best.kl_harmless:.3f}",
                "answers that refuse": f"{rates.refusal_rate.max():.0%} at {direction.coeff:g}",
            }
        )
        console.print(rows[-1])
        options.out.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(options.out / "extractions.csv", index=False)
        table = pd.DataFrame(rows)
        lines = ["| " + " | ".join(map(str, r)) + " |" for r in (table.columns, *table.to_numpy())]
        lines.insert(1, "|" + "---|" * len(table.columns))
        (options.out / "extractions.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
