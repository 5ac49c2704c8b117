"""A student of the two-sided teacher: what does it, what can carry it, and what it costs.

    python analysis/two_sided.py RUN --data ROWS [--out analysis/results/two_sided]

Claim (ours): a teacher that refuses more where a prompt is harmful and less where it is not teaches a model
to tell the two apart, and on fifty tokens that occur. Refuted where the same student of a one-sided teacher
(harmless answers held to the base as it is) lies on the same curve, or the base's line of a constant does.

"two-sided" began: whole vocabulary, symmetric divergence, harmful prompts steered, on harmless ones the
direction ablated, every second answer opened by the steered teacher, 12 tokens, all weights, 8 + 8 prompts
per step of pairs (train, distill) and of other kinds (train). "first tokens, both on S" ended the search, and
the last arms take parts of it away. Nothing here is a test prompt: arms are compared on val splits and on
public prompts that are there for choosing. After each of the steps of CHECKS every prompt is answered, and is
a row. S (minimum probability 1e-3) is that of which_tokens.py, which comes first.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from which_tokens import answer_rows, drawn_sets, with_ids

import safesteer as ss
from safesteer._files import json_lines
from safesteer.directions.refusal_tokens import RefusalTokens
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import DistillState, prepare_student
from safesteer.evaluation.curves import refusal_margins
from safesteer.models.precision import in_precision_of
from safesteer.prompts.prompt_set import PromptSet
from safesteer.tokens.token_set import TokenSet

CHECKS = (24, 40, 60)
TWO_SIDED = ss.DistillConfig(
    divergence="symmetric",
    normalizer="generalized",
    support="full",
    harmless_teacher="ablated",
    anchor_support="full",
    train_layers="all",
    n_steps=24,
    harmful_per_step=8,
    harmless_per_step=8,
    n_rollouts=1,
    max_new_tokens=12,
    rollouts="mixed",
    anchor_weight=1.0,
    late_anchor_weight=1.0,
    decay=1.0,
    lr=1e-5,
    precision="bfloat16",
    micro_batch=24,
)
COEFF = 1.6
SEEDED = (
    "first tokens, both on S",
    "both on S, one-sided",
    "both on matched tokens",
    "both on random tokens",
    "both over all tokens",
)
READERS = {"band": "kinds", "wide": "all"}  # readers by the prompts that they are fitted on
WIDE = {"wide harmful", "wide harmless"}  # sets that came later


@dataclass(frozen=True)
class Arm:
    """Settings, the teacher's coefficient, and which prompts train."""

    config: ss.DistillConfig
    coeff: float = COEFF
    prompts: Literal["pairs", "kinds", "all"] = "kinds"
    tokens: str = "S"  # or "random", "matched": other sets of fifty


def arms() -> dict[str, Arm]:
    """Name the arms: the way to the preset "two-sided", then what it is without one of its parts."""
    full = TWO_SIDED
    first = replace(
        full,
        support="safety",
        decay=0.7,
        max_new_tokens=8,
        harmful_per_step=12,
        harmless_per_step=12,
        n_steps=40,
    )
    on_s = replace(first, anchor_support="same", n_steps=24)
    preset = replace(on_s, anchor_weight=1.5, late_anchor_weight=1.5)
    return {
        "constant rate": Arm(replace(full, n_steps=100, warmup=0)),  # its rows are of steps 6 and 12
        "two-sided": Arm(full),
        "long on S": Arm(replace(full, support="safety", n_steps=60)),
        "first tokens": Arm(first),
        "first tokens, upper blocks": Arm(replace(first, train_layers="from_steered")),
        "first tokens, both on S": Arm(on_s),
        "both on S, harmless by 1.5": Arm(preset),
        "both on S, wide prompts": Arm(replace(preset, n_steps=32), prompts="all"),
        "both on S, wide prompts, blocks": Arm(replace(preset, train_layers="blocks"), prompts="all"),
        "both on random tokens": Arm(on_s, tokens="random"),
        "both on matched tokens": Arm(on_s, tokens="matched"),
        "both over all tokens": Arm(replace(on_s, support="full", anchor_support="full")),
        "both on S, one-sided": Arm(replace(on_s, harmless_teacher="base")),
        "both on S, pairs only": Arm(on_s, prompts="pairs"),
        "both on S, answers of the student": Arm(replace(on_s, rollouts="student")),
    }


def training_prompts(which: str) -> PromptSet:
    """Return the prompts that train: pairs, also those of other kinds, or all of the project's."""
    prompts = ss.load_prompts("all" if which == "all" else "pairs").split("train", "distill")
    if which == "kinds":
        added = ss.load_prompts("kinds").split("train").prompts
        prompts = PromptSet(prompts.prompts + added, "pairs and kinds")
    return prompts


def choosing_sets(data: Path | None) -> dict[str, list[str]]:
    """Return the prompts that arms are compared on, no test prompts; without rows our own alone."""
    pairs, kinds, wide = (ss.load_prompts(name).split("val") for name in ("pairs", "kinds", "wide"))

    def public(label: str) -> list[str]:
        return [] if data is None else [row["prompt"] for row in json_lines(data / f"{label}_train.jsonl")]

    sets = {
        "pairs harmful": pairs.harmful,
        "kinds harmful": kinds.harmful,
        "public harmful": public("harmful")[::4],
        "pairs harmless": pairs.harmless,
        "kinds harmless": kinds.harmless,
        "wide harmful": wide.harmful,
        "wide harmless": wide.harmless,
        "public harmless": public("harmless")[:60],
    }
    return {name: texts for name, texts in sets.items() if texts}


