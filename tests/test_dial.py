"""Weights between base and student: exact at both ends, back as they were, measured, drawn, exported."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conformance.families import build
from test_pipeline import QUIET, SMALL, model_folder  # noqa: F401

import safesteer as ss
from conftest import assert_near, batch_of, copy_of, naive_logits
from safesteer._errors import SafeSteerError
from safesteer._files import locked
from safesteer.alignment import align
from safesteer.distillation.loop import train_student
from safesteer.distillation.rollouts import Teacher
from safesteer.evaluation import dial
from safesteer.evaluation.dial import dial_run, measure_strengths
from safesteer.evaluation.ledger import looks
from safesteer.exporting import export_strength
from safesteer.models.adapter import without_adapter
from safesteer.models.drift import kl_on_answers
from safesteer.models.generation import greedy_ids
from safesteer.models.hashing import weights_hash
from safesteer.models.loading import load_model
from safesteer.models.mixing import between
from safesteer.models.precision import cast_weights
from safesteer.prompts.prompt_set import load_prompts
from safesteer.recipes import recipe
from safesteer.report.dial_figure import strengths_figure

SHORT = ss.EvaluateConfig(max_new_tokens=3)


@pytest.fixture
def student(tiny_llama):
    """The base with one block moved."""
    moved = copy_of(tiny_llama)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in moved.model.model.layers[1].parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return moved


def weights(chat) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in chat.model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


# --- the line ---


def test_the_ends_are_the_base_and_the_student_exactly(tiny_llama, student):
    at_base, at_student = weights(tiny_llama), weights(student)
    with between(tiny_llama, student, 0.0) as chat:
        assert same(weights(chat), at_base)
    with between(tiny_llama, student, 1.0) as chat:
        assert same(weights(chat), at_student)


@pytest.mark.parametrize("strength", [-0.5, 0.3, 0.7, 1.5])
def test_every_weight_lies_on_the_line(tiny_llama, student, strength):
    at_base, at_student = weights(tiny_llama), weights(student)
    with between(tiny_llama, student, strength) as chat:
        for name, p in weights(chat).items():
            assert_near(
                p, at_base[name].double() + strength * (at_student[name] - at_base[name]).double(), 1e-6
            )


def test_the_student_is_itself_again_in_the_same_tensors(tiny_llama, student):
    before, kept = weights(student), {n: p.data_ptr() for n, p in student.model.named_parameters()}
    untouched = weights(tiny_llama)
    with pytest.raises(KeyError), between(tiny_llama, student, 0.5):
        raise KeyError
    assert same(weights(student), before)
    assert {n: p.data_ptr() for n, p in student.model.named_parameters()} == kept
    assert same(weights(tiny_llama), untouched)


def test_only_weights_that_differ_are_made_anew(tiny_llama, student):
    kept = {n: p.data_ptr() for n, p in student.model.named_parameters()}
    with between(tiny_llama, student, 0.5):
        now = {n: p.data_ptr() for n, p in student.model.named_parameters()}
    assert {n for n in kept if kept[n] != now[n]} == {n for n in kept if ".layers.1." in n}


def test_half_precision_mixes_in_float32_and_keeps_its_precision(tiny_llama, student):
    base, narrow = copy_of(tiny_llama), copy_of(student)
    cast_weights(narrow.model, torch.bfloat16)
    start = weights(base)
    with between(base, narrow, 0.0) as chat:
        assert all(torch.equal(p, start[n].to(torch.bfloat16)) for n, p in weights(chat).items())


def test_an_adapter_is_scaled(tiny_llama, direction, few):
    """At every strength the logits are those of the merged student on the line."""
    pytest.importorskip("peft")
    base = copy_of(tiny_llama)
    tokens = ss.select_tokens(base, direction, few.harmless[:2], ss.TokenConfig(k=8, n_samples=1))
    small = {"n_steps": 3, "harmful_per_step": 2, "harmless_per_step": 2, "max_new_tokens": 3}
    config = ss.DistillConfig(**small, lora_rank=2, lr=0.02, warmup=0, watch_every=0)
    teacher, prompts = Teacher(base, direction, tokens), load_prompts()
    state, _ = train_student(teacher, prompts, config, None)
    merged = ss.distill(tiny_llama, direction, tokens, prompts, config)
    batch = batch_of(tiny_llama)
    plain = naive_logits(tiny_llama, batch)
    for strength in (0.0, 0.6, 1.0):
        with between(base, state.student, strength) as chat:
            scaled = naive_logits(chat, batch)
        with between(tiny_llama, merged, strength) as chat:
            assert_near(scaled, naive_logits(chat, batch), 1e-3)
        if strength == 0.0:
            assert torch.equal(scaled, plain)
    assert not torch.equal(naive_logits(state.student, batch), plain)
    val = prompts.split("val").first(2)
    tables = [
        measure_strengths(b, s, val, (0.0, 0.5), SHORT)
        for b, s in ((base, state.student), (tiny_llama, merged))
    ]
    assert_near(tables[0].kl.to_numpy(), tables[1].kl.to_numpy(), 1e-3)
    assert tables[0].kl[1] > 0
    without_adapter(state.student)


def test_what_has_no_line_is_refused(tiny_llama, student, bridges):
    for strength in (float("nan"), float("inf")):
        with pytest.raises(SafeSteerError, match="must be a number"), between(tiny_llama, student, strength):
            pass
    with pytest.raises(SafeSteerError, match="is not a student of"), between(build("gpt2"), student, 0.5):
        pass
    with pytest.raises(SafeSteerError, match="has no line"), between(bridges["tiny-llama"], student, 0.5):
        pass


# --- the curve ---


def test_the_curve_starts_at_the_base_and_passes_the_student(tiny_llama, student):
    prompts = load_prompts().split("val").first(4)

    def odd(prompt, answer):
        return len(answer) % 2 == 1

    shares = []
    table = measure_strengths(
        tiny_llama, student, prompts, (0.0, 0.5, 1.0), SHORT, judge=odd, progress=shares.append
    ).set_index("strength")
    assert (table.kl[0.0], table.n[0.0]) == (0.0, 4)
    assert 0 < table.kl[0.5] < table.kl[1.0]
    for strength, chat in ((0.0, tiny_llama), (1.0, student)):
        for column, texts in (("harmful", prompts.harmful), ("over_refusal", prompts.harmless)):
            answers = ss.generate(chat, texts, max_new_tokens=3)
            assert table[column][strength] == sum(odd("", a) for a in answers) / 4
    along = greedy_ids(tiny_llama, prompts.harmless, SHORT.n_kl_tokens)
    kls = kl_on_answers(tiny_llama, student, prompts.harmless, along)
    assert table.kl[1.0] == pytest.approx(sum(kls) / 4, rel=1e-4)
    assert (table.harmful_low <= table.harmful).all()
    assert (table.kl <= table.kl_high).all()
    assert shares == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]


def test_the_figure_has_refusals_and_drift():
    rows = {"strength": [1.0, 0.0], "counts": "refused", "n": 4}
    for name in ("harmful", "over_refusal", "kl"):
        rows |= {name: [0.5, 0.1], f"{name}_low": [0.4, 0.0], f"{name}_high": [0.6, 0.2]}
    figure = strengths_figure(pd.DataFrame(rows))
    assert [list(t.x) for t in figure.data] == [[0.0, 1.0]] * 3
    assert [list(t.y) for t in figure.data] == [[0.1, 0.5]] * 3
    assert [t.yaxis for t in figure.data] == [None, None, "y2"]
    assert figure.data[0].error_y.array[1] == pytest.approx(0.1)


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):  # noqa: F811
    """A run up to its evaluation."""
    out = tmp_path_factory.mktemp("dial") / "run"
    settings = SMALL | {"evaluate.sets": "", "evaluate.n_prompts": 2}
    stages = ("direction", "tokens", "distill", "export", "evaluate")
    return align(str(model_folder), out, recipe(**settings), stages=stages, console=QUIET)


@pytest.fixture
def few_pairs(monkeypatch):
    monkeypatch.setattr(dial, "dial_prompts", lambda: load_prompts("wide").split("val").first(3))


def test_a_run_gets_its_curve_strength_by_strength(finished, tmp_path, few_pairs, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    dial_run(run, (0.0, 1.0), config=SHORT, console=QUIET)
    before = (run / "dial.csv").read_text()
    real, measured = dial.measure, []
    monkeypatch.setattr(dial, "measure", lambda chat, *rest: measured.append(chat) or real(chat, *rest))
    table = dial_run(run, (0.0, 0.5, 1.0), config=SHORT, console=QUIET)
    assert len(measured) == 2  # the base, and what was missing
    assert table.strength.tolist() == [0.0, 0.5, 1.0]
    rows = (run / "dial.csv").read_text().splitlines()
    assert [rows[1], rows[3]] == before.splitlines()[1:]
    assert set(looks(run).split[looks(run).why.str.startswith("dial")]) == {"safesteer-wide/val"}
    page = (run / "report.html").read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert data["figures"]["dial"]["data"][0]["x"] == [0.0, 0.5, 1.0]
    assert "dial" not in data["missing"]
    (run / "dial.csv").write_text("strength\n0.5\n")
    with pytest.raises(SafeSteerError, match="delete it to measure again"):
        dial_run(run, (0.5,), config=SHORT, console=QUIET)
    with pytest.raises(SafeSteerError, match="is not a run folder"):
        dial_run(tmp_path, console=QUIET)


def test_no_preset_trains_on_the_pairs_of_the_dial():
    texts = set(dial.dial_prompts().harmful) | set(dial.dial_prompts().harmless)
    for name in ("pairs", "mixed", "all"):
        assert not texts & {p.text for p in load_prompts(name).prompts}


# --- the export ---


def test_the_chosen_strength_is_exported_with_its_card(finished, tmp_path, few_pairs):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    dial_run(run, (0.7,), config=SHORT, console=QUIET)
    folder = export_strength(run, 0.7)
    assert folder == run / "model-0.7"
    models = {name: load_model(str(path)) for name, path in (("student", run / "model"), ("mixed", folder))}
    base = load_model(json.loads((run / "manifest.json").read_text())["model"])
    with between(base, models["student"], 0.7) as chat:
        want = weights(chat)
    for name, p in weights(models["mixed"]).items():
        assert_near(p, want[name], 1e-6)
    card = (folder / "README.md").read_text()
    assert "strength 0.7, where 0 is the base and 1 the trained model" in card
    assert "At strength 0.7, on 3 val pairs: refused" in card
    assert card.index("## Strength") < card.index("## Measured")
    plain = (run / "model" / "README.md").read_text()
    assert "## Strength" not in plain
    assert card.replace(card[card.index("## Strength") : card.index("## Measured")], "") == plain
    with pytest.raises(SafeSteerError, match="refuse less than the base"):
        export_strength(run, -0.5)
    again = export_strength(run, 0.7)  # replaces an earlier export
    assert again == folder


def test_an_exported_strength_is_not_rounded_to_the_precision_of_the_run(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["dtype"] = "bfloat16"  # its passes; the files have float32
    (run / "manifest.json").write_text(json.dumps(manifest))
    folder = export_strength(run, 1.0)
    ours, theirs = (weights(load_model(str(path))) for path in (folder, run / "model"))
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_a_strength_of_a_run_in_float16_is_exported(finished, tmp_path):
    """float16 rounds weights so that rounded again, to bfloat16, some lie elsewhere: the hash knows."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = json.loads((run / "manifest.json").read_text())
    base = load_model(manifest["model"], dtype="float16")
    manifest["recipe"]["dtype"], before = "float16", manifest["weights"]
    manifest["weights"] = weights_hash(base.model)
    assert manifest["weights"] != before
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert (export_strength(run, 0.5) / "config.json").is_file()
    manifest["weights"] = before
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SafeSteerError, match="other weights than the base"):
        export_strength(run, 0.5)


