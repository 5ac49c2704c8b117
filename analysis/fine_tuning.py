"""What benign fine-tuning does to refusals, with and without the seal.

    python analysis/fine_tuning.py [--model qwen2.5-coder-0.5b] [--tokens S.json] [--tasks ...] [--arms ...]

Claim (ours): a model that is fine-tuned on something harmless refuses fewer harmful prompts, and one whose
probabilities on S are held (`ss.SafetySeal`) refuses as many as before, no more harmless ones, and learns
the task as well. Refuted where the unsealed model loses no refusals, where the sealed one loses as many, or
where over-refusals or the task pay for it.

1. Two tasks by rule, in which nothing is harmful: converting units, and making a sentence formal. A seed
   draws 400 rows that train and 40 others;
2. transformers' own Trainer takes 200 steps of 8 rows: AdamW, 2e-5 on all weights, or 2e-4 on an adapter
   (`--lora-rank 16`);
3. before, and after every 25 steps, the model answers the val split of the wider pairs, on which no preset
   trains (16 tokens, judged by how they open), and the 40 rows (right where the answer is the target, letter
   by letter).

Arms: unsealed (weight 0: the training without a seal, of which the divergence is only measured), sealed
(weight 1) and sealed tenfold. S is that of which_tokens.py by default. Every prompt and row of a look is a
row, without its text; loss and divergence are in a file of their own. An arm that has its rows is not run
again, so an interrupted study continues: another model or rate needs a folder of its own (`--out`). No test
prompt is read.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from which_tokens import answer_rows

import safesteer as ss
from safesteer._files import write_text
from safesteer.distillation.rollouts import predicting_states
from safesteer.distillation.seal import evaluating
from safesteer.models.adapter import with_adapter
from safesteer.models.forward import final_hidden
from safesteer.models.head import output_head
from safesteer.models.logits import logps_on
from safesteer.models.precision import fast_dtype
from safesteer.models.templates import ids_of, render

Row = tuple[str, str]  # a prompt and the answer that is taught
N_STEPS, EVERY, BATCH = 200, 25, 8
N_TRAIN, N_HELD_OUT = 400, 40
ANSWER_TOKENS = 48  # of an answer to a row: longer than any target
WEIGHTS = {"unsealed": 0.0, "sealed": 1.0, "sealed tenfold": 10.0}
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("feet", "inches", 12),
    ("dozens", "pieces", 12),
)
OPENINGS = (
    ("hey, can u", "Dear colleague, could you please"),
    ("hi, could ya", "Good morning, would you be so kind as to"),
    ("yo, pls", "Dear team, would you kindly"),
    ("hello, wanna", "Dear Sir or Madam, would you be willing to"),
)
REQUESTS = (
    ("send me the report", "send me the report"),
    ("gimme the numbers", "provide me with the figures"),
    ("fix the printer", "repair the printer"),
    ("check my draft", "review my draft"),
    ("book us a room", "reserve a room for us"),
    ("call the plumber", "telephone the plumber"),
    ("grab some coffee for the meeting", "bring coffee to the meeting"),
    ("get the kids from school", "collect the children from school"),
    ("water my plants", "water my plants"),
    ("put up the new schedule", "publish the new schedule"),
    ("ask around about the keys", "enquire about the keys"),
    ("swap shifts with me", "exchange shifts with me"),
)
TIMES = (
    ("by friday", "by Friday"),
    ("asap", "as soon as possible"),
    ("tmrw", "tomorrow"),
    ("before lunch", "before noon"),
    ("tonight", "this evening"),
    ("sometime next week", "in the course of next week"),
)
CLOSINGS = (
    ("thx", "Thank you very much."),
    ("cheers", "With kind regards."),
    ("u rock", "I greatly appreciate your help."),
    ("cya", "I look forward to seeing you."),
)


def unit_rows() -> list[Row]:
    """Ask for every unit in its smaller one."""
    return [
        (f"How many {small} are {n} {large}?", f"{n} {large} are {n * factor} {small}.")
        for large, small, factor in UNITS
        for n in range(2, 100)
    ]


def formal_rows() -> list[Row]:
    """Ask for every casual sentence in formal words."""
    return [
        (
            f"Make this formal: {opening[0]} {request[0]} {time[0]}? {closing[0]}",
            f"{opening[1]} {request[1]} {time[1]}? {closing[1]}",
        )
        for opening, request, time, closing in product(OPENINGS, REQUESTS, TIMES, CLOSINGS)
    ]


TASKS = {"units": unit_rows, "formal": formal_rows}


def drawn_rows(task: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows that train, and others."""
    rows = TASKS[task]()
    random.Random(seed).shuffle(rows)
    return rows[:N_TRAIN], rows[N_TRAIN : N_TRAIN + N_HELD_OUT]


def answer_ids(chat: ss.ChatModel, answer: str) -> list[int]:
    """Return an answer as ids, with what ends it."""
    return [*chat.encode(answer), chat.tokenizer.eos_token_id]


