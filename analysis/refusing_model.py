"""A small model that refuses natively: the paper's regime in miniature.

    python analysis/refusing_model.py [--out FOLDER] [--seed 0] [--measure]

SmolLM2-135M-Instruct hardly refuses. A short supervised run teaches it to: refusals that we wrote for
harmful prompts, the model's own answers for harmless ones. All prompts of this run are kept apart from
every later split: the 30 pairs of the split `extra`, 45 pairs of `early_pairs.jsonl`, and the everyday
requests below. The loss is the cross-entropy of the answer's first tokens, on the blocks of the upper
two thirds.

Wanted: 30 to 70 % of held-out harmful prompts refused and under 5 % of harmless ones, on the test split.
Measured: 66 % and 26 % (docs/results.md), so it refuses natively, and too much.
The folder is a plain Hugging Face model; it is made once and found again (`refusing_model`).
"""

import argparse
import hashlib
import random
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import safesteer as ss
from safesteer.divergence import logps_on
from safesteer.files import json_lines, whole_folder, write_json
from safesteer.models import cache_dir, final_hidden, output_head
from safesteer.prompts import EXTRA, PromptBatch
from safesteer.stats import wilson

PAIRS = Path(__file__).parent / "early_pairs.jsonl"
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with this request.",
    "I can't help with that, because it could hurt someone.",
    "I cannot help with this request.",
)
TOPICS = (
    "a small garden",
    "an old bicycle",
    "a rainy Sunday",
    "a class of ten-year-olds",
    "a first job interview",
    "a birthday party",
    "a long train ride",
    "a noisy neighbour",
    "a new puppy",
    "a weekly budget",
    "a vegetable soup",
    "a school play",
)
EVERYDAY = (
    "Give me three ideas for {}.",
    "What should I know about {}?",
    "Write a short note about {}.",
    "How do I make the best of {}?",
    "Can you explain {} to a child?",
)
N_TOKENS = 12  # of each answer
N_EVERYDAY = 200  # instructions of another source that over-refusal is measured on


def refusing_model(folder: Path | None = None, *, seed: int = 0, console: Console | None = None) -> Path:
    """The checkpoint's folder; made on the first call (minutes on two cores)."""
    made_from = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = folder or cache_dir() / f"refusing-smollm2-{seed}-{made_from}"
    if not (folder / "config.json").exists():
        _train(folder, seed, console or Console())
    return folder


def _train(folder: Path, seed: int, console: Console, n_steps: int = 40, lr: float = 5e-5) -> None:
    base, student = ss.load_model("smollm2-135m"), ss.load_model("smollm2-135m")
    extra = ss.load_prompts().split(EXTRA)
    more = ss.PromptSet.from_jsonl(PAIRS)
    everyday = [form.format(topic) for topic in TOPICS for form in EVERYDAY]
    twins, usual = (_own_answers(base, texts) for texts in ([*extra.harmless, *more.harmless], everyday))
    bad = [(p, REFUSALS[i % len(REFUSALS)]) for i, p in enumerate([*extra.harmful, *more.harmful])]

    first = base.n_layers // 3
    student.model.requires_grad_(False)
    for block in student.model.model.layers[first:]:
        block.requires_grad_(True)
    params = [p for p in student.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    draw = random.Random(seed)
    for step in range(1, n_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 5, (n_steps + 1 - step) / (n_steps - 4))
        rows = [*draw.sample(bad, 5), *draw.sample(twins, 10), *draw.sample(usual, 5)]
        loss = sum(_cross_entropy(student, rows[i : i + 5]) for i in range(0, len(rows), 5)) / 4
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            console.print(f"step {step}: loss {loss:.3f}", highlight=False)
    with whole_folder(folder) as work:
        ss.export(student, work)
        write_json(work / "made.json", {"seed": seed, "steps": n_steps, "lr": lr})


def _cross_entropy(student: ss.ChatModel, rows: list[tuple[str, str]]) -> float:
    """Mean over answers of the mean over their first tokens; the gradient is added up."""
    tokenizer = student.tokenizer
    tails = []
    for _, answer in rows:
        ids = tokenizer(answer, add_special_tokens=False).input_ids  # type: ignore[operator]
        ids = [*ids, student.eos_ids[0]] if answer in REFUSALS else ids
        tails.append(ids[:N_TOKENS])
    batch = PromptBatch.of(tokenizer, [p for p, _ in rows], tails)
    hidden = final_hidden(student.model, batch)
    weight, bias, softcap = output_head(student.model)
    total = torch.zeros(())
    for row, ids in enumerate(tails):
        states = hidden[row, -len(ids) - 1 : -1]
        logps = logps_on(states, weight, torch.tensor(ids)[:, None], bias=bias, softcap=softcap)
        total = total - logps.mean() / len(rows)
    (total / 4).backward()
    return float(total.detach())


def _own_answers(base: ss.ChatModel, prompts: list[str]) -> list[tuple[str, str]]:
    """What the model says itself, without the answers that refuse."""
    said = ss.generate(base, prompts, max_new_tokens=N_TOKENS + 4)
    return [(p, a) for p, a in zip(prompts, said, strict=True) if not ss.refuses(p, a)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="refusals on the test split, beside the base")
    parser.add_argument("--data", type=Path, help="folder with harmless_val.jsonl: everyday instructions too")
    options = parser.parse_args()
    console = Console()
    folder = refusing_model(options.out, seed=options.seed, console=console)
    console.print(f"{folder}", highlight=False)
    if options.measure:
        config = ss.EvalConfig(max_new_tokens=24)
        base, test = ss.load_model("smollm2-135m"), ss.load_prompts().split("test")
        made = replace(ss.load_model(str(folder)), name="refusing")
        for chat in (base, made):
            scores, _ = ss.evaluate(chat, base, test, config)
            console.print(f"{chat.name}: {ss.Evaluation({'test': scores})}", highlight=False)
            if options.data:
                rows = json_lines(options.data / "harmless_val.jsonl")
                usual = [row["prompt"] for row in rows][:N_EVERYDAY]
                said = ss.generate(chat, usual, max_new_tokens=24, batch_size=50)
                n = sum(ss.refuses(p, a) for p, a in zip(usual, said, strict=True))
                low, high = wilson(n, len(usual))
                console.print(f"  everyday: {n} of {len(usual)} refused ({low:.0%} to {high:.0%})")


if __name__ == "__main__":
    main()
