"""Test prompts, once: base, gated steering and the students of runs, at full length and with capability.

    python analysis/held_out.py --runs FOLDER --data ROWS [--out analysis/results/held_out]

Claim (ours): a student of the two-sided teacher refuses more harmful prompts of other people than its base,
no more harmless ones, and answers as well. Refuted where over-refusal, capability or text quality of three
seeds changes for the worse by more than chance.

FOLDER holds a run of the preset per seed, made here where it is missing. A seed draws the pairs that the
direction and S are read from, four fifths of train and val, and all that is random in training. Each run
gives a student and, without training, its base steered where its reader says so. Every prompt is answered
with 128 tokens, judged by its sentences (`declines`) and by its opening (`refuses`), and is a row without
its text; so is every row of a task. Each look is written into the ledger. Files in OUT are per model and set,
so an interrupted study continues.
"""

import argparse
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from ablation import LEDGER

import safesteer as ss
from safesteer.directions.refusal_tokens import RefusalTokens
from safesteer.distillation.checkpoints import CHECKPOINT
from safesteer.evaluation.capability import measure_capability
from safesteer.evaluation.curves import refusal_margins
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.quality import repeats_itself, text_quality
from safesteer.evaluation.sets import OWN, set_prompts
from safesteer.judges.sentences import declines
from safesteer.judges.wording import refuses
from safesteer.models.text_loss import perplexity, wikitext
from safesteer.report.reader_figures import READER_FILE
from safesteer.run_folder import STAGES

SETS = (
    "harmbench",
    "do-not-answer",
    "harmfulqa",
    "xstest-unsafe",
    "xstest",
    "everyday",
    "own-harmless",
    "own-harmful",
    "own-hazard-words",
    "own-short",
    "own-questions",
)
TASKS = {"lambada_openai": 500, "arc_easy": 200, "mmlu_stem": 200}  # rows
N_PROMPTS = 50  # per set
MAX_NEW_TOKENS = 128
PERPLEXITY_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Measured:
    """A model, by its name in the files, and how it is steered."""

    name: str
    chat: ss.ChatModel
    steering: AbstractContextManager[None]


