"""One optimizer step (rollout, teacher, student) against a naive one, in one run.

    python performance/trainer.py [--sequences 32] [--new-tokens 64] [--steps 1]

Each path runs in a process of its own: models are loaded, one warm-up step of two short answers is
run (not for TRL), then the steps are timed and peak resident memory above the loaded models is read.
Memory can be compared. Time can not: TRL's steps hold its warm-up, `narrow` and `adapter` are in bfloat16
where `naive` and `trl` are in float32, and one run on a shared machine scatters by ratios of 1.0 to 1.9.

    ours      distill as it is, blocks from the steered layer up, float32
    narrow    the same with passes in bfloat16 and a bfloat16 teacher; the trained weights stay float32
    adapter   a rank-16 adapter on one bfloat16 copy of the weights, passes in bfloat16
    naive     a second whole model as teacher, prompts padded to the longest and read again for every
              answer, logits of all answer positions, log-softmax over the vocabulary, autograd
    trl       DistillationTrainer of TRL, if it is installed: the steered copy as its teacher, full
              vocabulary, the same blocks trained, micro-batches of the same size, float32
    trl-bf16  the same with its mixed precision
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from measure import extra_mb, in_process, machine, start_memory, synchronize
from torch import nn

import safesteer as ss
from safesteer.directions.extraction import prefill_contrast
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.models.batch import PromptBatch


def set_up() -> tuple[Teacher, ss.PromptSet]:
    """Return a teacher of SmolLM2 and the prompts that students learn on."""
    chat, prompts = ss.load_model("smollm2-135m"), ss.load_prompts()
    candidates = prefill_contrast(chat, prompts.split("train").first(8))
    direction = candidates.direction(chat, "mean", 11, coeff=1.8)
    config = ss.TokenConfig(horizon=3, n_samples=1, min_steered_prob=1e-4, k_vote=30)
    tokens = ss.select_tokens(chat, direction, prompts.split("val").harmless[:8], config)
    return Teacher(chat, direction, tokens), prompts.split("distill")


def ours(options, adapter: bool, dtype: str):
    wide, prompts = set_up()
    teacher = replace(wide, base=ss.load_model("smollm2-135m", dtype=dtype))
    settings = {
        "harmless_per_step": 0,
        "rollouts": "student",
        "lora_rank": 16 if adapter else 0,
        "precision": dtype,
    }
    warm_up = ss.DistillConfig(n_steps=1, harmful_per_step=2, max_new_tokens=4, **settings)
    student = teacher.base if adapter else ss.load_model("smollm2-135m")
    state = prepare_student(student, teacher.direction, warm_up)
    for _ in training_steps(state, teacher, prompts):
        pass
    state.config = ss.DistillConfig(
        n_steps=1 + options.steps,
        harmful_per_step=options.sequences,
        max_new_tokens=options.new_tokens,
        **settings,
    )
    before, started = start_memory(), time.perf_counter()
    records = list(training_steps(state, teacher, prompts))
    seconds = (time.perf_counter() - started) / options.steps
    parts = {
        f"{k}_s": round(sum(getattr(r, f"{k}_s") for r in records) / len(records), 1)
        for k in ("rollout", "teacher", "student")
    }
    return seconds, extra_mb(before), parts


def naive_step(teacher: Teacher, student: nn.Module, precision: str) -> Callable[[Sequence[str], int], None]:
    """Return the step that a plain script takes: of (prompts, new tokens)."""
    chat, direction, ids = teacher.base, teacher.direction, teacher.tokens.ids.to(teacher.base.device)
    student.requires_grad_(False)
    for block in student.model.layers[direction.layer :]:
        block.requires_grad_(True)
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5)
    narrow = torch.autocast(chat.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def step(texts, n_new):
        singles = [PromptBatch.of(chat.tokenizer, [t]).prompt_ids[0].tolist() for t in texts]
        batch = PromptBatch.from_ids(singles, [[] for _ in singles], share=False, device=chat.device)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ids_in, mask = batch.prompt_ids, batch.attention_mask
        with narrow:
            out = student.generate(ids_in, attention_mask=mask, max_new_tokens=n_new, **sampling)
        mask = torch.cat([mask, torch.ones_like(out[:, ids_in.shape[1] :])], 1)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        answer = slice(ids_in.shape[1] - 1, -1)
        with torch.no_grad(), narrow, ss.steer(chat, direction):
            q = chat.model(out, use_cache=False, **inputs).logits[:, answer].float().log_softmax(-1)
        with narrow:
            p = student(out, use_cache=False, **inputs).logits[:, answer].float().log_softmax(-1)
        p, q = p[..., ids], q[..., ids]
        loss = (0.5 * (p.exp() * (p - q)) + 0.5 * (q.exp() * (q - p))).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def naive(options):
    teacher, prompts = set_up()
    harmful = prompts.harmful
    step = naive_step(teacher, ss.load_model("smollm2-135m").model, "float32")
    step(harmful[:2], 4)
    before, started = start_memory(), time.perf_counter()
    for _ in range(options.steps):
        step(harmful[: options.sequences], options.new_tokens)
    return (time.perf_counter() - started) / options.steps, extra_mb(before), {}


@contextmanager
def trl_steps(
    teacher: Teacher, student: nn.Module, texts: Sequence[str], n_steps: int, n_new: int, bf16: bool
) -> Iterator[Callable[[], list[float]]]:
    """Yield a function that takes TRL's steps and returns when each of them ended, in seconds of a clock."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    chat, direction, ends = teacher.base, teacher.direction, []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            synchronize(chat.device)
            ends.append(time.perf_counter())

    steered = chat.copy()  # the trainer keeps and wraps it
    for block in student.model.layers[direction.layer :]:
        block.requires_grad_(True)
    micro = min(ss.DistillConfig().micro_batch, len(texts))
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    with tempfile.TemporaryDirectory() as folder, ss.steer(steered, direction):
        config = DistillationConfig(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(texts) // micro,
            max_steps=n_steps,
            max_completion_length=n_new,
            learning_rate=1e-5,
            gradient_checkpointing=False,
            bf16=bf16,
            use_cpu=chat.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            student,
            steered.model,
            config,
            Dataset.from_list(rows),
            processing_class=chat.tokenizer,
        )
        trainer.add_callback(Clock())

        def train() -> list[float]:
            trainer.train()
            return ends

        yield train


