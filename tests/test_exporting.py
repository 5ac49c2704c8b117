"""Exported folders: what lies in them, in which precision, and that loaders everywhere take them."""

import copy
import json
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from conformance.families import build
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pipeline import SMALL
from transformers import AutoModelForCausalLM, PreTrainedModel

import safesteer as ss
from conftest import batch_of, copy_of, naive_logits
from safesteer import exporting
from safesteer._errors import SafeSteerError
from safesteer.alignment import align
from safesteer.distillation.loop import Training, distill, restore_student
from safesteer.distillation.rollouts import Teacher
from safesteer.evaluation.scores import Scores, evaluate
from safesteer.evaluation.sets import COLUMNS
from safesteer.exporting import check_reload, export, reload_difference, rounding_note
from safesteer.model_card import write_card
from safesteer.models import loading
from safesteer.models.chat_model import ChatModel
from safesteer.models.loading import load_model
from safesteer.models.named import NAMED
from safesteer.models.parts import blocks
from safesteer.models.precision import cast_weights, in_precision
from safesteer.prompts.prompt_set import load_prompts
from safesteer.recipes import recipe
from safesteer.report.set_table import REPEATS
from safesteer.run_folder import STAGES, Run, finished
from safesteer.settings import DistillConfig, EvaluateConfig
from safesteer.steering.direction import Direction
from safesteer.tokens.token_set import SafetyToken, TokenSet

QUIET = Console(quiet=True)
UP_TO_EXPORT = STAGES[:4]
BFLOAT16 = torch.bfloat16


def saved(chat: ChatModel, folder, dtype: torch.dtype = torch.float32):
    """The model's folder, in a precision."""
    with in_precision(chat.model, dtype):
        chat.model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


def weights_in(folder) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's weights, as a loader finds them."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


# --- what lies in the folder ---


