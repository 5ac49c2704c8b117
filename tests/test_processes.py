"""Two processes that share a step's answers take the step that one process takes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from conftest import copy_of, set_of
from safesteer._errors import SafeSteerError
from safesteer._files import json_lines, read_tensors
from safesteer.alignment import align
from safesteer.distillation import loop
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.recipes import recipe
from safesteer.run_folder import STAGES
from safesteer.settings import DistillConfig
from safesteer.tokens.token_set import TokenSet

SETTINGS = {
    "n_steps": 3,
    "harmful_per_step": 3,
    "harmless_per_step": 2,
    "n_rollouts": 2,
    "max_new_tokens": 4,
    "lr": 1e-3,
}
SCRIPT = """
import json, sys
from dataclasses import asdict, replace
from pathlib import Path
from accelerate import PartialState
import safesteer as ss
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.models.sharding import shard

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
base, student = (ss.load_model(str(folder / "tiny"), device="cpu") for _ in range(2))
student = base if settings.get("lora_rank") else student
direction = ss.Direction.load(folder / "direction.safetensors", base)
tokens = ss.TokenSet.load(folder / "tokens.json")
config = ss.DistillConfig(**settings)
state = prepare_student(student, direction, config)
if config.sharded and not config.lora_rank:
    shard(base.model)
