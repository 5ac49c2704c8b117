"""A recipe that leaves a model whole which hardly refuses by itself: each idea added, and each taken away.

    python analysis/whole.py RUN --data ROWS [--seed 0] [--arms ...] [--out analysis/results/whole]

Claim (ours): what damages the demo's student (answers that repeat themselves, code that is gone, refusals at
a hazard word) can be held without losing its refusals. Refuted where no arm refuses as much with less damage.

RUN receives direction and S of the preset "quick" on SmolLM2-135M-Instruct. All arms train with its other
settings on train and distill, in bfloat16 passes; "all" has every idea of `IDEAS` at once. Each student is
looked at on what is there for choosing (two_sided.py): refusals of 16 tokens with their margins, a row per
prompt; and in a row per arm what answers of 64 tokens to everyday val prompts read like, the drift along the
base's own answers, and the perplexity of plain prose. Nothing here is a test prompt.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from two_sided import choosing_sets, look, opening_ids

import safesteer as ss
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.quality import text_quality
from safesteer.models.drift import kl_on_answers
from safesteer.models.precision import in_precision_of
from safesteer.models.text_loss import general_text, perplexity
from safesteer.run_folder import STAGES

QUICK = replace(  # as it was before this study
    ss.recipe("quick").distill,
    n_steps=50,
    anchor_support="same",
    anchor_weight=2.0,
    late_anchor_weight=6.0,
    micro_batch=28,
    splits=("train", "distill"),
    precision="bfloat16",
    watch_every=0,
)
IDEAS = {
    "texts": {"texts_per_step": 4},
    "margin": {"margin_weight": 2.0},
    "two-sided": {"harmless_teacher": "ablated"},
    "mixed prompts": {"prompts": "mixed"},
    "slow": {"lr": 1e-4},
}
# Harmless answers held to the base over all tokens, by lighter weights: S holds a third of the divergence.
WHOLE_ANCHOR = {"anchor_support": "full", "anchor_weight": 1.0, "late_anchor_weight": 4.0}
COMBINED = {
    "whole anchor": WHOLE_ANCHOR,
    "whole anchor, later tokens count more": WHOLE_ANCHOR | {"decay": 0.95},
    "whole anchor, lighter": WHOLE_ANCHOR | {"anchor_weight": 0.5, "late_anchor_weight": 1.5},
    "whole anchor and texts": WHOLE_ANCHOR | IDEAS["texts"],
    "two-sided and whole anchor": WHOLE_ANCHOR | IDEAS["two-sided"],
    "whole anchor, more harmful prompts": WHOLE_ANCHOR | {"harmful_per_step": 14, "harmless_per_step": 14},
    "whole anchor, 75 steps": WHOLE_ANCHOR | {"n_steps": 75},
    "whole anchor, later tokens lighter": WHOLE_ANCHOR | {"late_anchor_weight": 2.0},
    "whole anchor, texts and mixed prompts": WHOLE_ANCHOR | IDEAS["texts"] | IDEAS["mixed prompts"],
    # Adam moves every weight by as much, also those whose gradient is noise: a floor leaves them alone.
    "Adam, eps 1e-4": {"eps": 1e-4, "lr": 6e-4},
}
SHORT = ("all", "all but slow")  # also in 30 steps: twelve minutes are all that a demo may take
N_LONG, LONG = 64, 64  # everyday prompts that are answered at length, and that length


def arms() -> dict[str, dict]:
    """Name the arms: the preset, each idea alone, all of them, and all but each."""
    everything = {key: value for idea in IDEAS.values() for key, value in idea.items()}
    without = {
        f"all but {name}": {key: value for key, value in everything.items() if key not in idea}
        for name, idea in IDEAS.items()
    }
    short = {f"{name}, 30 steps": ({"all": everything} | without)[name] | {"n_steps": 30} for name in SHORT}
    return {"quick": {}, **IDEAS, "all": everything, **without, **short, **COMBINED}


def long_prompts() -> list[str]:
    """Return everyday val prompts, those that ask for code among them."""
    val = ss.load_prompts("kinds").split("val")
    return [p.text for p in val.prompts if p.form == "everyday"][:N_LONG]


def damage(base: ss.ChatModel, chat: ss.ChatModel, before: list[str], harmless: list[str]) -> dict:
    """Measure what answers read like, and how far the model is from its base."""
    prompts = long_prompts()
    answers = ss.generate(chat, prompts, max_new_tokens=LONG, batch_size=32)
    quality = text_quality(prompts, answers)
    kls = kl_on_answers(base, chat, harmless, before)
    numbers = {
        "repeats": quality.repeats,
        "distinct": quality.distinct,
        "words": quality.words,
        "code": quality.code,
        "n": quality.n,
        "n_code": quality.n_code,
        "kl": sum(kls) / len(kls),
        "perplexity": perplexity(chat, general_text(), max_tokens=4096),
    }
    print({name: round(value, 3) for name, value in numbers.items() if value is not None}, flush=True)
    return numbers


def student_of(changes: dict, base: ss.ChatModel, args: argparse.Namespace) -> ss.ChatModel:
    """Train an arm's student."""
    changes = dict(changes)
    prompts = ss.load_prompts(changes.pop("prompts", "pairs")).split("train", "distill")
    eps = changes.pop("eps", 1e-8)
    config = replace(QUICK, seed=args.seed, **changes)
    direction = ss.Direction.load(args.run / "direction.safetensors", base)
    tokens = ss.TokenSet.load(args.run / "tokens.json")
    state = prepare_student(ss.load_model(args.model, dtype="float32"), direction, config)
    for group in state.optimizer.param_groups:
        group["eps"] = eps
    for record in training_steps(state, Teacher(base, direction, tokens), prompts):
        if record.step % 10 == 0:
            print(record.step, f"loss {record.loss:.4f} grad {record.grad_norm:.3f}", flush=True)
    state.optimizer.zero_grad(set_to_none=True)
    return state.student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="*", default=list(arms()))
    parser.add_argument("--out", type=Path, default=Path("analysis/results/whole"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.run / "tokens.json").exists():
        ss.align(args.model, args.run, ss.recipe("quick", args.seed), stages=STAGES[:2])
    base = ss.load_model(args.model, dtype="bfloat16")
    sets, ids = choosing_sets(args.data), opening_ids(args.run)
    harmless = ss.load_prompts().split("val").harmless
    before = ss.generate(base, harmless, max_new_tokens=16, batch_size=32)
    for name in ("base", *args.arms):
        stem = f"{name.replace(' ', '_')}--{args.seed}"
        if (args.out / f"{stem}.damage.csv").exists():
            continue
        print(name, flush=True)
        student = base if name == "base" else student_of(arms()[name], base, args)
        with torch.no_grad(), in_precision_of(base, student):
            look(student, sets, ids).to_csv(args.out / f"{stem}.rows.csv", index=False)
            numbers = damage(base, student, before, harmless)
        pd.DataFrame([numbers]).round(4).to_csv(args.out / f"{stem}.damage.csv", index=False)


if __name__ == "__main__":
    main()
