"""Ablation scripts: every arm is a valid recipe that changes what it names, and a script runs to its csv."""

import argparse
import importlib
import runpy
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_pipeline import model_folder  # noqa: F401

import safesteer as ss
from conftest import PACKAGE
from safesteer.distillation.state import prepare_student
from safesteer.evaluation.ledger import looks
from safesteer.models.templates import render
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.recipes import SECTIONS, recipe
from safesteer.tokens.token_set import SafetyToken, TokenSet

ANALYSIS = PACKAGE.parent / "analysis"
STUDIES = [p.stem for p in sorted(ANALYSIS.glob("*.py")) if "\nARMS = " in p.read_text()]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ANALYSIS))


def flat(values: dict, prefix: str = "") -> dict:
    rows = {}
    for key, value in values.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("preset", ["quick", "paper-qwen"])
def test_every_arm_changes_what_it_names_and_nothing_else(name, preset):
    study = importlib.import_module(name)
    default = flat(asdict(recipe(preset)))
    for arm in study.ARMS.values():
        settings = {k: v for k, v in arm.items() if k != "n_harmful"}
        changed = flat(asdict(recipe(preset, **settings)))
        assert {k: v for k, v in changed.items() if v != default[k]}.items() <= settings.items()
    assert len({str(sorted(arm.items())) for arm in study.ARMS.values()}) == len(study.ARMS)
    assert "Refuted" in study.__doc__ or "refuted" in study.__doc__


