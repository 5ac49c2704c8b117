"""Where the time of a run goes: every second once, products as counted by torch, nothing left behind."""

import json
import time
from collections import Counter
from contextlib import ExitStack

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_pipeline import SMALL, model_folder  # noqa: F401
from torch.nn.modules import module as torch_modules
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

import safesteer as ss
from conftest import SIZES, copy_of, n_hooks
from safesteer import _clock
from safesteer._clock import Clock, Work, running, staged, timed
from safesteer.alignment import align
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.profiling import PARTS, BareRate, profile_figure, profile_table, profiled
from safesteer.recipes import recipe
from safesteer.run_folder import STAGES

QUIET = Console(quiet=True)
DISTILLED = STAGES[:3]


def aligned(model, out, stages=DISTILLED):
    return align(str(model), out, recipe(**SMALL), stages=stages, console=QUIET)


@pytest.fixture(scope="module")
def measured(model_folder, tmp_path_factory):  # noqa: F811
    """A profiled run up to the distillation, and the seconds of its block."""
    out = tmp_path_factory.mktemp("profiled") / "run"
    with profiled(out, QUIET):
        started = time.perf_counter()
        aligned(model_folder, out)
        seconds = time.perf_counter() - started
    return out, seconds


def test_the_rows_add_up_to_the_run(measured):
    out, seconds = measured
    table = pd.read_csv(out / "profile.csv")
    assert table.seconds.sum() == pytest.approx(seconds, rel=0.1)
    assert table.share.sum() == pytest.approx(1, abs=0.01)
    assert list(dict.fromkeys(table.stage)) == ["start", *DISTILLED]
    assert not table.duplicated(["stage", "part"]).any()
    assert set(table.part) <= PARTS.keys()
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    for stage, rows in table[table.stage != "start"].groupby("stage"):
        assert rows.seconds.sum() == pytest.approx(stages[stage]["seconds"], abs=0.5)


def test_the_parts_of_a_step_have_their_work(measured):
    rows = pd.read_csv(measured[0] / "profile.csv").set_index(["stage", "part"]).loc["distill"]
    steps = [json.loads(line) for line in (measured[0] / "history.jsonl").read_text().splitlines()]
    for part in ("prompts", "decoding", "teacher", "student", "loss", "backward", "optimizer", "writing"):
        assert rows.seconds[part] > 0
    assert rows.seconds["teacher"] == pytest.approx(sum(r["teacher_s"] for r in steps), rel=0.5)
    assert rows.passes["student"] >= len(steps)
    assert rows.tokens["student"] > rows.tokens["decoding"] > 0
    assert 1 < rows.tera_ops["backward"] / rows.tera_ops["student"] <= 2
    assert (rows.share_of_bare[["teacher", "student", "backward"]] > 0).all()
    assert rows.tera_ops.isna()["writing"]


def test_a_profiled_run_gives_the_same_numbers(measured, model_folder, tmp_path):  # noqa: F811
    plain = aligned(model_folder, tmp_path / "run")
    for name in ("direction.safetensors", "tokens.json", "checkpoint.safetensors"):
        assert (plain / name).read_bytes() == (measured[0] / name).read_bytes(), name


def test_the_page_stands_alone(measured):
    page = (measured[0] / "profile.html").read_text()
    assert "Content-Security-Policy" in page
    assert "Where the time goes" in page
    assert "tera-operations per second" in page


def test_a_resumed_run_writes_what_it_did(model_folder, tmp_path):  # noqa: F811
    out = aligned(model_folder, tmp_path / "run", STAGES[:1])
    with profiled(out, QUIET):
        aligned(model_folder, out, STAGES[:2])
    table = pd.read_csv(out / "profile.csv")
    assert list(dict.fromkeys(table.stage)) == ["start", "tokens"]
    assert "loading" in set(table[table.stage == "start"].part)


