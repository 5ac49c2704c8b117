"""Does practice make refusals deeper? Students that read prompts in wrappers, or answers that were opened.

    python analysis/deeper.py RUNS [--model smollm2-135m] [--preset quick] [--seeds 0 1 2] [--set NAME=VALUE]

Claim (ours): a student that practises on some wrappers and openings, while its teacher reads the plain
prompt, refuses in others too, at no more over-refusal in the same wrappers. Refuted where the wrappers and
openings that nothing trains on take away as many refusals as from the plain recipe's student.

1. A seed draws the pairs that direction and S are read from (`held_out.drawn_prompts`), and all else.
2. Each arm is the preset with some shares of disguised prompts (`distillation.disguises`).
3. For choosing, students answer the val pairs plain, in the wrappers of "val" and opened by ten tokens of the
   openings that train; for measuring, the first test pairs in the wrappers of "test" and opened by others.
   Answers have 48 tokens; `declines` judges them, by the plain request. A row per prompt, without its text.
   With --splits val nobody looks at the test pairs.
Looks at the test pairs are in the ledger. A split of which a seed has an arm's rows is not looked at again.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from ablation import LEDGER
from held_out import drawn_prompts, recipe_of

import safesteer as ss
from safesteer.evaluation.depth import Opened, continue_answers
from safesteer.evaluation.ledger import log_look
from safesteer.judges.languages import refuses_abroad
from safesteer.judges.sentences import declines
from safesteer.models.chat_model import ChatModel
from safesteer.models.precision import in_precision_of
from safesteer.prompts.wrappers import PLAIN, OpeningSplit, WrapperSplit, load_openings, load_wrappers
from safesteer.run_folder import STAGES

# A refusal's later tokens weigh as much as its first, and there are more of them.
LONGER = {"decay": 1.0, "max_new_tokens": 12}
SHARES = {
    "plain": {},
    "opened": {"opened_share": 0.5},
    "wrapped": {"wrapped_share": 0.5},
    "both": {"opened_share": 0.35, "wrapped_share": 0.35},
    "longer, all tokens": LONGER | {"support": "full"},  # no practice: what length and support do alone
    "opened longer": LONGER | {"opened_share": 0.5},
    "opened longer, all tokens": LONGER | {"opened_share": 0.5, "support": "full"},
    "both longer, all tokens": LONGER | {"opened_share": 0.35, "wrapped_share": 0.35, "support": "full"},
}
OPENED = (2, 10)  # tokens of an opening
N_TEST = 50  # test pairs
TOKENS = 48
SPLITS: tuple[WrapperSplit, ...] = ("val", "test")


def answered(chat: ChatModel, split: WrapperSplit) -> Iterator[dict]:
    """Answer the prompts of a split plain, wrapped and opened; yield a row per prompt."""
    prompts = ss.load_prompts().split(split).across(None if split == "val" else N_TEST)
    for label, texts in (("harmful", prompts.harmful), ("harmless", prompts.harmless)):
        for how, refused in verdicts(chat, texts, split):
            for i, value in enumerate(refused):
                yield {"split": split, "label": label, "how": how, "row": i, "refused": int(value)}


def verdicts(chat: ChatModel, texts: list[str], split: WrapperSplit) -> Iterator[tuple[str, list[bool]]]:
    """Yield (how the prompts were put, which answers refuse) for each wrapper and opening of a split."""
    for wrapper in (PLAIN, *load_wrappers(split)):
        wrapped = [wrapper.wrap(text)[0] for text in texts]
        answers = ss.generate(chat, wrapped, max_new_tokens=TOKENS, batch_size=32)
        judges = (declines, refuses_abroad) if wrapper.family == "language" else (declines,)
        name = wrapper.name if wrapper is PLAIN else f"{wrapper.family}: {wrapper.name}"
        yield name, [any(j(t, a) for j in judges) for t, a in zip(texts, answers, strict=True)]
    for k in OPENED:
        opened = opened_answers(chat, texts, "train" if split == "val" else "test", k)
        yield f"opened by {k}", [refuses(t, a) for t, a in zip(texts, opened, strict=True)]


def openings(chat: ChatModel, split: OpeningSplit, k: int, n: int) -> list[list[int]]:
    """Return the first k tokens of the openings of a split, in turn."""
    texts = load_openings(split)
    return [chat.encode(texts[i % len(texts)])[:k] for i in range(n)]


def opened_answers(chat: ChatModel, texts: Sequence[str], split: OpeningSplit, k: int) -> list[Opened]:
    """Let a model write on from k tokens of the openings of a split."""
    return continue_answers(chat, texts, openings(chat, split, k, len(texts)), max_new_tokens=TOKENS)


def refuses(prompt: str, opened: Opened) -> bool:
    """Say whether an answer that was opened refuses, as a whole or in what the model wrote."""
    return any(declines(prompt, answer) for answer in opened)


def look(name: str, chat: ChatModel, path: Path, splits: Sequence[WrapperSplit]) -> None:
    """Add the rows of one model in some splits to its file, and log a look at the test pairs."""
    rows = pd.DataFrame([row for split in splits for row in answered(chat, split)])
    for label in ("harmful", "harmless") if "test" in splits else ():
        log_look(LEDGER, chat, f"own-{label}", N_TEST, f"study deeper: {name}")
    both = [pd.read_csv(path), rows] if path.exists() else [rows]
    pd.concat(both).to_csv(path, index=False)
    shown = rows[~rows.how.str.contains("opened by 2")].groupby(["split", "label", rows.how.ne("plain")])
    print(name, (100 * shown.refused.mean()).round(0).to_dict(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder that receives direction and S of each seed")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--arms", nargs="*", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--splits", nargs="*", default=SPLITS, choices=SPLITS)
    parser.add_argument("--keep", type=Path, help="a folder that receives the students, for opened.py")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/deeper"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = ss.load_model(args.model, dtype="auto")
    if not (args.out / "base.csv").exists():
        look("base", base, args.out / "base.csv", SPLITS)
    for seed in args.seeds:
        recipe = recipe_of(seed, args)
        prompts, run = drawn_prompts(seed, recipe.prompts), args.runs / str(seed)
        if not (run / "tokens.json").exists():
            ss.align(args.model, run, recipe, prompts=prompts, stages=STAGES[:2])
        direction = ss.Direction.load(run / "direction.safetensors", base)
        tokens = ss.TokenSet.load(run / "tokens.json")
        for arm in args.arms:
            path = args.out / f"{arm}--{seed}.csv"
            seen = set(pd.read_csv(path).split) if path.exists() else set()
            splits = [split for split in args.splits if split not in seen]
            if not splits:
                continue
            config = replace(recipe.distill, precision="auto", **SHARES[arm])
            config = replace(config, splits=tuple(s for s in config.splits if s != "val"))
            student = ss.distill(base, direction, tokens, prompts, config)
            with in_precision_of(base, student):
                look(f"{arm}, seed {seed}", student, path, splits)
            if args.keep:
                ss.export(student, args.keep / f"{arm}--{seed}")


if __name__ == "__main__":
    main()