def drawn_prompts(seed: int, which: str) -> ss.PromptSet:
    """Return the prompts of a seed: four fifths of the pairs of train and val, and all others."""
    prompts = ss.load_prompts(which).prompts
    pairs = sorted({p.pair for p in prompts if p.pair and p.split in ("train", "val")})
    left_out = set(random.Random(seed).sample(pairs, len(pairs) // 5))
    return ss.PromptSet(tuple(p for p in prompts if p.pair not in left_out), f"drawn by seed {seed}")


def recipe_of(seed: int, args: argparse.Namespace) -> ss.Recipe:
    """Return the preset with the settings that the command changes."""
    return ss.recipe(args.preset, seed, **dict(pair.split("=", 1) for pair in args.settings))


def run_of(seed: int, folder: Path, args: argparse.Namespace) -> Path:
    """Return the run of a seed, made up to its export where it is missing."""
    run = folder / str(seed)
    if not (run / "model" / "config.json").exists():
        recipe, stages = recipe_of(seed, args), STAGES[: STAGES.index("export") + 1]
        ss.align(args.model, run, recipe, prompts=drawn_prompts(seed, recipe.prompts), stages=stages)
        (run / CHECKPOINT).unlink()  # as large as the model, and exported
    return run


def measured(runs: list[Path], base: ss.ChatModel, only: list[str] | None) -> Iterator[Measured]:
    """Yield the base, and of each run its student and its gated base; one student is open at a time."""

    def wanted(name: str) -> bool:
        return only is None or name in only

    if wanted("base"):
        yield Measured("base", base, nullcontext())
    for seed, run in enumerate(runs):
        if not wanted(f"student-{seed}"):
            continue
        student = ss.load_model(str(run / "model"), dtype="bfloat16")
        yield Measured(f"student-{seed}", replace(student, name=f"student of seed {seed}"), nullcontext())
    for seed, run in enumerate(runs):
        if not wanted(f"gated-{seed}"):
            continue
        direction = ss.Direction.load(run / "direction.safetensors", base)
        reader = ss.HarmfulnessReader.load(run / READER_FILE, base)
        yield Measured(f"gated-{seed}", base, ss.steer(base, direction, gate=reader, closed="ablate"))


def drawn(name: str, data: Path, n: int) -> list[str]:
    """Return n prompts of a set: of our own the first ones, as all looks have taken them."""
    return set_prompts(name, data)[:n] if name in OWN else set_prompts(name, data, n)


def unseen_prompts(name: str, data: Path, seen: int) -> list[str]:
    """Draw the prompts of a set, without those that an earlier look at so many per set has drawn."""
    if not seen:
        return drawn(name, data, N_PROMPTS)
    before = set(drawn(name, data, seen))
    left = [prompt for prompt in set_prompts(name, data) if prompt not in before]
    return random.Random(0).sample(left, min(N_PROMPTS, len(left)))


def prompt_rows(model: Measured, name: str, prompts: list[str]) -> pd.DataFrame:
    """Answer a set of prompts and judge the answers; a row per prompt, without the texts."""
    answers = ss.generate(model.chat, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=50)
    log_look(LEDGER, model.chat, name, len(prompts), f"study held_out: {model.name}")
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        quality = text_quality([prompt], [answer])
        rows.append(
            {
                "model": model.name,
                "set": name,
                "row": i,
                "declines": int(declines(prompt, answer)),
                "refuses": int(refuses(prompt, answer)),
                "repeats": int(repeats_itself(answer)),
                "words": round(quality.words),
                "distinct": round(quality.distinct, 3),
                "code": quality.code,
            }
        )
    return pd.DataFrame(rows)


def margin_rows(model: Measured, ids: torch.Tensor, sets: dict[str, list[str]]) -> pd.DataFrame:
    """Measure how near every prompt is to a refusal at the first token; a row per prompt."""
    parts = []
    for name, prompts in sets.items():
        margins = refusal_margins(model.chat, ids, prompts).round(3)
        rows = {"model": model.name, "set": name, "row": range(len(prompts)), "margin": margins}
        parts.append(pd.DataFrame(rows))
        log_look(LEDGER, model.chat, name, len(prompts), f"study held_out: margins of {model.name}")
    return pd.concat(parts)


def task_rows(model: Measured, task: str, data: Path, folder: Path) -> pd.DataFrame:
    """Measure a task; a row per row of it."""
    result = measure_capability(model.chat, (task,), folder, data=data, limit=TASKS[task]).iloc[0]
    right = pd.Series(result.correct, name="right").astype(int)
    return pd.DataFrame({"model": model.name, "task": task, "row": right.index, "right": right})


def text_rows(model: Measured, data: Path) -> pd.DataFrame:
    """Measure the perplexity of plain text."""
    value = perplexity(model.chat, wikitext(data), max_tokens=PERPLEXITY_TOKENS)
    return pd.DataFrame([{"model": model.name, "perplexity": round(value, 3), "tokens": PERPLEXITY_TOKENS}])


def _without(sets: dict[str, list[str]], path: Path) -> dict[str, list[str]]:
    """Leave out the sets that a file of margins holds already."""
    known = set(pd.read_csv(path).set) if path.exists() else set()
    return {name: texts for name, texts in sets.items() if name not in known}


def measure(model: Measured, ids: torch.Tensor, sets: dict[str, list[str]], args: argparse.Namespace) -> None:
    """Write the files of a model that are missing; a gate reads prompts, and tasks have other rows."""
    tasks = () if model.name.startswith("gated") else (*TASKS, "margins", "wikitext2")
    with model.steering:
        for name in (*sets, *tasks):
            path = args.out / f"{model.name}--{name}.csv"
            # A look may ask other sets than one before.
            left = _without(sets, path) if name == "margins" else {}
            if path.exists() and not left:
                continue
            if name in sets:
                rows = prompt_rows(model, name, sets[name])
            elif name in TASKS:
                rows = task_rows(model, name, args.data, args.out.parent / "tasks")
            elif name == "margins":
                rows = margin_rows(model, ids, left)
                rows = pd.concat([pd.read_csv(path), rows]) if path.exists() else rows
            else:
                rows = text_rows(model, args.data)
            rows.to_csv(path, index=False)
            shown = next(c for c in ("declines", "right", "margin", "perplexity") if c in rows)
            print(model.name, name, round(float(rows[shown].mean()), 3), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="a folder with a run per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="two-sided")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seen", type=int, default=0, help="prompts per set that an earlier look has drawn")
    parser.add_argument("--only", nargs="*", help="models to measure, such as student-1; none: all")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/held_out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [run_of(seed, args.runs, args) for seed in range(args.seeds)]
    base = ss.load_model(args.model, dtype="bfloat16")
    ids = RefusalTokens.load(runs[0] / "refusal_tokens.csv").ids
    drawn = {name: unseen_prompts(name, args.data, args.seen) for name in SETS}
    sets = {name: prompts for name, prompts in drawn.items() if prompts}
    for model in measured(runs, base, args.only):
        measure(model, ids, sets, args)


if __name__ == "__main__":
    main()