def test_nothing_stays_hooked_or_is_measured_outside(tiny_llama, tmp_path):
    before = n_hooks(tiny_llama.model)
    during = ExitStack()
    during.enter_context(profiled(tmp_path / "a", QUIET))
    assert torch_modules._global_forward_hooks
    assert _clock._RUNNING
    with pytest.raises(KeyError), during:
        raise KeyError
    assert not (tmp_path / "a").exists()
    with profiled(tmp_path / "b", QUIET):
        ss.generate(tiny_llama, ["Hello"], max_new_tokens=3)
    assert not torch_modules._global_forward_hooks
    assert not _clock._RUNNING
    assert n_hooks(tiny_llama.model) == before
    rows = pd.read_csv(tmp_path / "b" / "profile.csv").set_index("part")
    assert rows.passes["decoding"] == 3
    assert rows.tokens["decoding"] == 3  # one column is left to the first pass


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"train_layers": "all"}, 0.02),
        # Attention counts as if all blocks were trained; in a model this small it is half of the work.
        ({}, 0.1),
        ({"checkpointing": True}, 0.1),
    ],
)
def test_products_are_those_that_torch_counts(tiny_llama, direction, settings, tolerance, tmp_path):
    base = copy_of(tiny_llama)
    base.model.set_attn_implementation("eager")  # of which torch counts every product
    prompts = ss.load_prompts().split("distill")
    tokens = ss.select_tokens(base, direction, prompts.harmless[:2], ss.TokenConfig(k=8, n_samples=1))
    config = ss.DistillConfig(
        n_steps=1, harmful_per_step=2, harmless_per_step=2, max_new_tokens=5, warmup=0, **settings
    )
    state = prepare_student(copy_of(base), direction, config)
    with FlopCounterMode(display=False) as counter, profiled(tmp_path, QUIET):
        list(training_steps(state, Teacher(base, direction, tokens), prompts))
        in_block = counter.get_total_flops()
    counted = pd.read_csv(tmp_path / "profile.csv").tera_ops.sum() * 1e12
    assert counted == pytest.approx(in_block, rel=tolerance)


def test_an_expert_counts_for_the_tokens_that_are_sent_to_it(tmp_path):
    """torch counts no grouped products, so by hand: 2 of 4 experts for each of 24 tokens."""
    config = MixtralConfig(**SIZES, vocab_size=400, num_hidden_layers=2, num_local_experts=4)
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad(), profiled(tmp_path, QUIET):
        model(torch.full((2, 12), 5))
    counted = pd.read_csv(tmp_path / "profile.csv").tera_ops.sum() * 1e12
    attention, router, experts = 2 * 32 * 32 + 2 * 32 * 16, 32 * 4, 2 * 3 * 32 * 48
    assert counted == pytest.approx(2 * 24 * (2 * (attention + router + experts) + 32 * 400), rel=1e-5)


def test_a_part_inside_a_part_belongs_to_the_outer_one():
    now = iter(range(100))
    clock = Clock(lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_clock.time, "perf_counter", lambda: float(next(now)))
        with running(clock):
            with staged("distill"), timed("teacher"), timed("prompts"):
                pass
            with timed("loading"):
                pass
    seconds = {place: work.seconds for place, work in clock.work.items()}
    assert seconds == {
        ("start", "other"): 3.0,
        ("distill", "other"): 2.0,
        ("distill", "teacher"): 1.0,
        ("start", "loading"): 1.0,
    }


def test_the_share_of_the_bare_rate_weighs_precisions_by_their_rates():
    wide, narrow = ("cpu", "float32"), ("cpu", "bfloat16")
    clock = Clock(lambda: None)
    clock.work["distill", "student"] = Work(2.0, 3, 400, Counter({wide: 10**12, narrow: 2 * 10**12}))
    clock.work["distill", "other"] = Work(2.0)
    rates = {wide: BareRate((8, 8), 2e12), narrow: BareRate((8, 8), 4e12)}
    table = profile_table(clock, rates).set_index("part")
    row = table.loc["student"]
    assert (row.seconds, row.share, row.passes, row.tokens) == (2.0, 0.5, 3, 400)
    assert (row.tera_ops, row.tera_ops_per_s, row.share_of_bare) == (3.0, 1.5, 0.5)  # (1/2 + 2/4) s of 2 s
    assert table.loc["other", ["tera_ops", "share_of_bare"]].isna().all()


def test_the_figure_stacks_the_parts_of_each_stage():
    clock = Clock(lambda: None)
    clock.work["start", "loading"], clock.work["distill", "decoding"] = Work(1.0), Work(3.0)
    clock.work["distill", "writing"] = Work(2.0)
    table = profile_table(clock, {})
    light, dark = profile_figure(table), profile_figure(table, "dark")
    assert light.layout.barmode == "stack"
    bars = {bar.name: (list(bar.y), list(bar.x)) for bar in light.data}
    assert bars == {
        "decoding": (["distill"], [3.0]),
        "loading": (["start"], [1.0]),
        "writing": (["distill"], [2.0]),
    }
    assert light.layout.template.layout.font.color != dark.layout.template.layout.font.color


def test_the_option_profiles_the_command(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from safesteer import alignment
    from safesteer.cli import app

    monkeypatch.setattr(alignment, "align", lambda model, out, recipe, **_: out)
    for options, files in (([], []), (["--profile"], ["profile.csv", "profile.html"])):
        done = CliRunner().invoke(app, ["align", "some/model", "--out", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
        assert sorted(path.name for path in tmp_path.iterdir()) == files
        assert ("Where the time goes" in done.output) == bool(files)
