"""The command line as a user meets it: exit codes, one sentence, no traceback, nothing left over."""

import subprocess
import sys
import tomllib

import pandas as pd
import pytest
from test_pipeline import SMALL, model_folder  # noqa: F401

from safesteer._errors import SafeSteerError
from safesteer.recipes import recipe


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
    assert (out / "results.json").exists()
    fails_with("Unknown suite 'huge'", "evaluate", str(model_folder), "--suite", "huge")


def test_the_preset_is_not_a_setting(model_folder, tmp_path):  # noqa: F811
    fails_with(
        "chosen with --preset", "align", str(model_folder), "--out", str(tmp_path / "r"), "--set=preset=paper"
    )
    fails_with("chosen with --seed", "align", str(model_folder), "--out", str(tmp_path / "r"), "--set=seed=3")


def test_unknown_model_and_leftovers(tmp_path):
    fails_with(
        "Cannot load the model 'no/such-model'", "align", "no/such-model", "--out", str(tmp_path / "r")
    )
    assert not (tmp_path / "r").exists()


def test_fetch_knows_the_names_and_a_gguf_file_is_looked_for(tmp_path):
    fails_with("There is nothing to fetch for 'gpt5'", "fetch", "gpt5")
    fails_with(
        f"There is no file {tmp_path}/x.gguf", "align", f"{tmp_path}/x.gguf", "--out", str(tmp_path / "r")
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


def test_settings_are_printed_and_start_a_recipe_file(tmp_path, model_folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "300")  # wide enough for every name and value to stand in one line
    done = cli("settings", "paper")
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines()]
    shown = {name: value for _, name, value, *_ in (line for line in lines if len(line) > 3 and line[1])}
    assert list(shown) == [name for name, *_ in recipe("paper").rows()]
    assert (shown["preset"], shown["tokens.min_steered_prob"], shown["distill.lr"]) == (
        "paper-qwen",
        "1e-08",
        "1e-05",
    )
    done = cli("settings", "--toml")
    assert tomllib.loads(done.stdout)["distill"]["lr"] == recipe().distill.lr == 0.0003
    path = tmp_path / "mine.toml"
    path.write_text(done.stdout.replace("lr = 0.0003", "lr = -1.0"))
    fails_with("distill.lr must be above 0", "align", str(model_folder), "--recipe", str(path))
    fails_with("Unknown preset 'fancy'", "settings", "fancy")
    fails_with("--set takes NAME=VALUE", "align", str(model_folder), "--set", "lr")


def test_help_answers_at_once_and_loads_no_torch():
    code = "import sys, safesteer, safesteer.cli; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = cli("--help")
    assert all(word in done.stdout for word in ("align", "direction", "tokens", "distill", "settings"))


def test_the_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "safesteer", "settings", "fancy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: Unknown preset 'fancy'")


def test_a_models_options_go_into_the_recipe(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from safesteer import alignment
    from safesteer.cli import app

    recipes = []
    monkeypatch.setattr(alignment, "align", lambda model, out, recipe, **_: recipes.append(recipe) or out)
    file = tmp_path / "r.toml"
    file.write_text('revision = "v1"\n')
    template = ["--template", "plain", "--template-arg", "enable_thinking=true", "--template-arg", "name=Sam"]
    source = [
        "--revision",
        "v2",
        "--trust-remote-code",
        "--quantize",
        "4bit",
        "--device-map",
        "disk",
        *template,
    ]
    for options in ([], source, ["--recipe", str(file)]):
        done = CliRunner().invoke(app, ["direction", "some/model", "--out", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
    read = [(recipe.revision, recipe.trust_remote_code) for recipe in recipes]
    assert read == [(None, False), ("v2", True), ("v1", False)]
    assert recipes[1].source == {
        "revision": "v2",
        "trust_remote_code": True,
        "template": "plain",
        "template_args": ("enable_thinking=true", "name=Sam"),
        "quantize": "4bit",
        "device_map": "disk",
    }


def test_evaluate_takes_a_revision_of_a_model_but_not_of_a_run(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from safesteer.cli import app
    from safesteer.models import loading

    def load_model(name: str, **options: object) -> None:
        raise SafeSteerError(f"{name} {options['revision']} {options['trust_remote_code']}")

    monkeypatch.setattr(loading, "load_model", load_model)
    options = ["--revision", "v2", "--trust-remote-code", "--out", str(tmp_path / "suite")]
    with pytest.raises(SafeSteerError, match="some/model v2 True"):
        CliRunner().invoke(app, ["evaluate", "some/model", *options], catch_exceptions=False)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SafeSteerError, match="run's recipe says"):
        CliRunner().invoke(app, ["evaluate", str(tmp_path), *options], catch_exceptions=False)


def test_benchmarks_of_a_base_model_take_its_template(tiny_llama, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from safesteer.cli import app
    from safesteer.evaluation import suite
    from safesteer.models.templates import render

    folder, measured = tmp_path / "base", []
    tiny_llama.model.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    monkeypatch.setattr(
        suite, "run_suite", lambda target, *_, **__: measured.append(target) or pd.DataFrame({"value": [1.0]})
    )
    done = CliRunner().invoke(app, ["evaluate", str(folder), "--template", "plain"])
    assert done.exit_code == 0, done.output
    assert render(measured[0].tokenizer, "Hi") == "User: Hi\n\nAssistant:"
    (tmp_path / "manifest.json").touch()
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--template", "plain"])
    assert "leave them out" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "RUN", "--dial", "--out", "x"], "--out counts for nothing beside --dial"),
        (["evaluate", "RUN", "--dial", "--suite", "small"], "--suite counts for nothing beside --dial"),
        (
            ["export", "RUN", "--strength", "0.5", "--seed", "3"],
            "--seed counts for nothing beside --strength",
        ),
        (["search", "RUN", "--pick", "2", "--set", "seed=1"], "beside --pick"),
        (["align", "RUN", "--recipe", "r.toml", "--preset", "two-sided"], "leave out --preset"),
    ],
)
def test_an_option_that_counts_for_nothing_is_one_sentence(arguments, sentence):
    from typer.testing import CliRunner

    from safesteer.cli import app

    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, SafeSteerError)
    assert sentence in str(done.exception)
