"""The command line as a user meets it: exit codes, one sentence, no traceback, nothing left over."""

import subprocess
import sys

import pytest
from test_pipeline import SMALL, model_folder  # noqa: F401

from safesteer._errors import SafeSteerError
from safesteer.recipes import paper, quick, recipe


def cli(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "safesteer.cli", *args], capture_output=True, text=True, timeout=300
    )


def fails_with(sentence: str, *args: str) -> None:
    done = cli(*args)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert sentence in " ".join(done.stderr.split())


def test_align_and_report_from_the_shell(model_folder, tmp_path):  # noqa: F811
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    out = tmp_path / "run"
    done = cli("align", str(model_folder), "--out", str(out), *settings)
    assert done.returncode == 0, done.stderr
    assert (out / "model" / "model.safetensors").exists()
    (out / "report.html").unlink()
    done = cli("report", str(out))
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").exists()


def test_evaluate_a_model_from_the_shell(model_folder, tmp_path):  # noqa: F811
    out = tmp_path / "suite"
    done = cli("evaluate", str(model_folder), "--suite", "quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "own-harmful" in done.stdout
    assert (out / "evaluation.json").exists()
    fails_with("Unknown suite 'huge'", "evaluate", str(model_folder), "--suite", "huge")


def test_the_preset_is_not_a_setting(model_folder, tmp_path):  # noqa: F811
    fails_with(
        "chosen with --preset", "align", str(model_folder), "--out", str(tmp_path / "r"), "--set=preset=paper"
    )


def test_unknown_model_and_leftovers(tmp_path):
    fails_with(
        "Cannot load the model 'no/such-model'", "align", "no/such-model", "--out", str(tmp_path / "r")
    )
    assert not (tmp_path / "r").exists()


def test_prompt_file_errors(tmp_path, model_folder):  # noqa: F811
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    out = str(tmp_path / "r")
    fails_with("0 harmful and 0 harmless", "align", str(model_folder), "--out", out, "--prompts", str(empty))
    empty.write_text('{"harmful": "a"}\n')
    fails_with("line 1 needs the keys", "align", str(model_folder), "--out", out, "--prompts", str(empty))
    fails_with(
        "Cannot read the prompt file", "align", str(model_folder), "--out", out, "--prompts", "nowhere"
    )
    assert not (tmp_path / "r").exists()


def test_tokenizer_without_chat_template(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    tiny_llama.model.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    fails_with("has no chat template", "align", str(folder), "--out", str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_report_needs_a_run(tmp_path):
    fails_with("is not a run folder", "report", str(tmp_path))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("distill.lr=fast", "must be a number"),
        ("distill.divergence=sideways", "must be one of"),
        ("distill.n_steps=0", "must be at least 1"),
        ("oven.heat=3", "there is no stage 'oven'"),
        ("tokens.size=3", "Unknown setting 'tokens.size'"),
        ("tokens.k=-5", "must be at least 1"),
        ("extraction=magic", "must be one of"),
        ("pairs=some", "must be one of"),
        ("seed=x", "must be a number"),
    ],
)
def test_bad_settings_are_one_sentence(setting, sentence):
    key, _, value = setting.partition("=")
    with pytest.raises(SafeSteerError, match=sentence):
        recipe("quick", **{key: value})


def test_presets():
    published = paper().distill
    assert (published.divergence, published.normalizer, published.harmless_per_step) == (
        "reverse",
        "partial",
        0,
    )
    assert (published.rollouts, published.decay, paper().pairs) == ("student", 1.0, "distil")
    # 100 harmful prompts x 8 rollouts in optimizer steps of 32 sequences, one epoch.
    assert published.n_steps * published.harmful_per_step == 100
    assert published.harmful_per_step * published.n_rollouts == 32
    assert recipe("paper", seed=7).distill.seed == 7
    assert quick(3).tokens.seed == 3
    with pytest.raises(SafeSteerError, match="Unknown preset"):
        recipe("fancy")
