"""SafeSteer beside what one would do instead, from the same prompts and the same budget.

    python analysis/comparison.py --data DATA [--seeds 3] [--steps 15] [--out analysis/results/comparison]

Claim (paper, Tables 1 and 2): distilling a steered teacher on ~50 tokens gives the safety of other
methods at less cost elsewhere. It would be refuted if SFT on refusals, DPO or full-vocabulary
distillation refused as many harmful prompts with fewer harmless refusals and as much capability. This
comparison does not decide it: each method stands at one step count, not at equal refusals, and three
baselines are missing: our supervised run with KL and a margin (86 % of harmful prompts and 6 % of their twins
on test, in four minutes; docs/log.md), a constant on the logit of one first word, and gated steering.

    base            the model as it is
    system prompt   the same under a system prompt that asks for refusals
    teacher         the same, steered
    sft             supervised: the teacher's refusals on harmful prompts, the base's own greedy answers on
                    harmless ones as hard targets, which docs/log.md calls noise
    dpo             preferences: refusal over the base's answer, and the base's answer over the teacher's
    full            on-policy distillation over the whole vocabulary (everything else as SafeSteer)
    safesteer       on-policy distillation on S
    full anchor     the same, with the harmless answers held to the base over the whole vocabulary
    light anchor    that with a third of the anchor's weight: S carries a third of KL(teacher, base), so the
                    whole vocabulary weighs about three times as much at the same weight

All trained methods see the 100 pairs of the split `distill`, train the same blocks, and take the same
number of steps of 28 answers (dpo: 12 pairs) with AdamW, warm-up and cosine. SFT and DPO have usual
learning rates, `full` has SafeSteer's, for which alone one was searched. The answers of SFT and DPO are cut
at their last whole sentence. Scores are on the test split, which is not sealed: about 90 models were scored
on it, and the weight of the light anchor was set after such a look. Each model's row is a file in OUT, so an
interrupted comparison continues.
Needs the extras `eval` and `peers`.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ablation import LEDGER, summary, trade_off
from plotly.offline import get_plotlyjs
from rich.console import Console

import safesteer as ss
from safesteer._files import read_json, write_json, write_text
from safesteer.directions.refusal_tokens import REFUSING_SYSTEM
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.capability import measure_capability
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.scores import score_model
from safesteer.judges.judge import judge_version
from safesteer.judges.sentences import declines
from safesteer.models.parts import hf_model
from safesteer.models.text_loss import wikitext

CAPABILITY = ("arc_easy", "piqa", "lambada_openai")
METHODS = ("safesteer", "full", "sft", "full anchor", "light anchor", "dpo")
# SafeSteer's was chosen by val earlier (docs/log.md); nothing was searched for the others.
RATES = {"sft": 3e-5, "dpo": 5e-5, "full": 3e-4, "safesteer": 3e-4}
RATES |= {"full anchor": 3e-4, "light anchor": 3e-4}
JUDGE = f"declines {judge_version(declines)}"  # of `score_model`, by default
A_STEP = 28  # answers: the quick recipe's 10 harmful and 18 harmless


def read_row(path: Path) -> Any:
    """Read a row; one whose test answers another judge has read cannot stand in one table with new ones."""
    values = read_json(path)
    if isinstance(values, dict) and "kl_harmless" in values and values.get("judge") != JUDGE:
        raise SystemExit(
            f"{path} was judged by {values.get('judge', 'refuses')}, new rows are judged by {JUDGE}: give"
            " another folder with --out."
        )
    return values


def whole_sentences(answer: str) -> str:
    end = max(answer.rfind(mark) for mark in ".!?")
    return answer[: end + 1] if end >= 0 else answer


def examples(base: ss.ChatModel, direction: ss.Direction, pairs: ss.PromptSet) -> list[dict]:
    """Make one row per prompt: the answer to learn and the one to prefer it to."""
    answers = {}
    for label, texts in (("harmful", pairs.harmful), ("harmless", pairs.harmless)):
        answers[label, "base"] = ss.generate(base, texts, max_new_tokens=48)
        with ss.steer(base, direction):
            answers[label, "teacher"] = ss.generate(base, texts, max_new_tokens=48)
    rows = []
    for label, texts, chosen, rejected in (
        ("harmful", pairs.harmful, "teacher", "base"),
        ("harmless", pairs.harmless, "base", "teacher"),
    ):
        for text, good, bad in zip(texts, answers[label, chosen], answers[label, rejected], strict=True):
            if label == "harmful" and not ss.refuses(text, good):
                continue  # what is not a refusal is not taught as one
            turns = {"chosen": whole_sentences(good), "rejected": whole_sentences(bad)}
            if turns["chosen"] and turns["rejected"] and turns["chosen"] != turns["rejected"]:
                rows.append({"prompt": text, "label": label, **turns})
    return rows


def with_peer(method: str, direction, rows: list[dict], seed: int, steps: int, lr: float) -> ss.ChatModel:
    """Train by SFT or DPO with TRL on the blocks that SafeSteer trains."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    def turn(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    mixed = rows.copy()
    random.Random(seed).shuffle(mixed)
    student = prepare_student(ss.load_model("smollm2-135m"), direction, ss.DistillConfig()).student
    model, tokenizer = hf_model(student.model), student.tokenizer
    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "gradient_accumulation_steps": 4,
        "learning_rate": lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }
    if method == "sft":
        data = [
            {"prompt": turn("user", r["prompt"]), "completion": turn("assistant", r["chosen"])} for r in mixed
        ]
        config = SFTConfig(per_device_train_batch_size=A_STEP // 4, **common)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    else:
        data = [
            {
                "prompt": turn("user", r["prompt"]),
                "chosen": turn("assistant", r["chosen"]),
                "rejected": turn("assistant", r["rejected"]),
            }
            for r in mixed
        ]
        config = DPOConfig(per_device_train_batch_size=A_STEP // 8, **common)
        trainer = DPOTrainer(
            model,
            ref_model=hf_model(ss.load_model("smollm2-135m").model),
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
    trainer.train()
    model.eval()
    return replace(student, model=model)


def distilled(method: str, base, direction, prompts, seed: int, steps: int) -> ss.ChatModel:
    """Train by SafeSteer, or by the same over the whole vocabulary."""
    recipe = ss.recipe("quick", seed)
    tokens = ss.select_tokens(base, direction, prompts.split("val").harmless, recipe.tokens)
    support = "full" if method == "full" else "safety"
    anchor = "full" if "anchor" in method else "same"
    config = replace(
        recipe.distill, n_steps=steps, support=support, anchor_support=anchor, splits=("distill",)
    )
    if method == "light anchor":
        weights = config.anchor_weight / 3, config.late_anchor_weight / 3
        config = replace(config, anchor_weight=weights[0], late_anchor_weight=weights[1])
    return ss.distill(base, direction, tokens, prompts, config)


def trained(method: str, base, direction, prompts, rows, seed: int, steps: int, lr: float) -> ss.ChatModel:
    torch.manual_seed(seed)
    if method in ("sft", "dpo"):
        return with_peer(method, direction, rows, seed, steps, lr)
    return distilled(method, base, direction, prompts, seed, steps)


def under_system(chat: ss.ChatModel, system: str = REFUSING_SYSTEM) -> ss.ChatModel:
    """Write a system prompt into the model's chat template."""
    tokenizer = deepcopy(chat.tokenizer)
    first = json.dumps([{"role": "system", "content": system}])
    tokenizer.chat_template = f"{{% set messages = {first} + messages %}}{tokenizer.chat_template}"
    return replace(chat, tokenizer=tokenizer)


@contextmanager
def untrained(method: str, base: ss.ChatModel, direction) -> Iterator[ss.ChatModel]:
    if method == "system prompt":
        yield under_system(base)
    elif method == "teacher":
        steered = base.copy()
        with ss.steer(steered, direction):
            yield steered
    else:
        yield base


def measured(
    chat: ss.ChatModel, base: ss.ChatModel, options, method: str, base_answers: list[str] | None
) -> dict:
    test = ss.load_prompts().split("test").first(options.pairs)
    # A system prompt changes the prompt itself, so positions do not match and there is no drift to read.
    drifts = base_answers is not None and method != "system prompt"
    config, text = ss.EvaluateConfig(perplexity_tokens=8192), wikitext(options.data)
    scores, answers = score_model(chat, base, test, config, text=text, base_answers=base_answers)
    if scores.n == len(ss.load_prompts().split("test").harmful):  # fewer: a trial
        log_look(LEDGER, chat, "test", scores.n, f"study comparison: {method}")
    row = {
        "harmful": scores.refusal_rate_harmful,
        "harmless": scores.refusal_rate_harmless,
        "n": scores.n,
        "judge": JUDGE,
        "kl_harmless": scores.kl_harmless if drifts else None,
        "wikitext2_perplexity": scores.perplexity,
    }
    with tempfile.TemporaryDirectory() as folder:
        tasks = measure_capability(chat, CAPABILITY, folder, data=options.data, limit=options.limit)
    row |= dict(zip(tasks.task, tasks.value, strict=True))
    return row | {"said": answers["harmless"] if method == "base" else None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of local rows (WikiText-2, ARC, ...)"
    )
    parser.add_argument("--direction", type=Path, help="a direction file; default: found by stage 1 of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--dpo-seeds", type=int, default=3, help="seeds of dpo, the slowest, which comes last"
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--limit", type=int, default=80, help="rows per capability task")
    parser.add_argument("--out", type=Path, default=Path("analysis/results/comparison"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, prompts = Console(), ss.load_prompts()
    base = ss.load_model("smollm2-135m")
    if options.direction is None:
        run = ss.align("smollm2-135m", options.out / "run", ss.recipe("quick", 0), stages=("direction",))
        options.direction = run / "direction.safetensors"
    direction = ss.Direction.load(options.direction, base)
    rows = examples(base, direction, prompts.split("distill"))
    console.print(f"{len(rows)} examples: {sum(r['label'] == 'harmful' for r in rows)} refusals")
    base_answers: list[str] | None = None
    for method in ("base", "system prompt", "teacher"):
        path = options.out / f"{method.replace(' ', '-')}.json"
        if not path.exists():
            with untrained(method, base, direction) as chat:
                scores = measured(chat, base, options, method, base_answers)
            write_json(path, {"method": method, "seed": 0, **scores})
        base_answers = read_json(options.out / "base.json")["said"]
        console.print(read_row(path) | {"said": None}, highlight=False)
    jobs = [(seed, method) for seed in range(options.seeds) for method in METHODS if method != "dpo"]
    jobs += [(seed, "dpo") for seed in range(options.dpo_seeds)]
    for seed, method in jobs:
        path = options.out / f"{method.replace(' ', '-')}-{seed}.json"
        if not path.exists():
            started = time.perf_counter()
            lr = RATES[method]
            chat = trained(method, base, direction, prompts, rows, seed, options.steps, lr)
            spent = round(time.perf_counter() - started)
            scores = measured(chat, base, options, method, base_answers)
            write_json(path, {"method": method, "seed": seed, "lr": lr, "train_s": spent, **scores})
        console.print(read_row(path) | {"said": None}, highlight=False)
    table = pd.DataFrame([read_row(p) for p in sorted(options.out.glob("*.json"))])
    order = ["base", "system prompt", "teacher", *METHODS]
    table = table.drop(columns="said").sort_values("method", key=lambda names: names.map(order.index))
    write_text(options.out.with_suffix(".csv"), table.to_csv(index=False))
    numbers = {"kl_harmless": 3, "wikitext2_perplexity": 2, **dict.fromkeys(CAPABILITY, 3)}
    write_text(options.out.with_suffix(".md"), summary(table, "method", numbers))
    write_text(options.out.with_suffix(".html"), page(table, options.limit))


def page(table: pd.DataFrame, limit: int) -> str:
    """Draw safety against over-refusal, and against capability: the mean of the tasks."""
    table = table.assign(capability=table[list(CAPABILITY)].mean(axis=1), n_rows=limit * len(CAPABILITY))
    against = trade_off(table, "method", "capability", "capability, mean of the tasks", "n_rows")
    figures = [
        f.to_html(full_html=False, include_plotlyjs=False) for f in (trade_off(table, "method"), against)
    ]
    return f"<!doctype html><meta charset=utf-8><script>{get_plotlyjs()}</script>{''.join(figures)}"


if __name__ == "__main__":
    main()
