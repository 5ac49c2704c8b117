"""A 7B-shaped model with random weights through every stage, in two processes with a device map (Linux).

    python performance/large.py --folder runs/large [--processes 2]

Writes the model (13.8 GB, bfloat16) block by block unless it is there, then runs `align` on few prompts under
torchrun with `device_map=auto`: each process fills its share of the free memory and leaves the other blocks
on the disk. Once per second it reads how much less memory the machine has than at the start, and how much the
processes hold.

The last line is JSON: seconds and peak of each stage, the peak of all. `used` is memory that nothing else
could have (the system's cache of files counts as free); `held` is what the processes have of their own.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from gpu_models import tokenizer
from measure import machine
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import safesteer as ss
from safesteer._files import read_json
from safesteer.run_folder import MANIFEST, STAGES

SHAPE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=49152,  # that of SmolLM2's tokenizer
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)
PAIRS = {"train": 4, "val": 2, "distill": 4, "test": 2}  # of each split
LEAST = {  # every stage, on as little as it can take
    "dtype": "bfloat16",
    "direction.extraction": "prefill",
    "direction.n_train": 4,
    "direction.n_val": 2,
    "direction.n_val_first": "none",
    "direction.n_controls": 1,
    "direction.n_held_out": 1,
    "direction.coeff": 1.5,  # or answers at several are compared
    "direction.min_steering": -1e9,
    "direction.max_kl": 1e9,
    "tokens.horizon": 2,
    "tokens.n_samples": 1,
    "tokens.min_steered_prob": 0,
    "tokens.n_contexts": 1,
    "distill.lora_rank": 8,
    "distill.precision": "bfloat16",
    "distill.n_steps": 2,
    "distill.harmful_per_step": 2,
    "distill.harmless_per_step": 2,
    "distill.max_new_tokens": 2,
    "distill.watch_every": 0,
    "evaluate.n_prompts": 2,
    "evaluate.sets": "",
    "evaluate.max_new_tokens": 2,
    "evaluate.n_kl_tokens": 2,
    "evaluate.perplexity_tokens": 64,
    "evaluate.perplexity_width": 64,
    "explain.n_prompts": 2,
    "explain.n_harmful": 1,
    "explain.n_samples": 1,
    "explain.n_traces": 1,
    "explain.max_tokens": 2,
    "explain.n_sets": 1,
    "explain.n_splits": 1,
}


def write_model(folder: Path) -> None:
    """Write weights, tokenizer and configuration; no more than one block is held."""
    if (folder / "model.safetensors.index.json").exists():
        return
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    SHAPE.eos_token_id = SHAPE.pad_token_id = tokenizer().eos_token_id
    SHAPE.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    files: dict[str, str] = {}

    def write(tensors: dict[str, torch.Tensor], file: str) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, file))

    def rows() -> torch.Tensor:
        return (0.02 * torch.randn(SHAPE.vocab_size, SHAPE.hidden_size)).to(torch.bfloat16)

    for i in range(SHAPE.num_hidden_layers):
        block = LlamaDecoderLayer(SHAPE, i)
        for part in block.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
        weights = {f"model.layers.{i}.{k}": v.to(torch.bfloat16) for k, v in block.state_dict().items()}
        write(weights, f"model-{i:02}.safetensors")
    norm = torch.ones(SHAPE.hidden_size, dtype=torch.bfloat16)
    outside = {"model.embed_tokens.weight": rows(), "model.norm.weight": norm, "lm_head.weight": rows()}
    write(outside, "model-outside.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_prompts(path: Path) -> None:
    """Write the first pairs of each split of the project's own prompts."""
    splits = {split: ss.load_prompts().split(split).first(n) for split, n in PAIRS.items()}
    rows = [
        {"prompt": prompt.text, "label": prompt.label, "split": split}
        for split, prompts in splits.items()
        for prompt in prompts.prompts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def available_mb() -> float:
    return psutil.virtual_memory().available / 2**20


def held_mb() -> float:
    """Return what the processes of the run have of their own: anonymous memory, without mapped files."""
    processes = (p.info for p in psutil.process_iter(["cmdline", "memory_info"]))
    sizes = (p["memory_info"] for p in processes if "safesteer.cli" in (p["cmdline"] or []))
    return sum((size.rss - size.shared) / 2**20 for size in sizes if size)


def stages(run: Path) -> dict[str, dict]:
    """Return the finished stages of a run, by name."""
    manifest = run / MANIFEST
    return read_json(manifest)["stages"] if manifest.exists() else {}


def running_stage(run: Path) -> str:
    """Name the first stage that is not finished."""
    done = stages(run)
    return next((stage for stage in STAGES if stage not in done), "after")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/large"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    model, run = options.folder / "model", options.folder / "run"
    write_model(model)
    write_prompts(options.folder / "prompts.jsonl")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.processes)]
    command += ["-m", "safesteer.cli", "align", str(model), "--out", str(run)]
    command += ["--prompts", str(options.folder / "prompts.jsonl"), "--device-map", "auto"]
    command += [word for name, value in LEAST.items() for word in ("--set", f"{name}={value}")]
    before, started, peaks, ended = available_mb(), time.perf_counter(), {}, threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            peak = peaks.setdefault(running_stage(run), {"used_mb": 0, "held_mb": 0})
            peak["used_mb"] = max(peak["used_mb"], round(before - available_mb()))
            peak["held_mb"] = max(peak["held_mb"], round(held_mb()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run(command)
    ended.set()
    watcher.join()
    result = {
        "return_code": done.returncode,
        "seconds": round(time.perf_counter() - started),
        "peaks": peaks,
        "peak_used_mb": max(peak["used_mb"] for peak in peaks.values()),
        "peak_held_mb": max(peak["held_mb"] for peak in peaks.values()),
        "seconds_of_stages": {name: round(stage["seconds"]) for name, stage in stages(run).items()},
        "processes": options.processes,
        "parameters": sum(path.stat().st_size for path in model.glob("*.safetensors")) // 2,
    }
    print(json.dumps({**result, **machine()}))


if __name__ == "__main__":
    main()
