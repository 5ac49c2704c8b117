"""Other people's tools on what we write: transformers' pipeline, lm-eval, vLLM, peft, llama.cpp."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from test_exporting import saved
from test_pipeline import QUIET, SMALL
from transformers import AutoModelForCausalLM, pipeline

from conftest import PROMPTS, assert_near
from safesteer.alignment import align
from safesteer.exporting import export
from safesteer.models.generation import generate
from safesteer.models.loading import load_model
from safesteer.recipes import recipe
from safesteer.run_folder import STAGES


@pytest.fixture(params=["float32", "bfloat16"])
def folder(request, chat, tmp_path):
    """An exported folder of each tiny family, in two precisions."""
    export(chat, tmp_path / "model", dtype=request.param)
    return tmp_path / "model"


def test_a_pipeline_with_messages_gives_our_answers(folder):
    speaker = pipeline("text-generation", model=str(folder), device="cpu")
    loaded, answers = load_model(str(folder), dtype="auto", device="cpu"), set()
    for prompt in PROMPTS:  # one at a time: a batch rounds otherwise, and random weights nearly tie
        (want,) = generate(loaded, [prompt], max_new_tokens=12)
        messages = [{"role": "user", "content": prompt}]
        (reply,) = speaker(messages, max_new_tokens=12, do_sample=False)
        assert reply["generated_text"][-1]["content"].strip() == want
        answers.add(want)
    assert len(answers) > 1


TASK = """
task: short_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}]
metadata: {{version: 1}}
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `eval`)")
def test_the_harness_reads_an_export(tiny_llama, tmp_path, monkeypatch):
    """Its perplexity is exp of the mean negative log-likelihood of the targets, token by token."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    export(tiny_llama, tmp_path / "model")
    rows = [
        {"text": "How can I bake", "target": " a cake"},
        {"text": "Explain how", "target": " tides work."},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short_texts.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    got = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},dtype=auto",
        tasks=["short_texts"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        device="cpu",
        bootstrap_iters=0,
    )
    tokenizer, logps = tiny_llama.tokenizer, []
    for row in rows:
        ids = tokenizer(row["text"] + row["target"], return_tensors="pt").input_ids
        n = len(tokenizer(row["text"]).input_ids)
        at = tiny_llama.model(ids).logits.log_softmax(-1)[0, n - 1 : -1]
        logps.append(float(at.gather(1, ids[0, n:, None]).sum()))
    want = math.exp(-sum(logps) / len(logps))
    assert got["results"]["short_texts"]["perplexity,none"] == pytest.approx(want, rel=1e-4)


def test_all_that_vllm_would_load_are_weights_of_the_model(folder, chat):
    """Its loader takes every *.safetensors, or those of the index; each tensor needs a home."""
    names = {n for path in folder.glob("*.safetensors") for n in load_file(path)}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert names == json.loads(index.read_text())["weight_map"].keys()
    parameters = dict(chat.model.named_parameters()).keys()  # tied weights once
    assert names == parameters
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(chat.model).__name__]


def test_llama_cpp_knows_every_tensor_and_the_template(folder, chat):
    """What its converter asks of a folder, with its own Python package: a GGUF name per tensor."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    family = {"llama": "LLAMA", "qwen2": "QWEN2", "gemma2": "GEMMA2"}[chat.config.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family], chat.n_layers)
    tensors = {n for path in folder.glob("*.safetensors") for n in load_file(path)}
    mapped = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    assert not [name for name, other in mapped.items() if other is None]
    assert len(set(mapped.values())) == len(tensors)
    vocabulary = gguf.SpecialVocab(folder, load_merges=True)
    assert vocabulary.chat_template == chat.tokenizer.chat_template
    assert vocabulary.special_token_ids["eos"] == chat.tokenizer.eos_token_id
    assert vocabulary.merges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_puts_a_kept_adapter_on_the_base(tiny_llama, tmp_path, dtype):
    """By the base's name in the adapter's own file, and merged it is the export."""
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'safesteer[lora]')")
    source = saved(tiny_llama, tmp_path / "source", dtype)
    settings = {**SMALL, "distill.lora_rank": 4, "distill.keep_adapter": "true", "distill.lr": 1e-2}
    settings |= {"export.dtype": "float32"}
    run = align(str(source), tmp_path / "run", recipe(**settings), stages=STAGES[:4], console=QUIET)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    exported, ids = AutoModelForCausalLM.from_pretrained(run / "model"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        want, got = exported(ids).logits, adapted(ids).logits
        with adapted.disable_adapter():
            plain = adapted(ids).logits
        assert_near(got, want, 1e-5)
        assert_near(adapted.merge_and_unload()(ids).logits, want, 1e-5)
    assert (got - plain).abs().max() > 1e-3