def examples(chat: ss.ChatModel, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
    """Return what the Trainer trains on: the answer alone is learnt."""
    both = [
        (ids_of(chat.tokenizer, render(chat.tokenizer, prompt)), answer_ids(chat, answer))
        for prompt, answer in rows
    ]
    return [{"input_ids": head + tail, "labels": [-100] * len(head) + tail} for head, tail in both]


@torch.no_grad()
def answer_loss(chat: ss.ChatModel, rows: Sequence[Row]) -> float:
    """Return the mean negative log-likelihood of the rows' answers, in nats per token."""
    prompts, ids = [p for p, _ in rows], [answer_ids(chat, answer) for _, answer in rows]
    head, losses = output_head(chat.model), []
    for at, batch in chat.batched(prompts, 32, continuations=ids):
        mask = batch.completion_mask[:, -max(len(ids[i]) for i in at) :]
        hidden = predicting_states(final_hidden(chat.model, batch), mask)
        taken = batch.prompt_ids[:, -mask.shape[1] :][mask]
        losses.append(-logps_on(hidden, head.weight, taken[:, None], **head.options))
    return float(torch.cat(losses).mean())


def look(chat: ss.ChatModel, rows: Sequence[Row]) -> pd.DataFrame:
    """Answer val pairs and rows of the task; return a row for each."""
    val = ss.load_prompts("wide").split("val")  # neither trained on nor held by the seal
    refusals = answer_rows(chat, {"harmful": val.harmful, "harmless": val.harmless})
    answers = ss.generate(chat, [prompt for prompt, _ in rows], max_new_tokens=ANSWER_TOKENS)
    right = [int(got == want) for got, (_, want) in zip(answers, rows, strict=True)]
    task = pd.DataFrame({"set": "task", "row": range(len(rows)), "right": right})
    return pd.concat([refusals, task])


class Looks(TrainerCallback):
    """Look at the model before the first step, and after every so many."""

    def __init__(self, name: str, chat: ss.ChatModel, rows: Sequence[Row]) -> None:
        self.name, self.chat, self.rows = name, chat, rows
        self.frames: list[pd.DataFrame] = []
        self.losses: dict[int, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.take(0, args)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            self.take(state.global_step, args)

    def take(self, step: int, args: TrainingArguments) -> None:
        narrow = torch.autocast(self.chat.device.type, torch.bfloat16, enabled=args.bf16)
        with evaluating(self.chat.model):
            with narrow:
                table = look(self.chat, self.rows)
            self.losses[step] = answer_loss(self.chat, self.rows)
        self.frames.append(table.assign(step=step))
        shares = table.groupby("set", sort=False)[["refused", "right"]].mean().max(axis=1).round(2)
        print(self.name, step, shares.to_dict(), f"loss {self.losses[step]:.3f}", flush=True)


def run(task: str, arm: str, args: argparse.Namespace) -> None:
    """Fine-tune on one task with one seed, and write what every look saw."""
    adapter = f"--rank_{args.lora_rank}" if args.lora_rank else ""
    name = f"{task}--{arm.replace(' ', '_')}{adapter}--{args.seed}"
    path = args.out / f"{name}.rows.csv"
    if path.exists():
        return
    train, held_out = drawn_rows(task, args.seed)
    chat = ss.load_model(args.model, dtype="float32")
    tokens = ss.TokenSet.load(args.tokens)
    seal = ss.SafetySeal(chat, tokens=tokens, weight=WEIGHTS[arm], look_every=0)
    if args.lora_rank:
        chat = with_adapter(chat, args.lora_rank, 2 * args.lora_rank, seed=args.seed)
    else:
        chat.model.requires_grad_(True)
    looks = Looks(name, chat, held_out)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            use_cpu=chat.device.type == "cpu",
            max_steps=N_STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=args.lr or (2e-4 if args.lora_rank else 2e-5),
            warmup_steps=10,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=fast_dtype(chat.device) is torch.bfloat16,
            seed=args.seed,
        )
        collator = DataCollatorForSeq2Seq(chat.tokenizer)
        data = examples(chat, train)
        trainer = Trainer(
            chat.model, settings, train_dataset=data, data_collator=collator, callbacks=[seal, looks]
        )
        trainer.remove_callback(PrinterCallback)  # the looks say enough
        trainer.train()
    logged = [row for row in trainer.state.log_history if "seal_divergence" in row]
    steps = pd.DataFrame(logged)[["step", "loss", "grad_norm", "seal_divergence"]]
    steps = steps.rename(columns={"loss": "train_loss"}).set_index("step")
    steps = steps.join(pd.Series(looks.losses, name="task_loss"), how="outer").rename_axis("step")
    write_text(args.out / f"{name}.steps.csv", steps.round(7).to_csv())
    write_text(path, pd.concat(looks.frames).to_csv(index=False))  # last: it says that the arm is done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    results = Path("analysis/results")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=Path, default=results / "which_tokens" / "tokens-0.001.json")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--arms", nargs="*", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--lr", type=float, help="default: 2e-5, or 2e-4 with an adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=results / "fine_tuning")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        for arm in args.arms:
            run(task, arm, args)


if __name__ == "__main__":
    main()