def test_a_strength_is_not_written_while_another_command_is_at_work(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with locked(run), pytest.raises(SafeSteerError, match="Another process is at work"):
        export_strength(run, 0.5)


def test_the_dial_measures_again_with_another_length_of_drift(finished, tmp_path, few_pairs):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    short, longer = (replace(SHORT, n_kl_tokens=n) for n in (1, 6))
    dial_run(run, (1.0,), config=short, console=QUIET)
    table = dial_run(run, (0.5, 1.0), config=longer, console=QUIET)
    anew = tmp_path / "anew"
    shutil.copytree(finished, anew)
    assert table.kl.tolist() == dial_run(anew, (0.5, 1.0), config=longer, console=QUIET).kl.tolist()


def test_an_export_replaces_nothing_but_an_export(finished, tmp_path):
    for folder in (finished, finished / "model"):
        with pytest.raises(SafeSteerError, match="exists and would be replaced"):
            export_strength(finished, 0.5, folder)
    assert (finished / "manifest.json").exists()
    with pytest.raises(SafeSteerError, match="is not a run folder"):
        export_strength(tmp_path, 0.5)
    unfinished = tmp_path / "run"
    shutil.copytree(finished, unfinished)
    (unfinished / "model" / "README.md").unlink()
    with pytest.raises(SafeSteerError, match="has no model card yet"):
        export_strength(unfinished, 0.5)


def test_the_commands_measure_and_export_a_strength(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from safesteer import alignment, exporting
    from safesteer.cli import app

    calls = []
    table = pd.DataFrame({"strength": [0.5], "weights": ["a"], "prompts": ["b"], "judge": ["c"]})
    monkeypatch.setattr(dial, "dial_run", lambda run, console: calls.append(run) or table)
    monkeypatch.setattr(exporting, "export_strength", lambda *a: calls.append(a) or tmp_path)
    monkeypatch.setattr(alignment, "align", lambda model, out, recipe, **_: calls.append(out) or out)
    for command in (
        ["evaluate", "runs/demo", "--dial"],
        ["export", "runs/demo", "--strength", "0.7"],
        ["export", "some/model"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    assert [str(call) if not isinstance(call, tuple) else call for call in calls] == [
        "runs/demo",
        ("runs/demo", 0.7, None),
        "run",
    ]
