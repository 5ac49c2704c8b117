"""Two processes that share the prompts of a stage get what one process gets, and each reads a part."""

import json

import pytest
import torch
from test_pipeline import QUIET, SMALL
from test_processes import launch

from safesteer._files import read_json
from safesteer.alignment import align
from safesteer.models.processes import in_turns, share_work
from safesteer.recipes import recipe

# What both sides run. A judge that is a model is asked by one process for all.
MEASURE = """
from dataclasses import asdict
import safesteer as ss
from safesteer.directions.activations import Arm, read_activations
from safesteer.judges.judge import ModelJudge, Verdict

class Counting(ModelJudge):
    version = "1"
    n_asked = 0

    def verdicts(self, prompts, answers):
        type(self).n_asked += len(answers)
        return [Verdict(p, a, "counting", float("a" in a), None) for p, a in zip(prompts, answers)]

def measure(folder):
    n_read, parts = [], {}
    chat = ss.load_model(str(folder), device="cpu")
    count = lambda module, args, out: n_read.append(args[0].numel())
    chat.model.get_input_embeddings().register_forward_hook(count)

    def read(name):
        parts[name] = sum(n_read)
        n_read.clear()

    few = ss.load_prompts().split("train", "val", "test")
    activations = [
        (rows, h.sum(dim=(1, 2, 3)).tolist())
        for rows, h in read_activations(chat, Arm(few.harmful[:16]), batch_size=2)
    ]
    read("activations")
    config = ss.DirectionConfig(
        extraction="prefill", n_train=40, n_val=3, coeff=2.0, max_kl=99, min_steering=-99
    )
    direction = ss.find_direction(chat, few, config)
    read("direction")
    texts = few.split("val").harmless[:8]
    config = ss.TokenConfig(k=8, horizon=3, n_samples=2, batch_size=2, min_steered_prob=1e-4)
    tokens = ss.select_tokens(chat, direction, texts, config)
    read("tokens")
    scores = ss.evaluate(
        chat,
        direction=direction,
        prompts=few,
        config=ss.EvaluateConfig(n_prompts=8, max_new_tokens=4, batch_size=2, perplexity_tokens=50),
        judge=Counting(),
    )
    read("evaluation")
    return {
        "activations": activations,
        "vector": direction.vector.tolist(),
        "sweep": direction.sweep.table.to_csv(),
        "tokens": asdict(tokens),
        "scores": {name: asdict(s) for name, s in scores.scores.items()},
        "answers": scores.answers,
        "n_read": parts,
        "n_asked": Counting.n_asked,
    }
"""
SCRIPT = (
    MEASURE
    + """
import json, sys
from pathlib import Path
from accelerate import PartialState
from safesteer.models.processes import in_turns, share_work

processes, folder = PartialState(cpu=True), Path(sys.argv[1])
with share_work():
    result = measure(folder / "tiny")

def fails_in_the_second(item):
    if item == 1:
        raise ss.SafeSteerError(f"process {processes.process_index} cannot")
    return item

try:
    with share_work():
        list(in_turns(range(4), fails_in_the_second))
except ss.SafeSteerError as error:
    result["error"] = str(error)
(folder / f"shared{processes.process_index}.json").write_text(json.dumps(result))
processes.destroy_process_group()
"""
)


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharing")
    tiny_llama.model.save_pretrained(path / "tiny")
    tiny_llama.tokenizer.save_pretrained(path / "tiny")
    return path


def test_alone_everything_is_done_in_order():
    with share_work():
        assert list(in_turns("abc", str.upper)) == [("a", "A"), ("b", "B"), ("c", "C")]


@pytest.fixture
def one_thread():
    """As many as `launch` gives each process: sums have the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_what_one_finds(folder):
    names = {"__name__": "measure"}
    exec(MEASURE, names)
    alone = json.loads(json.dumps(names["measure"](folder / "tiny")))
    (folder / "script.py").write_text(SCRIPT)
    launch([str(folder / "script.py"), str(folder)])
    shared = [json.loads((folder / f"shared{rank}.json").read_text()) for rank in (0, 1)]
    for result in shared:
        assert result["error"] == "process 1 cannot"
        for name in ("activations", "vector", "sweep", "tokens", "scores", "answers"):
            assert result[name] == alone[name], name
        shares = {name: result["n_read"][name] / n for name, n in alone["n_read"].items()}
        assert max(shares["activations"], shares["tokens"]) < 0.6, shares
        assert max(shares["evaluation"], shares["direction"]) < 0.95, shares  # small batches are not split
    assert [result["n_asked"] for result in shared] == [alone["n_asked"], 0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_shared_run_writes_the_files_of_one_process(folder, tmp_path):
    """The first process writes; the second takes part in direction, tokens, distill and evaluate."""
    model, alone, shared = str(folder / "tiny"), tmp_path / "alone", tmp_path / "shared"
    settings = {**SMALL, "direction.extraction": "prefill"}
    align(model, alone, recipe(**settings), console=QUIET)
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    launch(["-m", "safesteer.cli", "align", model, "--out", str(shared), *words])
    for name in ("sweep.csv", "tokens.json", "held_out.csv"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    ours, theirs = (read_json(path / "evaluation.json") for path in (alone, shared))
    assert theirs["teacher"] == ours["teacher"]
    assert theirs["student"]["kl_harmless"] == pytest.approx(ours["student"]["kl_harmless"], rel=1e-3)
    assert (shared / "report.html").exists()