def test_all_weight_files_are_the_models(tiny_llama, tmp_path):
    """vLLM loads every *.safetensors that no index leaves out; others take *.bin, *.pt and *.pth too."""
    export(tiny_llama, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth"))} == {"model.safetensors"}
    assert weights_in(tmp_path / "model").keys() <= tiny_llama.model.state_dict().keys()


def test_an_export_of_several_shards_is_a_finished_stage(tiny_llama, tmp_path, monkeypatch):
    in_shards = partialmethod(PreTrainedModel.save_pretrained, max_shard_size="40KB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", in_shards)
    source = saved(tiny_llama, tmp_path / "source")
    out = align(str(source), tmp_path / "run", recipe(**SMALL), stages=STAGES[:5], console=QUIET)
    shards = {path.name for path in (out / "model").glob("*.safetensors")}
    index = json.loads((out / "model" / "model.safetensors.index.json").read_text())
    assert shards == set(index["weight_map"].values())
    assert len(shards) > 2
    assert (out / "evaluation.json").exists()  # which has reloaded the student
    run = Run(out, str(source), recipe(**SMALL), load_prompts(), lambda p, a: True, lambda p, a: True, QUIET)
    assert finished(run, "export")
    (out / "model" / sorted(shards)[1]).unlink()
    assert not finished(run, "export")


# --- precision ---


def test_a_bfloat16_base_comes_back_as_bfloat16(tiny_llama, tmp_path):
    source = saved(tiny_llama, tmp_path / "source", BFLOAT16)
    out = align(str(source), tmp_path / "run", recipe(**SMALL), stages=UP_TO_EXPORT, console=QUIET)
    weights, before = weights_in(out / "model"), weights_in(source)
    assert {w.dtype for w in weights.values()} == {BFLOAT16}
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert weights.keys() == before.keys()
    layer = Direction.load(out / "direction.safetensors").layer
    for name, weight in weights.items():
        trained = ".layers." in name and int(name.split(".")[2]) >= layer
        assert torch.equal(weight, before[name]) or trained or name == "model.norm.weight"
    assert not torch.equal(
        weights["model.layers.2.mlp.up_proj.weight"], before["model.layers.2.mlp.up_proj.weight"]
    )


def test_an_export_says_how_much_of_training_rounding_leaves(tiny_llama):
    base = copy_of(tiny_llama)
    cast_weights(base.model, BFLOAT16)
    near, far = (copy_of(base) for _ in range(2))
    for student, size in ((near, 1e-5), (far, 1e-1)):
        cast_weights(student.model, torch.float32)
        with torch.no_grad():
            for weight in student.model.parameters():
                weight += size * torch.randn(weight.shape).sign()
    note = rounding_note(base, near, BFLOAT16)
    kept, changed = 0.0, 0.0
    before = dict(base.model.named_parameters())
    for name, weight in near.model.named_parameters():
        change = weight.double() - before[name].double()
        kept += float((change * (weight.bfloat16().double() - before[name].double())).sum())
        changed += float((change**2).sum())
    assert kept / changed < 0.9
    assert note == f"{kept / changed:.0%} of what training changed is left in bfloat16: " + (
        "export.dtype=float32 keeps all"
    )
    assert rounding_note(base, near, "float32") == rounding_note(base, far, BFLOAT16) == ""
    assert rounding_note(base, base, "bfloat16") == ""
    assert recipe("paper-llama").export.dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_precision_of_an_export_can_be_chosen(tiny_llama, tmp_path, dtype):
    source = saved(tiny_llama, tmp_path / "source", BFLOAT16)
    settings = {**SMALL, "export.dtype": dtype}
    out = align(str(source), tmp_path / "run", recipe(**settings), stages=UP_TO_EXPORT, console=QUIET)
    assert {w.dtype for w in weights_in(out / "model").values()} == {getattr(torch, dtype)}


def test_exporting_in_half_precision_leaves_the_student_as_it_is(tiny_gemma2, tmp_path):
    student, before = copy_of(tiny_gemma2), tiny_gemma2.model.state_dict()
    export(student, tmp_path / "model", dtype="bfloat16")
    assert all(torch.equal(w, before[name]) for name, w in student.model.state_dict().items())
    assert student.model.config.dtype == tiny_gemma2.model.config.dtype
    for name, weight in weights_in(tmp_path / "model").items():
        assert torch.equal(weight, before[name].bfloat16())
    assert check_reload(tmp_path / "model") == 0.0


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "ernie4_5_moe", "mistral3 (multimodal)"])
def test_a_cast_model_is_the_one_that_transformers_loads(family, tmp_path, dtype):
    """Rotary frequencies and the parts that a family keeps in float32 are not rounded."""
    chat = build(family)
    saved(chat, tmp_path)
    want, batch = load_model(str(tmp_path), dtype=dtype, device="cpu"), batch_of(chat)
    with in_precision(chat.model, dtype):
        got = naive_logits(chat, batch)
        assert {n: p.dtype for n, p in chat.model.named_parameters()} == {
            n: p.dtype for n, p in want.model.named_parameters()
        }
    assert torch.equal(got, naive_logits(want, batch))


def test_a_changed_half_precision_export_is_noticed(tiny_qwen2, tmp_path):
    folder = tmp_path / "model"
    export(tiny_qwen2, folder, dtype="bfloat16")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SafeSteerError, match="differs from the trained student"):
        check_reload(folder)


