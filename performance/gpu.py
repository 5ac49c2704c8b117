"""What was measured on CPUs, and what needs a GPU, in one command of at most 20 minutes.

    python performance/gpu.py --out runs/gpu        (writes gpu.json and gpu.md)
    python performance/gpu.py --tiny                (the same code with tiny models on the CPU, half a minute)

    loss      the loss and its gradient: ours, full logits, Liger
    step      one optimizer step: ours, a naive one, TRL
    sweep     the position x layer sweep: ours, one candidate at a time
    rollout   answers: ours, transformers' generate (which TRL's trainers call too)
    large     random weights in the shapes of a 4B and an 8B: reading, answering, steps of an adapter
    checks    the same numbers on the CPU and on the device, and students taken from each to the other

All paths of a section get the same weights, prompts and precision (bfloat16; checks: float32). Each is warmed
up, then repeated; median and range are written down. Weights are random where a row names a shape, so nothing
here says how good a model is. A path that fails says so and the next one runs; after `--minutes` none begins.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import loss
import sweep
import torch
from gpu_checks import compared
from gpu_models import FULL, SMALL, Cost, Sizes, float32_student, random_chat, random_teacher, roofline
from gpu_page import page
from measure import between, by_clock, machine, peak_mb, spread, start_peak, timed
from trainer import naive_step, trl_steps

import safesteer as ss
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.models.batch import PromptBatch
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate_ids, uniforms

N_STEPS = 4  # of which the first warms up
NEEDS = {"Liger": "liger_kernel", "TRL": "trl", "steps of an adapter": "peft"}  # package of a path
PACKAGES = ("transformers", "trl", "liger-kernel", "peft")
Rows = Iterator[dict]


def rates(device: torch.device, sizes: Sizes) -> dict:
    """Measure what the device reaches: bfloat16 products, and memory read and written."""
    n, n_bytes = sizes.matmul, sizes.copied_mb * 2**20
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = timed(lambda: a @ b, device, 10), timed(lambda: target.copy_(source), device, 10)
    return {
        "matmul_tflops": 2 * n**3 / product["median_s"] / 1e12,
        "gb_per_s": 2 * n_bytes / copy["median_s"] / 1e9,
    }


def measured(row: dict, paths: Mapping[str, Callable[[], dict]]) -> Rows:
    """Yield the row of each path with what it measures, or why there is nothing."""
    for path, measure in paths.items():
        named = {**row, "path": path}
        if path in NEEDS and find_spec(NEEDS[path]) is None:
            yield {**named, "note": f"{NEEDS[path]} is not installed"}
            continue
        try:
            yield {**named, **measure()}
        except torch.OutOfMemoryError:
            yield {**named, "note": "out of memory"}
        except Exception as error:  # the other paths are still worth their minutes
            traceback.print_exc()
            yield {**named, "failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def loss_rows(device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    for n, d_vocab, d_model in sizes.losses:
        generator, options = torch.Generator().manual_seed(0), {"device": device, "dtype": torch.bfloat16}
        hidden, h_teacher = torch.randn(2, n, d_model, generator=generator).to(**options)
        weight = (0.02 * torch.randn(d_vocab, d_model, generator=generator)).to(**options)
        ids = torch.randperm(d_vocab, generator=generator)[: loss.N_SET].sort().values.to(device)

        def gradient(path: str, hidden=hidden, others=(weight, h_teacher, weight, ids)) -> None:
            loss.PATHS[path](hidden.detach().requires_grad_(), *others).backward()

        paths = {"ours": "ours", "full logits": "naive", "Liger": "liger"}
        calls = {k: partial(timed, partial(gradient, v), device, sizes.repeats) for k, v in paths.items()}
        yield from measured({"positions": n, "V": d_vocab, "d": d_model}, calls)


def step_rows(device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    """Yield a step of each path: float32 weights that train, passes and teacher in bfloat16."""
    teacher = random_teacher(random_chat(sizes.middle, device))
    texts = ss.load_prompts().split("distill").harmful[: sizes.sequences]

    def ours() -> dict:
        return by_clock(our_steps(teacher, float32_student(teacher.base), sizes), device)

    def naive() -> dict:
        return by_clock(naive_steps(teacher, float32_student(teacher.base), texts, sizes), device)

    def trl() -> dict:
        student = float32_student(teacher.base).model
        with trl_steps(teacher, student, texts, N_STEPS, sizes.new_tokens, bf16=True) as train:
            before = start_peak(device)
            return {**between(train()), "peak_mb": peak_mb(device, before)}

    row = {"shape": sizes.middle, "sequences": len(texts), "tokens": sizes.new_tokens}
    yield from measured(row, {"ours": ours, "naive": naive, "TRL": trl})


def our_steps(teacher: Teacher, student: ss.ChatModel, sizes: Sizes, **settings) -> Iterator[dict]:
    config = ss.DistillConfig(
        n_steps=N_STEPS,
        harmful_per_step=sizes.sequences,
        harmless_per_step=0,
        max_new_tokens=sizes.new_tokens,
        rollouts="student",
        precision="bfloat16",
        watch_every=0,  # what no other path does
        **settings,
    )
    state, prompts = prepare_student(student, teacher.direction, config), ss.load_prompts().split("distill")
    for record in training_steps(state, teacher, prompts):
        yield {name: getattr(record, name) for name in ("rollout_s", "teacher_s", "student_s")}


def naive_steps(teacher: Teacher, student: ss.ChatModel, texts: list[str], sizes: Sizes) -> Iterator[dict]:
    step = naive_step(teacher, student.model, "bfloat16")
    for _ in range(N_STEPS):
        step(texts, sizes.new_tokens)
        yield {}


def sweep_rows(device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    chat = random_chat(sizes.middle, device)
    task = sweep.Task.of(chat, sizes.pairs, every=max(1, chat.n_layers // 4))

    def ours() -> dict:
        return {"candidates": len(task.run), **timed(task.ours, device, sizes.repeats)}

    def naive() -> dict:
        result, seconds = sweep.compare(task, sizes.timed)
        note = f"{len(seconds)} candidates, times {len(task.cells)}; scores differ by up to"
        return {
            "candidates": len(task.cells),
            **spread([len(task.cells) * s for s in seconds]),
            "note": f"{note} {result['max_abs_difference']}",
        }

    row = {"shape": sizes.middle, "pairs": sizes.pairs}
    yield from measured(row, {"ours": ours, "one by one": naive})


def rollout_rows(device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    chat, n = random_chat(sizes.middle, device), sizes.new_tokens
    texts = ss.load_prompts().split("distill").harmful[: sizes.sequences]
    batch, plain = PromptBatch.of(chat.tokenizer, texts, device=device), sweep.padded(chat, texts)
    drawn = torch.cat([uniforms((0, i), 1, n) for i in range(len(texts))])
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sampling |= {"max_new_tokens": n, "min_new_tokens": n}

    def ours() -> None:
        generate_ids(chat, batch, max_new_tokens=n, min_new_tokens=n, temperature=1.0, uniform=drawn)

    @torch.no_grad()
    def naive() -> None:
        chat.model.generate(plain.prompt_ids, attention_mask=plain.attention_mask, **sampling)

    def rate(call: Callable[[], None]) -> dict:
        seconds = timed(call, device, sizes.repeats)
        return {**seconds, "tokens_per_s": len(texts) * n / seconds["median_s"]}

    row = {"shape": sizes.middle, "answers": len(texts), "tokens": n}
    paths = {"ours": partial(rate, ours), "transformers, as TRL": partial(rate, naive)}
    yield from measured(row, paths)


def large_rows(device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    """Yield what each shape does in bfloat16, and its share of what the device can do."""
    for shape in sizes.large:
        opened: list[ss.ChatModel] = []

        def weights(shape=shape, opened=opened) -> dict:
            before = start_peak(device)
            opened.append(random_chat(shape, device))
            peak, n_parameters = peak_mb(device, before), sum(p.numel() for p in opened[0].model.parameters())
            right = bool(opened[0].check().right.all())
            note = "earns every short cut" if right else "does not earn every short cut"
            return {"parameters": n_parameters, "peak_mb": peak, "note": note}

        def adapter(opened=opened) -> dict:
            teacher, settings = random_teacher(opened[0]), {"lora_rank": 16, "checkpointing": True}
            result = by_clock(our_steps(teacher, opened[0], sizes, **settings), device)
            return {**result, "tokens_per_s": sizes.sequences * sizes.new_tokens / result["median_s"]}

        yield from measured({"shape": shape}, {"weights": weights})
        if opened:
            paths = {
                "reading": lambda opened=opened: reading(opened[0], sizes, reached),
                "answering": lambda opened=opened: answering(opened[0], sizes, reached),
                "steps of an adapter": adapter,
            }
            yield from measured({"shape": shape}, paths)
        opened.clear()


@torch.no_grad()
def reading(chat: ss.ChatModel, sizes: Sizes, reached: dict) -> dict:
    """Read rows of equal length, without an answer."""
    rows, width, generator = sizes.read_rows, sizes.read_tokens, torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (rows, width), generator=generator).tolist()
    batch = PromptBatch.from_ids(ids, [[]] * rows, share=False, device=chat.device)
    seconds = timed(lambda: final_hidden(chat.model, batch), chat.device, sizes.repeats)
    limits = roofline(Cost.of(chat).reading(rows, width), seconds["median_s"], reached)
    return {**seconds, "tokens_per_s": rows * width / seconds["median_s"], **limits}


def answering(chat: ss.ChatModel, sizes: Sizes, reached: dict) -> dict:
    """Answer greedily; every new token reads the weights once, whatever the number of answers."""
    texts, n = ss.load_prompts().split("distill").harmful[: sizes.sequences], sizes.new_tokens
    batch = PromptBatch.of(chat.tokenizer, texts, device=chat.device)
    lengths = batch.attention_mask.sum(1).tolist()
    seconds = timed(
        lambda: generate_ids(chat, batch, max_new_tokens=n, min_new_tokens=n), chat.device, sizes.repeats
    )
    cost = Cost.of(chat).answering(lengths, n, batch.n_shared)
    limits = roofline(cost, seconds["median_s"], reached)
    return {**seconds, "tokens_per_s": len(texts) * n / seconds["median_s"], **limits}


def check_rows(device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    """Yield how far the device is from the CPU, in float32 and on the same weights."""
    if sizes is SMALL:
        chat = random_chat("tiny", torch.device("cpu"), torch.float32)
    else:
        chat = ss.load_model("smollm2-135m", device="cpu")
    yield from compared(chat, device)


SECTIONS = {
    "loss": loss_rows,
    "step": step_rows,
    "sweep": sweep_rows,
    "rollout": rollout_rows,
    "large": large_rows,
    "checks": check_rows,
}


def described(device: torch.device) -> dict:
    """Describe the machine, the device and the packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    named = {"gpu": gpu.name, "gpu_mb": round(gpu.total_memory / 2**20)} if gpu else {"gpu": None}
    return {**machine(), "device": str(device), **named, "cuda": torch.version.cuda, **versions}