block = next(p for n, p in state.trained.items() if ".layers." in n)
assert (block.to_local().numel() == block.numel() // 2) if config.sharded else not hasattr(block, "to_local")
few = ss.load_prompts().split("val").first(6)
records = [asdict(r) for r in training_steps(state, Teacher(base, direction, tokens), few)]
rank = PartialState().process_index
assert PartialState().num_processes == 2
(folder / f"history{rank}.json").write_text(json.dumps(records))
state.save(folder / f"end{rank}.safetensors", {})
if config.sharded and not config.lora_rank:  # the file gives each process its share again
    goes_on = replace(state, config=replace(config, n_steps=config.n_steps + 1))  # so its moments are written
    goes_on.save(folder / f"between{rank}.safetensors", {})
    again = prepare_student(ss.load_model(str(folder / "tiny"), device="cpu"), direction, config)
    again.load(folder / f"between{rank}.safetensors", {})
    assert again.step == state.step
    for name, p in again.trained.items():
        q = state.trained[name]
        pairs = [(p, q), (again.optimizer.state[p]["exp_avg"], state.optimizer.state[q]["exp_avg"])]
        assert all(type(a) is type(b) and bool((a == b).all()) for a, b in pairs)
PartialState().destroy_process_group()
"""


def torchrun(folder: Path, settings: dict) -> None:
    (folder / "train.py").write_text(SCRIPT)
    launch([str(folder / "train.py"), str(folder), json.dumps(settings)])


def launch(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tiny_llama, direction, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    tiny_llama.model.save_pretrained(path / "tiny")
    tiny_llama.tokenizer.save_pretrained(path / "tiny")
    direction.save(path / "direction.safetensors")
    set_of(range(40, 48)).save(path / "tokens.json")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"rollouts": "mixed"},
        {"rollouts": "student", "lora_rank": 4},
        {"rollouts": "mixed", "sharded": True},
        {"rollouts": "mixed", "sharded": True, "lora_rank": 4, "micro_batch": 1},
        {
            "rollouts": "student",
            "sharded": True,
            "train_layers": "all",
            "checkpointing": True,
            "micro_batch": 2,
        },
        {"texts_per_step": 3, "margin_weight": 1.0, "wrapped_share": 0.5, "opened_share": 0.5},
        {"texts_per_step": 3, "margin_weight": 1.0, "sharded": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_processes_take_the_steps_of_one(folder, tiny_llama, direction, few, tmp_path, settings):
    settings = {**SETTINGS, **settings}
    if "lora_rank" in settings:
        pytest.importorskip("peft")
    config, tokens = DistillConfig(**{**settings, "sharded": False}), TokenSet.load(folder / "tokens.json")
    base = copy_of(tiny_llama)
    state = prepare_student(base if config.lora_rank else copy_of(tiny_llama), direction, config)
    alone = [asdict(r) for r in training_steps(state, Teacher(base, direction, tokens), few)]
    state.save(tmp_path / "alone.safetensors", {})
    want, _ = read_tensors(tmp_path / "alone.safetensors")
    torchrun(folder, settings)
    for rank in (0, 1):
        got, _ = read_tensors(folder / f"end{rank}.safetensors")
        assert got.keys() == want.keys()
        worst = max(float((got[k] - want[k]).abs().max()) for k in want if k.startswith("param."))
        # AdamW divides a gradient near zero by itself: rounding shows as a small share of a step.
        assert worst < 0.02 * config.lr * config.n_steps
        shared = json.loads((folder / f"history{rank}.json").read_text())
        for a, b in zip(alone, shared, strict=True):
            # The first step's numbers do not know AdamW yet.
            exact = 1e-5 if a["step"] == 1 else 1e-3
            for name in ("loss", "grad_norm", "mass_on_s_student", "mass_on_s_teacher", "n_tokens"):
                assert b[name] == pytest.approx(a[name], rel=exact), (name, a["step"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "float32"),
        ({"sharded": True}, "float32"),
        ({"sharded": True}, "bfloat16"),
        ({"sharded": True, "lora_rank": 4}, "float32"),
    ],
)
def test_the_command_line_under_torchrun_writes_one_run_folder(folder, tmp_path, changes, precision):
    """The first process does the other stages and writes; the second helps to distil."""
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    settings = {
        "dtype": precision,
        "distill.precision": precision,
        "direction.n_train": 6,
        "direction.n_val": 3,
        "direction.extraction": "prefill",
        "tokens.k": 8,
        "tokens.n_samples": 2,
        "tokens.horizon": 3,
        "tokens.min_steered_prob": 1e-4,
        "distill.n_steps": 3,
        "distill.harmful_per_step": 2,
        "distill.harmless_per_step": 2,
        "distill.max_new_tokens": 3,
        **{f"distill.{name}": value for name, value in changes.items()},
    }
    model, alone, shared = str(folder / "tiny"), tmp_path / "alone", tmp_path / "shared"
    align(model, alone, recipe(**{**settings, "distill.sharded": False}), stages=STAGES[:3])
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    launch(["-m", "safesteer.cli", "export", model, "--out", str(shared), *words])
    assert (shared / "model" / "model.safetensors").is_file()
    histories = [json_lines(path / "history.jsonl") for path in (alone, shared)]
    assert [record["step"] for record in histories[1]] == [1, 2, 3]
    for ours, theirs in zip(*histories, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4 if precision == "float32" else 0.1)


def test_one_process_has_nobody_to_share_with(folder, tiny_llama, direction, tmp_path):
    with pytest.raises(SafeSteerError, match="needs several processes"):
        prepare_student(copy_of(tiny_llama), direction, DistillConfig(sharded=True))
    with pytest.raises(SafeSteerError, match="needs several processes"):
        align(str(folder / "tiny"), tmp_path / "run", recipe("quick", **{"distill.sharded": "true"}))
    assert not (tmp_path / "run").exists()


def test_more_processes_than_prompts_is_one_sentence(tiny_llama, direction, few, folder, monkeypatch):
    class Three:
        num_processes, process_index = 3, 0

        def __init__(self, cpu): ...

    monkeypatch.setattr(loop, "PartialState", Three)
    teacher = Teacher(tiny_llama, direction, TokenSet.load(folder / "tokens.json"))
    config = DistillConfig(harmful_per_step=1, harmless_per_step=1)
    state = prepare_student(copy_of(tiny_llama), direction, config)
    with pytest.raises(SafeSteerError, match="3 processes cannot share the 2 prompts"):
        next(training_steps(state, teacher, few))