def trl(options, bf16: bool):
    teacher, prompts = set_up()
    student, texts = ss.load_model("smollm2-135m").model, prompts.harmful[: options.sequences]
    with trl_steps(teacher, student, texts, options.steps, options.new_tokens, bf16) as train:
        before, started = start_memory(), time.perf_counter()
        train()
        return (time.perf_counter() - started) / options.steps, extra_mb(before), {}


OURS = {
    "ours": lambda options: ours(options, adapter=False, dtype="float32"),
    "narrow": lambda options: ours(options, adapter=False, dtype="bfloat16"),
    "adapter": lambda options: ours(options, adapter=True, dtype="bfloat16"),
}
PATHS = OURS | {
    "naive": naive,
    "trl": lambda options: trl(options, bf16=False),
    "trl-bf16": lambda options: trl(options, bf16=True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--path", choices=["all", *PATHS], default="all")
    options = parser.parse_args()
    if options.path != "all":
        made = PATHS[options.path](options)
        print(json.dumps({"seconds": round(made[0], 1), "extra_mb": round(made[1]), **made[2]}))
        return
    results = {}
    peers = ["naive", "trl", "trl-bf16"] if importlib.util.find_spec("trl") else ["naive"]
    for path in (*OURS, *peers):
        sizes = (options.sequences, "--new-tokens", options.new_tokens, "--steps", options.steps)
        results[path] = in_process(__file__, "--path", path, "--sequences", *sizes)
        print(path, results[path], flush=True)
    ratios = {
        f"{what}_{peer}_over_{path}": round(results[peer][key] / max(1e-9, results[path][key]), 2)
        for peer in peers
        for path in OURS
        for what, key in (("time", "seconds"), ("memory", "extra_mb"))
    }
    print(json.dumps({**ratios, "results": results, **machine()}))


if __name__ == "__main__":
    main()