def test_the_makefile_runs_every_study():
    listed = (PACKAGE.parent / "Makefile").read_text()
    assert len(STUDIES) == 10
    assert all(name in listed for name in STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_to_its_csv_and_continues(name, model_folder, tmp_path, monkeypatch):  # noqa: F811
    small = ["direction.extraction=prefill", "direction.coeff=1.0", "tokens.min_steered_prob=0"]
    changes = [word for change in small for word in ("--set", change)]
    command = [name, "--model", str(model_folder), "--quick", *changes, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    script = str(ANALYSIS / f"{name}.py")
    defined = runpy.run_path(script, run_name="__main__")
    arms, untrained = defined["ARMS"], list(defined.get("UNTRAINED", ["base"]))
    table = pd.read_csv(tmp_path / f"{name}-quick.csv")
    measured = any(p.parent.name == "scored" for p in (tmp_path / "rows").rglob("*.json"))
    assert table.arm.tolist() == untrained * measured + list(arms)
    assert (tmp_path / f"{name}-quick.html").exists()
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*.json")}
    assert sum(p.parent.name in ("scored", "shifts", "coverage") for p in parts) == len(arms)
    runpy.run_path(script, run_name="__main__")
    assert {p: p.stat().st_mtime_ns for p in parts} == parts


def test_studies_share_what_they_have_in_common():
    ablation = importlib.import_module("ablation")
    study = ablation.Study("one", Path("out"), "some/model", "paper-qwen", 3, False, {}, Console())
    size, support = (
        importlib.import_module("selection_size").ARMS,
        importlib.import_module("table4_support").ARMS,
    )

    def keys(arm: dict, seed: int = 0) -> list[str]:
        recipe = study.recipe(arm, seed)
        return [study.key(recipe, *stages) for stages in ((), ("tokens",), tuple(SECTIONS))]

    default = keys({})
    assert keys(size["K = 50"]) == keys(support["safety, reverse"]) == default
    assert keys(size["whole vocabulary"]) == keys(support["full, reverse"])
    assert [a == b for a, b in zip(keys(support["full, forward"]), default, strict=True)] == [
        True,
        True,
        False,
    ]
    assert [a == b for a, b in zip(keys(size["K = 10"]), default, strict=True)] == [True, False, False]
    assert not set(keys({}, 1)) & set(default)
    assert all(key.startswith("model-") for key in default)


def test_the_table_of_a_study():
    ablation = importlib.import_module("ablation")
    rows = {
        "arm": ["a", "b", "a"],
        "harmful": [0.8, 1.0, 0.6],
        "harmless": [0.0, 0.1, 0.0],
        "n": 100,
        "kl_harmless": [0.5, None, 0.25],
    }
    titles, _, first, second = ablation.summary(pd.DataFrame(rows), "arm", {"kl_harmless": 2}).splitlines()
    assert titles == "| arm | seeds | harmful refused | harmless refused | KL to base, harmless |"
    assert first == "| a | 2 | 70% (60% to 78%; 60% to 80%) | 0% (0% to 4%; 0% to 0%) | 0.38 (0.25 to 0.50) |"
    assert second == "| b | 1 | 100% (96% to 100%) | 10% (6% to 17%) |  |"


def test_results_of_two_models_never_meet():
    ablation = importlib.import_module("ablation")
    words = ([], ["--model", "qwen2.5-coder-0.5b"], ["--model", "some/model"], ["--out", "here"])
    options = [ablation.command_line("").parse_args(line) for line in words]
    folders = [ablation.study_of("one", line).folder for line in options]
    results = ANALYSIS / "results"
    named = [results / name / "one" for name in ("smollm2-135m", "qwen2.5-coder-0.5b", "model")]
    assert folders == [*named, Path("here/one")]


def test_the_update_that_is_compared_is_adams():
    study = importlib.import_module("which_tokens")
    weight = torch.nn.Parameter(torch.zeros(40))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0)
    by_hand, generator = study.AdamOf(1e-5), torch.Generator().manual_seed(0)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(40, generator=generator) * 1e-4
        update = by_hand.update(study.sampled([weight]))
        optimizer.step()
        torch.testing.assert_close(-update, (weight.detach() - before)[:: study.EVERY])


def test_the_arms_of_the_control_have_names_of_their_own_that_its_tables_read(tmp_path, monkeypatch):
    study, tables = importlib.import_module("which_tokens"), importlib.import_module("control_tables")
    arms = set(study.arms())
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        pd.DataFrame({"step": [1]}).to_csv(tmp_path / f"{arm.name}.steps.csv")
        assert study.settings_of(arm).lr == arm.lr
    monkeypatch.setattr(tables, "ROWS", tmp_path)
    read = tables.runs("steps")
    assert set(read.tokens) == set(tables.TOKENS)
    assert set(read.optimizer) == set(tables.OPTIMIZERS)
    assert len(read) == len(arms)


def test_a_seed_draws_the_pairs_of_direction_and_tokens_alone():
    study, whole = importlib.import_module("held_out"), load_prompts("mixed")
    drawn = [study.drawn_prompts(seed, "mixed") for seed in (0, 0, 1)]
    assert drawn[0].hash == drawn[1].hash != drawn[2].hash
    for prompts in drawn:
        kept = {p.text for p in prompts.prompts}
        left_out = [p for p in whole.prompts if p.text not in kept]
        assert {p.split for p in left_out} == {"train", "val"}
        assert all(p.text not in kept for p in whole.prompts if p.pair in {q.pair for q in left_out})
        assert 5 * len(left_out) == pytest.approx(2 * (128 + 32), abs=5)


def test_the_table_of_test_prompts_is_that_of_what_was_measured(model_folder, tmp_path, monkeypatch):  # noqa: F811
    """Gated bases and students stand beside the base, and a second call measures nothing again."""
    study, tables = importlib.import_module("held_out"), importlib.import_module("held_out_tables")
    small = {"SETS": ("own-short", "own-harmless"), "TASKS": {}, "N_PROMPTS": 3, "MAX_NEW_TOKENS": 2}
    small |= {"LEDGER": tmp_path / "looks.csv", "wikitext": lambda _: "The tide comes in. " * 30}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    chat, out = ss.load_model(str(model_folder)), tmp_path / "held_out"
    out.mkdir()
    sets = {name: study.unseen_prompts(name, tmp_path, 0) for name in study.SETS}
    for _ in range(2):
        args = argparse.Namespace(data=tmp_path, out=out)
        study.measure(study.Measured("base", chat, nullcontext()), torch.tensor([5]), sets, args)
    assert len(looks(tmp_path / "looks.csv")) == 4  # answers and margins of two sets
    assert len(pd.read_csv(out / "base--margins.csv")) == 6
    base = pd.read_csv(out / "base--own-short.csv")
    assert base.columns.tolist()[:3] == ["model", "set", "row"]
    assert len(base) == 3
    assert (out / "base--wikitext2.csv").exists()
    for name in ("own-short", "own-harmless"):
        rows = pd.read_csv(out / f"base--{name}.csv").assign(declines=[0, 0, 0], code=None)
        rows.to_csv(out / f"base--{name}.csv", index=False)
        for model, verdicts in {"gated-0": [1, 0, 0], "student-0": [1, 1, 0], "student-1": [1, 1, 1]}.items():
            rows.assign(model=model, declines=verdicts).to_csv(out / f"{model}--{name}.csv", index=False)
    monkeypatch.setattr(tables, "ROWS", out)
    part = tables.rows_of(("own-short", "own-harmless"))
    title, n, before, gated, after, change = tables.line("both", part)
    assert (title, n, before, gated) == ("both", "6", "0 %", "33 %")
    assert after == "83 % (67 to 100)"
    assert change.startswith("+83 (+")


def test_a_later_look_shares_no_prompt_with_an_earlier_one():
    study = importlib.import_module("held_out")
    first, later = (study.unseen_prompts("own-short", None, seen) for seen in (0, 50))
    assert len(first) == len(later) == 50
    assert not set(first) & set(later)
    assert study.unseen_prompts("own-short", None, 149) == study.set_prompts("own-short")[149:]


def test_supervised_losses_are_what_they_say(tiny_llama):
    """Against transformers' own logits, prompt by prompt."""
    study = importlib.import_module("methods")
    prompts = ["Hello there", "Name a river."]
    answers = {p: tiny_llama.encode(a) for p, a in zip(prompts, ["yes of course", "a"], strict=True)}
    others = {p: tiny_llama.encode("something else") for p in prompts}
    student, opens = tiny_llama.copy(), torch.tensor([5, 7])
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    loss = study.Supervised(tiny_llama, study.Targets(answers, others, others), opens)

    def logps(chat, prompt, ids):
        whole = torch.tensor([[*chat.encode(render(chat.tokenizer, prompt)), *ids]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = chat.model.model(whole).last_hidden_state
        return chat.model.lm_head(hidden.float())[0, -len(ids) - 1 : -1].log_softmax(-1)

    def taken(chat, prompt, ids):
        return logps(chat, prompt, ids).gather(-1, torch.tensor(ids)[:, None])[:, 0]

    want = sum(-taken(student, p, answers[p]).mean() for p in prompts)
    assert float(loss.nll(student, prompts, True)) == pytest.approx(float(want), rel=2e-2)

    weights = torch.tensor([0.7**i for i in range(8)])

    def weighed(p):
        w = weights[: len(answers[p])]
        return -(w * taken(student, p, answers[p])[:8]).sum() / w.sum()

    want = sum(weighed(p) for p in prompts)
    assert float(loss.early_nll(student, prompts, True)) == pytest.approx(float(want), rel=2e-2)

    def gap(chat, p):
        return taken(chat, p, answers[p]).sum() - taken(chat, p, others[p]).sum()

    want = sum(-torch.nn.functional.logsigmoid(0.1 * (gap(student, p) - gap(tiny_llama, p))) for p in prompts)
    assert float(loss.dpo(student, prompts, True)) == pytest.approx(float(want), rel=2e-2)
    same = study.Supervised(student, study.Targets(answers, others, others), opens)
    margins = []
    for p in prompts:
        first = logps(student, p, others[p])[0]
        margins.append(first[opens].max() - first.index_fill(0, opens, -torch.inf).max())
    want = sum(study.MARGIN_WEIGHT * torch.nn.functional.softplus(m) for m in margins)
    assert float(same.kl_and_margin(student, prompts, False)) == pytest.approx(float(want), rel=5e-2)


def test_preferences_know_which_harmful_prompts_the_base_refuses_by_itself(
    tiny_llama, direction, few, monkeypatch
):
    study, (refused, *_) = importlib.import_module("methods"), few.harmful
    monkeypatch.setattr(study, "N_TOKENS", 64)

    def answered(chat, texts, **_):
        steered = bool(chat.model.model.layers[1]._forward_pre_hooks)
        return ["I'm sorry, but I can't." if steered or t == refused else "Sure, here it is." for t in texts]

    monkeypatch.setattr(ss, "generate", answered)
    targets = study.targets_of(tiny_llama, direction, few)
    assert set(targets.refusals) == set(few.harmful)
    assert targets.by_itself == {refused}
    assert set(targets.steered) == set(few.harmless)


def test_a_null_space_holds_nothing_that_prompts_write(tiny_llama):
    study, student = importlib.import_module("methods"), tiny_llama.copy()
    prompts = ["Hello there", "Name a river.", "How do I bake bread?"]
    spaces = study.null_spaces(tiny_llama, prompts)
    for space in spaces.values():  # something is used, and something is left
        assert 0.5 < float(space.trace()) < tiny_llama.d_model - 0.5
    first = student.model.requires_grad_(True).model.layers[1].self_attn.q_proj
    seen = []
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    study.answer_logits(student, prompts, [[1]] * 3)
    handle.remove()
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=0.1, weight_decay=0.0)
    before, generator = first.weight.detach().clone(), torch.Generator().manual_seed(0)
    for _ in range(2):  # Adam scales each coordinate by itself: a gradient in the space is not enough
        for p in student.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        study.step_inside(optimizer, study.spaces_of(student, spaces))
    changed = first.weight.detach() - before
    moved = torch.cat(seen).float() @ changed.T
    free = torch.cat(seen).float() @ (0.1 * torch.randn(changed.shape, generator=generator).sign()).T
    assert changed.norm() > 0.1
    assert moved.norm() < 0.2 * free.norm()


def test_a_method_trains_only_what_has_a_space(tiny_llama, direction, few):
    study, student = importlib.import_module("methods"), tiny_llama.copy()
    config = replace(study.OURS, n_steps=2, harmful_per_step=2, harmless_per_step=1)
    state = prepare_student(student, direction, replace(config, train_layers="all"))
    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    answers = {p: tiny_llama.encode("yes of course") for p in (*few.harmful, *few.harmless)}
    loss = study.Supervised(tiny_llama, study.Targets(answers, answers, answers), torch.tensor([5]))
    spaces = study.null_spaces(tiny_llama, few.harmless)
    list(study.supervised_steps(state, loss.nll, few, set(answers), spaces))
    changed = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    inside = {f"model.layers.{key}.weight" for key in spaces}
    assert changed
    assert changed <= inside


@pytest.mark.parametrize("task", ["units", "formal"])
def test_the_tasks_of_fine_tuning_are_drawn_by_a_rule(task):
    study = importlib.import_module("fine_tuning")
    rows = study.TASKS[task]()
    assert len(dict(rows)) == len(rows) > study.N_TRAIN + study.N_HELD_OUT
    train, others = study.drawn_rows(task, 0)
    assert (len(train), len(others)) == (study.N_TRAIN, study.N_HELD_OUT)
    assert not set(train) & set(others)
    assert study.drawn_rows(task, 0) == (train, others) != study.drawn_rows(task, 1)
    assert not any(ss.refuses(*row) or ss.declines(*row) for row in rows)


@pytest.mark.parametrize("options", [[], ["--lora-rank", "2"]], ids=["weights", "adapter"])
def test_fine_tuning_runs_to_its_rows_and_continues(options, model_folder, tmp_path, monkeypatch):  # noqa: F811
    if options:
        pytest.importorskip("peft", reason="peft is not installed")
    study = importlib.import_module("fine_tuning")
    small = {"N_STEPS": 4, "EVERY": 2, "N_TRAIN": 8, "N_HELD_OUT": 3, "BATCH": 4, "ANSWER_TOKENS": 3}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    parts = (load_prompts().split(name).first(4).prompts for name in ("train", "val"))
    few = PromptSet(tuple(prompt for part in parts for prompt in part))
    monkeypatch.setattr(ss, "load_prompts", lambda *_: few)
    monkeypatch.setattr("safesteer.distillation.seal.load_prompts", lambda: few)
    TokenSet(tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in (60, 70)), {}, {}, 1).save(
        tmp_path / "s.json"
    )
    command = ["--model", str(model_folder), "--tokens", str(tmp_path / "s.json"), "--out", str(tmp_path)]
    arms = ["--arms", "unsealed", "sealed", "--tasks", "units", "--lr", "0.01"]
    monkeypatch.setattr(sys, "argv", ["fine_tuning", *command, *arms, *options])
    study.main()
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("units--*.csv")}
    assert len(files) == 4
    for arm in ("unsealed", "sealed"):
        (path,) = (p for p in files if p.name.startswith(f"units--{arm}") and "rows" in p.name)
        rows = pd.read_csv(path)
        assert set(rows.step) == {0, 2, 4}
        assert rows[rows.set == "task"].groupby("step").right.count().eq(3).all()
        assert rows[rows.set == "harmful"].groupby("step").refused.count().nunique() == 1
        steps = pd.read_csv(str(path).replace("rows", "steps"), index_col="step")
        assert steps.task_loss[4] < steps.task_loss[0]
        assert steps.seal_divergence[4] > 0
    study.main()
    assert {p: p.stat().st_mtime_ns for p in files} == files
