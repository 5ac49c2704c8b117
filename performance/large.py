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

import torch
from measure import machine
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import safesteer as ss
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
    "recipe": {"dtype": "bfloat16"},
    "direction": {
        "extraction": "prefill",
        "n_train": 4,
        "n_val": 2,
        "n_val_first": "none",
        "n_controls": 1,
        "n_held_out": 1,
        "coeff": 1.5,  # or answers at several are compared
        "min_steering": -1e9,
        "max_kl": 1e9,
    },
    "tokens": {"horizon": 2, "n_samples": 1, "min_steered_prob": 0, "n_contexts": 1},
    "distill": {
        "lora_rank": 8,
        "precision": "bfloat16",
        "n_steps": 2,
        "harmful_per_step": 2,
        "harmless_per_step": 2,
        "max_new_tokens": 2,
        "watch_every": 0,
    },
    "evaluate": {
        "n_prompts": 2,
        "sets": "",
        "max_new_tokens": 2,
        "n_kl_tokens": 2,
        "perplexity_tokens": 64,
        "perplexity_width": 64,
    },
    "explain": {
        "n_prompts": 2,
        "n_harmful": 1,
        "n_samples": 1,
        "n_traces": 1,
        "max_tokens": 2,
        "n_sets": 1,
        "n_splits": 1,
    },
}


def write_model(folder: Path) -> None:
    """Write weights, tokenizer and configuration; no more than one block is held."""
    if (folder / "model.safetensors.index.json").exists():
        return
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ss.load_model("smollm2-135m", device="cpu").tokenizer
    SHAPE.eos_token_id = SHAPE.pad_token_id = tokenizer.eos_token_id
    SHAPE.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
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
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) / 1024


def held_mb() -> float:
    """Return what the processes of the run have of their own: anonymous memory, without mapped files."""
    held = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"safesteer.cli" in (process / "cmdline").read_bytes():
                lines = (process / "status").read_text().splitlines()
                held += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
        except OSError:  # it has ended
            continue
    return held


def stages(run: Path) -> dict[str, dict]:
    """Return the finished stages of a run, by name."""
    try:
        return json.loads((run / MANIFEST).read_text())["stages"]
    except (OSError, ValueError):  # it has not begun, or is being written
        return {}


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
    settings = [
        f"{stage}.{name}={value}" for stage, changes in LEAST.items() for name, value in changes.items()
    ]
    settings = [setting.removeprefix("recipe.") for setting in settings]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.processes)]
    command += ["-m", "safesteer.cli", "align", str(model), "--out", str(run)]
    command += ["--prompts", str(options.folder / "prompts.jsonl"), "--device-map", "auto"]
    command += [word for setting in settings for word in ("--set", setting)]
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