def run(
    name: str,
    arm: Arm,
    base: ss.ChatModel,
    direction: ss.Direction,
    tokens: TokenSet,
    args: argparse.Namespace,
) -> None:
    """Train one arm with one seed, and write a row per prompt and check."""
    path = args.out / f"{name.replace(' ', '_')}--{args.seed}.rows.csv"
    if path.exists():
        return
    config, sets, ids = replace(arm.config, seed=args.seed), choosing_sets(args.data), opening_ids(args.run)
    state = prepare_student(ss.load_model(args.model), direction, config)
    if arm.tokens != "S":
        drawn = drawn_sets(base, direction, tokens, args.out / "drawn.json")[arm.tokens]
        tokens = with_ids(tokens, drawn[args.seed % len(drawn)])
    teacher, looks = Teacher(base, direction.with_coeff(arm.coeff), tokens), []
    for record in training_steps(state, teacher, training_prompts(arm.prompts)):
        print(name, record.step, f"loss {record.loss:.4f} grad {record.grad_norm:.3f}", flush=True)
        if record.step in CHECKS or record.step == config.n_steps:
            looks.append(look_while_training(name, state, base, sets, ids))
        if record.step == max(CHECKS):
            break
    if args.keep:
        for part in (state.student.model, state.student.tokenizer):
            part.save_pretrained(args.keep / path.stem)
    pd.concat(looks).to_csv(path, index=False)


def opening_ids(run: Path) -> torch.Tensor:
    """Return the tokens that open the base's refusals."""
    return RefusalTokens.load(run / "refusal_tokens.csv").ids


def look(chat: ss.ChatModel, sets: dict[str, list[str]], ids: torch.Tensor) -> pd.DataFrame:
    """Answer every prompt, and measure how near it is to a refusal at the first token."""
    margins = np.concatenate([refusal_margins(chat, ids, texts) for texts in sets.values()])
    rows = answer_rows(chat, sets).assign(margin=margins.round(3))
    harmful = rows.set.str.endswith("harmful")
    auc = {
        kind: round(float(roc_auc_score(harmful[at], rows.margin[at])), 3)
        for kind in ("pairs", "kinds", "wide", "public")
        if (at := rows.set.str.startswith(kind)).any()
    }
    print("AUC of the margin:", auc, flush=True)
    return rows


def look_while_training(
    name: str, state: DistillState, base: ss.ChatModel, sets: dict[str, list[str]], ids: torch.Tensor
) -> pd.DataFrame:
    """Look at a student between two steps, in the base's precision."""
    state.optimizer.zero_grad(set_to_none=True)
    with in_precision_of(base, state.student):
        rows = look(state.student, sets, ids).assign(step=state.step)
    rates = rows.groupby("set", sort=False).refused.mean().round(2).to_dict()
    print(name, state.step, rates, flush=True)
    return rows


def gated_rows(
    base: ss.ChatModel, direction: ss.Direction, reader: ss.HarmfulnessReader, sets: dict[str, list[str]]
) -> pd.DataFrame:
    """Answer every prompt under gated steering, without training: add, ablate, or leave alone."""
    with ss.steer(base, direction, gate=reader, closed="ablate"):
        rows = answer_rows(base, sets)
    scores = np.concatenate([reader.scores(base, texts) for texts in sets.values()])
    return rows.assign(score=scores.round(4), open=scores > reader.threshold, closed=scores <= reader.lower)


def write_gated(
    name: str,
    prompts: str,
    base: ss.ChatModel,
    direction: ss.Direction,
    out: Path,
    sets: dict[str, list[str]],
) -> None:
    """Fit a reader where it is missing, and answer under its gate."""
    path, rows = out / f"reader-{name}.safetensors", out / f"gated-{name}.csv"
    if not path.exists():
        ss.fit_reader(base, training_prompts(prompts)).save(path)
    if not rows.exists():
        reader = ss.HarmfulnessReader.load(path, base)
        gated = gated_rows(base, direction, reader, sets)
        gated.to_csv(rows, index=False)
        print(reader, gated.groupby("set", sort=False)[["open", "closed", "refused"]].mean(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", help="none: all with seed 0, those of SEEDED with another")
    parser.add_argument("--keep", type=Path, help="a folder that keeps the last student of every arm")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/two_sided"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = ss.load_model(args.model, dtype="bfloat16")
    direction = ss.Direction.load(args.run / "direction.safetensors", base)
    sets = choosing_sets(args.data)
    for file, names in {"base": set(sets) - WIDE, "base-wide": WIDE}.items():
        if not (args.out / f"{file}.csv").exists():
            part = {name: texts for name, texts in sets.items() if name in names}
            look(base, part, opening_ids(args.run)).to_csv(args.out / f"{file}.csv", index=False)
    for name, prompts in READERS.items():
        write_gated(name, prompts, base, direction.with_coeff(COEFF), args.out, sets)
    tokens = TokenSet.load(args.out.parent / "which_tokens" / "tokens-0.001.json")
    for name in args.arms or (SEEDED if args.seed else arms()):
        run(name, arms()[name], base, direction, tokens, args)


if __name__ == "__main__":
    main()