def section(name: str, device: torch.device, sizes: Sizes, reached: dict) -> Rows:
    """Yield the rows of a section; one that cannot be set up is a row that says why."""
    try:
        yield from SECTIONS[name](device, sizes, reached)
    except Exception as error:
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def is_bad(row: dict) -> bool:
    return "failed" in row or row.get("right") is False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="tiny models and few repeats, on the CPU")
    parser.add_argument("--device", help="by default the GPU, with --tiny the CPU")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md; none: print the page")
    parser.add_argument("--minutes", type=float, default=18.0, help="after which no path begins")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    device = torch.device(options.device or ("cpu" if options.tiny else "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here, and this measures one: --tiny tries the script on the CPU.")
    sizes, until = SMALL if options.tiny else FULL, time.perf_counter() + 60 * options.minutes
    reached = rates(device, sizes)
    result = {"machine": described(device), "tiny": options.tiny, "reached": reached, "sections": {}}
    for name in options.sections:
        began, rows = time.perf_counter(), result["sections"].setdefault(name, [])
        for row in section(name, device, sizes, reached) if began < until else ():
            rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
            print(name, json.dumps(rows[-1]), flush=True)
            if time.perf_counter() > until:
                break
        if time.perf_counter() > until:
            rows.append({"note": f"stopped after {options.minutes:g} minutes"})
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (options.out / "gpu.md").write_text(page(result), encoding="utf-8")
    if options.out is None:
        print(page(result))
    raise SystemExit(any(is_bad(row) for rows in result["sections"].values() for row in rows))


if __name__ == "__main__":
    main()