def test_a_generation_config_that_cannot_be_written_is_one_sentence(tiny_llama, tmp_path):
    model = copy_of(tiny_llama)
    model.model.generation_config.update(do_sample=False, temperature=0.6)
    with pytest.raises(SafeSteerError, match="put its generation_config right"):
        ss.export(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_reload_reads_the_prompts_that_were_written(tiny_llama, tmp_path, monkeypatch):
    export(tiny_llama, tmp_path / "model")
    monkeypatch.setattr(exporting, "PROBE", ["Other words."])
    assert exporting.reload_difference(tmp_path / "model") < 1e-4


def test_a_card_comes_with_the_weights(tiny_llama, tmp_path):
    export(tiny_llama, tmp_path / "model", card="# A card")
    assert (tmp_path / "model" / "README.md").read_text() == "# A card"


def test_a_model_without_finite_logits_is_not_exported(tiny_llama, tmp_path):
    broken = copy_of(tiny_llama)
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(SafeSteerError, match="not finite"):
        export(broken, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("narrow", ["base", "student"])
def test_equal_weights_show_no_drift_at_all(tiny_llama, narrow):
    """Whatever precision each was loaded in, both are scored in one."""
    base, student = copy_of(tiny_llama), copy_of(tiny_llama)
    for chat in (base, student):  # values that both precisions hold
        chat.model.to(BFLOAT16).float()
    with in_precision((base if narrow == "base" else student).model, BFLOAT16):
        config = EvaluateConfig(n_prompts=4, max_new_tokens=6, perplexity_tokens=100)
        scores = evaluate(base, student, config=config).scores
    assert scores["student"].kl_harmless == 0.0
    assert scores["student"].perplexity == scores["base"].perplexity


# --- wrappers ---


def wrapped(name: str) -> tuple[ChatModel, Direction, TokenSet]:
    chat = build(f"{name} (multimodal)")
    vector = torch.randn(chat.d_model, generator=torch.Generator().manual_seed(3))
    tokens = tuple(SafetyToken(i, "", 1, (1,), 0.0, 0.0, 0.0) for i in range(10, 18))
    return chat, Direction(vector, 1, "-1", "given"), TokenSet(tokens, {}, {}, 1)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_wrapper_trains_resumes_and_is_exported(name, few, tmp_path):
    """All weights that the loss reads train; the vision part stays as it is, and is exported with them."""
    chat, direction, tokens = wrapped(name)
    config = DistillConfig(
        train_layers="all",
        splits=("val",),
        n_steps=2,
        harmful_per_step=2,
        harmless_per_step=1,
        max_new_tokens=3,
        lr=1e-2,
    )
    student = distill(chat, direction, tokens, few, config, training=Training(tmp_path / "run"))
    teacher = Teacher(chat, direction, tokens)
    again = restore_student(copy_of(chat), teacher, few, config, tmp_path / "run")
    before, after = chat.model.state_dict(), student.model.state_dict()
    assert all(torch.equal(w, after[n]) for n, w in again.model.state_dict().items())
    moved = {n for n, w in after.items() if not torch.equal(w, before[n])}
    assert any("language_model" in n for n in moved)
    assert not [n for n in moved if "vision" in n or "visual" in n or "projector" in n]
    with safe_open(tmp_path / "run" / "checkpoint.safetensors", "pt") as file:
        names = list(file.keys())
    assert not [n for n in names if "vision" in n or "visual" in n]
    assert {n.split(".")[0] for n in names} == {"param"}  # nothing is left to do, so no moments
    export(student, tmp_path / "model")
    assert type(load_model(str(tmp_path / "model")).model) is type(chat.model)
    assert reload_difference(tmp_path / "model") < 1e-5


def test_a_weight_that_never_got_a_gradient_resumes(tiny_llama, direction, few, tmp_path):
    """As an expert that no token reaches: it has no moments."""
    base = copy_of(tiny_llama)
    for block in blocks(base.model):
        block.register_parameter("unused", torch.nn.Parameter(torch.ones(3), requires_grad=False))
    _, _, tokens = wrapped("gemma3")
    config = DistillConfig(splits=("val",), n_steps=2, harmful_per_step=2, harmless_per_step=1)
    config = replace(config, max_new_tokens=3)
    student = distill(base, direction, tokens, few, config, training=Training(tmp_path))
    again = restore_student(copy_of(base), Teacher(base, direction, tokens), few, config, tmp_path)
    state = again.model.state_dict()
    assert all(torch.equal(w, state[n]) for n, w in student.model.state_dict().items())


# --- the card ---

SCORES = {"base": Scores(0.5, (0.4, 0.6), 0.1, (0.0, 0.2), 0.0, (0.0, 0.0), 12.5, 7)}


def card(folder, base: ChatModel, direction: Direction, **options) -> tuple[dict, str]:
    """(metadata, text) of a card."""
    write_card(folder, base, direction, "lr = 0.001\n", SCORES, **options)
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_names_only_what_is_known(tiny_llama, direction, tmp_path):
    local = replace(tiny_llama, name=str(tmp_path / "some" / "folder"))
    metadata, text = card(tmp_path, local, direction)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["safesteer", "safety", "localized-distillation"],
    }
    assert "# folder, aligned" in text
    assert str(tmp_path) not in text
    assert "lr = 0.001" in text
    assert "| base | 50.0% (40.0% to 60.0%) |" in text
    assert "wording" in text
    assert "Q4_1" not in text
    assert "$" not in text

    def my_judge(prompt: str, answer: str) -> bool:
        return True

    text = card(tmp_path, local, direction, judge=my_judge)[1]
    assert "wording" not in text
    assert "`my_judge`" in text


def test_a_card_says_what_numbers_are_of(tiny_llama, direction, tmp_path):
    scores = {"base": replace(SCORES["base"], n_harmless=3)}
    write_card(tmp_path, tiny_llama, direction, "", scores)
    assert "answers to 7 harmful and 3 harmless prompts" in (tmp_path / "README.md").read_text()
    text = card(tmp_path, tiny_llama, direction)[1]
    assert "answers to 7 harmful and 7 harmless prompts" in text
    assert "thinking" not in text
    thinker = replace(copy_of(tiny_llama), tokenizer=copy.deepcopy(tiny_llama.tokenizer))
    thinker.tokenizer.chat_template += (
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    assert "without thinking" in card(tmp_path, thinker, direction)[1]


def test_answers_end_elsewhere_where_they_end_here(tiny_llama, tmp_path):
    """A base model that was given a template: its turns end with a token that nobody else would know."""
    chat = copy_of(tiny_llama)
    chat.model.generation_config.eos_token_id = 5
    ends = chat.eos_ids
    assert len(ends) > 1
    export(chat, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.generation_config.eos_token_id == ends
    assert load_model(str(tmp_path / "model")).eos_ids == ends
    assert chat.model.generation_config.eos_token_id == 5  # the open model stays as it is


def test_the_numbers_of_a_card_are_those_of_the_evaluation(tiny_llama, direction, tmp_path):
    """Every number differs from every other, so that none can stand in another's place."""
    scores = {
        "base": Scores(0.11, (0.05, 0.22), 0.02, (0.003, 0.09), 0.0, (0.0, 0.0), 21.25, 64),
        "teacher": Scores(0.95, (0.87, 0.98), 0.41, (0.3, 0.53), 1.2344, (1.1, 1.4), 34.567, 64),
        "student": Scores(0.877, (0.77, 0.93), 0.063, (0.024, 0.15), 0.0376, (0.03, 0.05), 22.104, 64),
    }
    kinds = {"own-short": "harmful", "xstest": "over-refusal"}
    rates = {"base": (0.125, 0.05), "student": (0.75, 0.3)}
    repeats = {"base": (0.01, 0.02), "student": (0.07, 0.08)}
    sets = []
    for i, (name, kind) in enumerate(kinds.items()):
        for model in rates:
            sets.append((model, kind, name, "refused", rates[model][i], 0.0, 1.0, 40 + i))
            sets.append((model, "text quality", name, REPEATS, repeats[model][i], 0.0, 1.0, 40 + i))
    table = pd.DataFrame(sets, columns=COLUMNS)
    write_card(tmp_path, tiny_llama, direction, "", scores, table)
    lines = (tmp_path / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and "%" in line]
    assert rows == [
        "| base | 11.0% (5.0% to 22.0%) | 2.0% (0.3% to 9.0%) | 0.000 | 21.25 |",
        "| teacher | 95.0% (87.0% to 98.0%) | 41.0% (30.0% to 53.0%) | 1.234 | 34.57 |",
        "| student | 87.7% (77.0% to 93.0%) | 6.3% (2.4% to 15.0%) | 0.038 | 22.10 |",
        "| own-short | harmful | 40 | 12.5% | 75.0% | 1.0%, 7.0% |",
        "| xstest | over-refusal | 41 | 5.0% | 30.0% | 2.0%, 8.0% |",
    ]
    header = "| model | harmful: refused | harmless: refused | KL to base (nats/token) | perplexity |"
    assert lines[lines.index(rows[0]) - 2] == header
    assert any("64 harmful and 64 harmless prompts of the test split" in line for line in lines)


def test_a_card_has_base_and_licence_of_the_base(tiny_llama, direction, tmp_path, monkeypatch):
    metadata, text = card(tmp_path, replace(tiny_llama, name="smollm2-135m"), direction)
    assert "4-bit weights, Q4_1" in text
    assert metadata["base_model"] == NAMED["smollm2-135m"].base_model
    assert metadata["license"] == "apache-2.0"
    metadata, text = card(tmp_path, replace(tiny_llama, name="qwen2.5-coder-0.5b"), direction)
    assert "4-bit weights, Q4_K_M" in text
    assert (metadata["base_model"], metadata["license"]) == ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "apache-2.0")
    assert "weights of a GGUF file" in card(tmp_path, replace(tiny_llama, name="a/b.gguf"), direction)[1]

    base = replace(copy_of(tiny_llama), name="qwen2.5-coder-0.5b")
    base.model.config._commit_hash = "abc"  # the Hub's own weights are not rounded
    assert "4-bit" not in card(tmp_path, base, direction)[1]
    base = replace(copy_of(tiny_llama), name="some/model")
    base.model.config._commit_hash = "abc"  # transformers sets it where a model came from the Hub
    theirs = tmp_path / "theirs.md"
    theirs.write_text("---\nlicense: other\nlicense_name: tongyi\nlicense_link: https://x.y\n---\n# Hello\n")
    asked = []

    def download(repo: str, name: str, *, revision: str) -> str:
        asked.append((repo, name, revision))
        return str(theirs)

    monkeypatch.setattr("safesteer.model_card.hf_hub_download", download)
    metadata, text = card(tmp_path, base, direction)
    assert asked == [("some/model", "README.md", "abc")]
    assert metadata["base_model"] == "some/model"
    assert (metadata["license"], metadata["license_name"]) == ("other", "tongyi")
    assert "# some/model, aligned" in text

    def no_network(*args, **options):
        raise OSError("no network")

    theirs.write_text("---\nlicense: other: see LICENSE\n---\n# Hello\n")  # no YAML
    assert "license" not in card(tmp_path, base, direction)[0]
    monkeypatch.setattr("safesteer.model_card.hf_hub_download", no_network)
    metadata, _ = card(tmp_path, base, direction)
    assert metadata["base_model"] == "some/model"
    assert "license" not in metadata


# --- models of a revision, and models that bring code ---

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TimidConfig(LlamaConfig):
    model_type = "timid"

class TimidForCausalLM(LlamaForCausalLM):
    config_class = TimidConfig
"""


@pytest.fixture
def with_code(tiny_llama, tmp_path):
    """A folder whose model is a class of its own."""
    folder = saved(tiny_llama, tmp_path / "timid")
    (folder / "timid.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "timid.TimidConfig", "AutoModelForCausalLM": "timid.TimidForCausalLM"}
    config |= {"model_type": "timid", "auto_map": names, "architectures": ["TimidForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_with_code_is_loaded_and_exported_where_it_is_trusted(with_code, tmp_path, tiny_llama):
    with pytest.raises(SafeSteerError, match="trust_remote_code=True"):
        align(str(with_code), tmp_path / "run", recipe(**SMALL), console=QUIET)
    trusting = recipe(**SMALL, trust_remote_code=True)
    run = Run(tmp_path, str(with_code), trusting, load_prompts(), lambda p, a: True, lambda p, a: True, QUIET)
    base = run.load_base(dtype="auto", device="cpu")
    assert type(base.model).__name__ == "TimidForCausalLM"
    export(base, tmp_path / "model")
    with pytest.raises(SafeSteerError, match=r"does not load: .*trust_remote_code=True"):
        check_reload(tmp_path / "model")
    assert check_reload(tmp_path / "model", trust_remote_code=True) == 0.0
    batch = batch_of(tiny_llama)
    assert torch.equal(naive_logits(run.load_student(), batch), naive_logits(tiny_llama, batch))


def test_the_revision_reaches_the_hub(tiny_llama, tmp_path, monkeypatch):
    source, asked = saved(tiny_llama, tmp_path / "source"), []

    def recorded(real):
        def from_pretrained(name, **options):
            asked.append(options.pop("revision"))
            return real.from_pretrained(name, **options)

        return SimpleNamespace(from_pretrained=from_pretrained)

    for kind in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(loading, kind, recorded(getattr(loading, kind)))
    settings = {**SMALL, "revision": "v2"}
    align(str(source), tmp_path / "run", recipe(**settings), stages=STAGES[:1], console=QUIET)
    assert asked == ["v2"] * 3
