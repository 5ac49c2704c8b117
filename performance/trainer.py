"""One optimizer step (rollout, teacher, student) against a naive one and TRL's, in one run.

    python performance/trainer.py [--sequences 32] [--new-tokens 64] [--steps 3]

Each path runs in a process of its own: models are loaded, a step of full size warms up, then each of the
steps is timed. Peak resident memory is above the loaded models. Paths are compared with those of their own
precision: median and range of the steps, and the ratio of the medians.

    ours        distill as it is, blocks from the steered layer up, float32
    narrow      the same with passes in bfloat16 and a bfloat16 teacher; the trained weights stay float32
    adapter     a rank-16 adapter on one bfloat16 copy of the weights, passes in bfloat16
    naive       a second whole model as teacher, prompts padded to the longest and read again for every
                answer, logits of all answer positions, log-softmax over the vocabulary, autograd; float32
    naive-bf16  the same with passes in bfloat16 and a bfloat16 teacher
    trl         DistillationTrainer of TRL, if it is installed: the steered copy as its teacher, full
                vocabulary, the same blocks trained, micro-batches of the same size, float32
    trl-bf16    the same with its mixed precision
"""

import argparse
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from measure import between, by_clock, extra_mb, in_process, machine, start_memory, synchronize
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


def ours(options: argparse.Namespace, adapter: bool, dtype: str) -> dict:
    wide, prompts = set_up()
    teacher = replace(wide, base=ss.load_model("smollm2-135m", dtype=dtype))
    config = ss.DistillConfig(
        n_steps=1 + options.steps,
        harmful_per_step=options.sequences,
        harmless_per_step=0,
        max_new_tokens=options.new_tokens,
        rollouts="student",
        lora_rank=16 if adapter else 0,
        precision=dtype,
        watch_every=0,
    )
    student = teacher.base if adapter else ss.load_model("smollm2-135m")
    state = prepare_student(student, teacher.direction, config)
    parts = ("rollout_s", "teacher_s", "student_s")
    records = training_steps(state, teacher, prompts)
    return by_clock(({part: getattr(r, part) for part in parts} for r in records), teacher.base.device)


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


def naive(options: argparse.Namespace, dtype: str) -> dict:
    wide, prompts = set_up()
    teacher = replace(wide, base=ss.load_model("smollm2-135m", dtype=dtype))
    step = naive_step(teacher, ss.load_model("smollm2-135m").model, dtype)

    def steps() -> Iterator[dict]:
        for i in range(1 + options.steps):
            at = i * options.sequences
            step(
                [prompts.harmful[j % len(prompts.harmful)] for j in range(at, at + options.sequences)],
                options.new_tokens,
            )
            yield {}

    return by_clock(steps(), teacher.base.device)


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


def trl(options: argparse.Namespace, bf16: bool) -> dict:
    teacher, prompts = set_up()
    student, n_steps = ss.load_model("smollm2-135m").model, 1 + options.steps
    texts = prompts.harmful[: options.sequences]
    with trl_steps(teacher, student, texts, n_steps, options.new_tokens, bf16) as train:
        before = start_memory()
        return {**between(train()), "peak_mb": round(extra_mb(before))}


OURS = {
    "ours": partial(ours, adapter=False, dtype="float32"),
    "narrow": partial(ours, adapter=False, dtype="bfloat16"),
    "adapter": partial(ours, adapter=True, dtype="bfloat16"),
}
PEERS = {
    "naive": partial(naive, dtype="float32"),
    "naive-bf16": partial(naive, dtype="bfloat16"),
    "trl": partial(trl, bf16=False),
    "trl-bf16": partial(trl, bf16=True),
}
ALIKE = (  # what is compared: the precision is the same
    ("naive", "ours"),
    ("trl", "ours"),
    ("naive-bf16", "narrow"),
    ("trl-bf16", "narrow"),
    ("naive-bf16", "adapter"),
    ("trl-bf16", "adapter"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--path", choices=["all", *OURS, *PEERS], default="all")
    options = parser.parse_args()
    if options.path != "all":
        print(json.dumps((OURS | PEERS)[options.path](options)))
        return
    results, has_trl = {}, importlib.util.find_spec("trl") is not None
    for path in (*OURS, *(peer for peer in PEERS if has_trl or not peer.startswith("trl"))):
        sizes = (options.sequences, "--new-tokens", options.new_tokens, "--steps", options.steps)
        results[path] = in_process(__file__, "--path", path, "--sequences", *sizes)
        print(path, {key: round(value, 1) for key, value in results[path].items()}, flush=True)
    for peer, path in ALIKE:
        if peer in results:
            time, memory = (results[peer][key] / results[path][key] for key in ("median_s", "peak_mb"))
            print(f"{peer} / {path}: time {time:.2f}, memory {memory:.2f}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("transformers", *["trl"] * has_trl)}
    print(json.dumps({"results": results, **vars(options), **versions, **machine()}))


if __name__ == "__main__":
    main()
