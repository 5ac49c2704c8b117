"""`performance/gpu.py`: one sentence without a GPU, a tiny run that measures all, arithmetic as torch's."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import PACKAGE
from safesteer.models.batch import PromptBatch
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate_ids

SCRIPTS = PACKAGE.parent / "performance"
SECTIONS = ["loss", "step", "sweep", "rollout", "large", "checks"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, str(SCRIPTS / "gpu.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "torch sees no GPU here, and this measures one: --tiny tries the script on the CPU."
    ]


@pytest.mark.slow
def test_the_tiny_run_measures_every_path(smollm2, tmp_path):
    done = run("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert list(result["sections"]) == SECTIONS
    assert result["machine"]["threads"] >= 1
    assert result["machine"]["processor"]
    rows = {
        name: {row.get("path") or row["what"]: row for row in rows}
        for name, rows in result["sections"].items()
    }
    assert rows["loss"].keys() == {"ours", "full logits", "Liger"}
    assert rows["step"].keys() == {"ours", "naive", "TRL"}
    for row in (row for name in SECTIONS[:-1] for row in rows[name].values()):
        if "is not installed" in row.get("note", "") or row["path"] == "weights":
            continue
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["repeats"] >= 3
    for name in ("reading", "answering"):
        assert rows["large"][name]["share_of_roofline"] > 0
    assert all(row["right"] for row in rows["checks"].values() if "right" in row)
    page = (tmp_path / "gpu.md").read_text()
    assert "its numbers say nothing" in page
    assert all(f"## {name.capitalize()}" in page for name in SECTIONS)


@pytest.mark.parametrize("shape", ["tiny", "tiny, as Qwen3"])
def test_operations_are_those_that_torch_counts(shape, smollm2, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from gpu_models import Cost, random_chat

    chat = random_chat(shape, torch.device("cpu"), torch.float32)
    chat.model.set_attn_implementation("eager")  # torch counts no operations of the fused one on CPUs
    cost = Cost.of(chat)
    batch = PromptBatch.from_ids([[5] * 64, [6] * 64], [[], []], share=False)
    answer = partial(generate_ids, chat, batch, max_new_tokens=5, min_new_tokens=5)
    answer()  # a model's first passes check what it does right
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        final_hidden(chat.model, batch)
    masked = cost.operations_per_key * 2 * 64 * 63 // 2  # torch counts what the mask leaves out
    assert cost.reading(2, 64)[0] + masked == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        answer()
    assert cost.answering([64, 64], 5)[0] == pytest.approx(counter.get_total_flops(), rel=0.05)
