"""A reader of harmfulness: what it reads is what single prompts hold, and its numbers are cross-validated."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from conftest import PROMPTS, assert_near, copy_of, n_hooks
from safesteer._errors import SafeSteerError
from safesteer.directions import reader_fitting
from safesteer.directions.reader_fitting import _check, _folds, fit_reader
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.parts import blocks
from safesteer.models.templates import n_after_instruction, set_template, suffix_length
from safesteer.prompts.conversation import Conversation
from safesteer.prompts.prompt_set import Prompt, PromptSet
from safesteer.steering.hooks import apply_hooks
from safesteer.steering.interventions import add
from safesteer.steering.reader import HarmfulnessReader, pooled_resid_pre

TALK = Conversation(
    [
        {"role": "system", "content": "You are short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Name a river."},
    ]
)


def naive_pooled(chat: ChatModel, prompt: str, layer: int, pooling: str) -> torch.Tensor:
    """Of one prompt alone, by its text: no batch, no padding."""
    ids, seen = PromptBatch.of(chat.tokenizer, [prompt]).prompt_ids, {}
    with torch.no_grad(), apply_hooks(chat.model, {("resid_pre", layer): lambda h: seen.update(h=h)}):
        chat.model(ids)
    h = seen["h"][0].double()
    if pooling == "prompt":
        return h.mean(0)
    ends = [i for i, token in enumerate(ids[0].tolist()) if token == chat.tokenizer.eos_token_id]
    return h[ends[-1] - 1] if ends else h[-1]  # the last one ends the user's turn


@pytest.mark.parametrize("pooling", ["prompt", "instruction"])
@pytest.mark.parametrize("prompts", [PROMPTS, ("Hi", "Hi"), ("Hi",), (TALK, "Hi")], ids=len)
def test_pooled_residuals_are_those_of_the_single_prompts(chat_and_bridge, prompts, pooling):
    plain = chat_and_bridge[0]
    n_after = n_after_instruction(plain.tokenizer)
    tails = ["", "I cannot help", " Yes", "No no no"][: len(prompts)]
    for chat in chat_and_bridge:
        before = n_hooks(chat.model)
        for after in (None, tails):
            batch = PromptBatch.of(chat.tokenizer, prompts, after)
            got = pooled_resid_pre(chat.model, batch, [0, 2], pooling, n_after)
            want = [[naive_pooled(plain, p, layer, pooling) for layer in (0, 2)] for p in prompts]
            assert_near(got, torch.stack([torch.stack(row) for row in want]))
        assert n_hooks(chat.model) == before


def test_a_pass_ends_at_the_layer_that_is_read(tiny_llama):
    ran = []
    handles = [b.register_forward_hook(lambda *args: ran.append(1)) for b in blocks(tiny_llama.model)]
    pooled_resid_pre(tiny_llama.model, PromptBatch.of(tiny_llama.tokenizer, ["Hi"]), [1], "prompt", 0)
    for handle in handles:
        handle.remove()
    assert len(ran) == 1


def test_without_template_tokens_the_last_token_is_the_instruction(tiny_llama):
    chat = replace(tiny_llama, tokenizer=copy.deepcopy(tiny_llama.tokenizer))
    set_template(chat.tokenizer, "raw")
    assert (n_after_instruction(chat.tokenizer), suffix_length(chat.tokenizer)) == (0, 1)
    batch = PromptBatch.of(chat.tokenizer, ["Hello there"])
    got = pooled_resid_pre(chat.model, batch, [2], "instruction", 0)[0, 0]
    assert_near(got, naive_pooled(chat, "Hello there", 2, "instruction"))


@pytest.fixture(scope="module")
def twelve(pairs):
    return pairs.split("val").first(12)


@pytest.mark.parametrize("pooling", ["prompt", "instruction"])
def test_the_fit_is_scikit_learns(tiny_llama, twelve, pooling, monkeypatch):
    """Weight, bias, AUC and threshold from the features of single prompts, by a pipeline."""
    monkeypatch.setattr(reader_fitting, "C", 0.1)
    shares = {"false_alarms": 0.25, "misses": 0.17}
    reader = fit_reader(tiny_llama, twelve, pooling=pooling, **shares, n_folds=3, seed=1)
    texts = [p.text for p in twelve.prompts]
    y = np.array([p.label == "harmful" for p in twelve.prompts])
    fold, aucs, out = _folds(twelve, 3, 1), {}, {}
    for layer in range(3):
        x = torch.stack([naive_pooled(tiny_llama, t, layer, pooling) for t in texts]).numpy()
        out[layer] = np.zeros(len(x))
        for i in range(3):
            pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            pipe.fit(x[fold != i], y[fold != i])
            out[layer][fold == i] = pipe.decision_function(x[fold == i])
        aucs[layer] = roc_auc_score(y, out[layer])
    assert reader.curve.auc.tolist() == pytest.approx(list(aucs.values()), abs=0.02)
    assert reader.layer == max(aucs, key=aucs.get)
    assert reader.auc == max(reader.curve.auc)
    harmless = sorted(out[reader.layer][~y])
    assert reader.threshold == pytest.approx(harmless[12 - 1 - 3], abs=1e-3)  # a quarter of twelve above it
    assert reader.false_alarms == (0.25 if pooling == "prompt" else 0.0)  # or fewer, where scores are tied
    below = sorted(out[reader.layer][y])[2]  # two of twelve lie under it
    assert reader.clear_below == pytest.approx(min(below, reader.threshold), abs=1e-3)
    assert reader.misses == pytest.approx((out[reader.layer][y] < reader.clear_below - 1e-3).mean())
    assert reader.hits == pytest.approx((out[reader.layer][y] > reader.threshold).mean())
    x = torch.stack([naive_pooled(tiny_llama, t, reader.layer, pooling) for t in texts]).numpy()
    whole = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
    scores = reader.scores(tiny_llama, texts, batch_size=5)
    assert_near(scores, whole.decision_function(x), 1e-3)
    assert reader.is_harmful(tiny_llama, texts) == (scores > reader.threshold).tolist()


def test_pairs_stay_on_one_side(pairs):
    train = pairs.split("train")
    fold = _folds(train, 5, 0)
    assert sorted(np.bincount(fold).tolist()) == [50, 50, 52, 52, 52]
    sides = {}
    for prompt, part in zip(train.prompts, fold, strict=True):
        sides.setdefault(prompt.pair, set()).add(int(part))
    assert {len(side) for side in sides.values()} == {1}
    assert (fold != _folds(train, 5, 1)).any()


def test_prompts_without_pairs_have_parts_with_both_kinds():
    loose = PromptSet(
        tuple(
            Prompt(f"{label} {i}", label) for label, n in (("harmful", 4), ("harmless", 8)) for i in range(n)
        )
    )
    fold, harmful = _folds(loose, 4, 0), np.array([p.label == "harmful" for p in loose.prompts])
    for part in range(4):
        assert (int(harmful[fold == part].sum()), int((fold == part).sum())) == (1, 3)


@pytest.fixture(scope="module")
def reader(tiny_llama, twelve):
    return fit_reader(tiny_llama, twelve, layer=1, pooling="instruction", n_folds=3)


def test_plain_model_and_bridge_have_one_reader(bridges, tiny_llama, reader):
    pair = (tiny_llama.model, tiny_llama.tokenizer)
    want = reader.scores(tiny_llama, [*PROMPTS, TALK])
    for form in (pair, bridges["tiny-llama"], bridges["tiny-llama"].model):
        assert_near(reader.scores(form, [*PROMPTS, TALK]), want, 1e-3)
    alone = [reader.scores(tiny_llama, [p])[0] for p in (*PROMPTS, TALK)]
    assert_near(alone, want, 1e-3)
    assert reader.scores(tiny_llama, ["Hi"], system="Be brief.")[0] != want[0]
    messages = [{"role": "user", "content": "Hi"}]
    assert reader.scores(tiny_llama, [messages])[0] == pytest.approx(want[0], abs=1e-4)
    assert reader.scores(tiny_llama, []).shape == (0,)


def test_scores_are_those_of_the_model_as_it_is_steered(tiny_llama, reader):
    vector = torch.ones(32)
    with add(tiny_llama, vector, 1, 2.0):
        steered = reader.scores(tiny_llama, ["Hi"])
    moved = steered - reader.scores(tiny_llama, ["Hi"])
    assert moved == pytest.approx(2 * float(reader.weight.sum()), abs=1e-3)


def test_a_reader_is_written_and_read(tiny_llama, reader, tmp_path):
    path = tmp_path / "reader.safetensors"
    reader.save(path)
    again = HarmfulnessReader.load(path, tiny_llama)
    assert again.metadata == reader.metadata
    assert torch.equal(again.weight, reader.weight)
    assert again.scores(tiny_llama, PROMPTS).tolist() == reader.scores(tiny_llama, PROMPTS).tolist()
    assert again.curve.to_dict("list") == {"layer": [1], "auc": [reader.auc]}
    assert again.model == "tiny-llama"


def test_a_reader_of_another_model_is_refused(tiny_llama, tiny_qwen2, reader, direction, tmp_path):
    reader.save(tmp_path / "reader.safetensors")
    with pytest.raises(SafeSteerError, match="made for 'tiny-llama' and does not fit 'tiny-qwen2'"):
        HarmfulnessReader.load(tmp_path / "reader.safetensors", tiny_qwen2)
    with pytest.raises(SafeSteerError, match="is of layer 3, but 'tiny-llama' has 3 layers"):
        replace(reader, layer=3).check(tiny_llama)
    direction.save(tmp_path / "direction.safetensors")
    with pytest.raises(SafeSteerError, match="not a reader file"):
        HarmfulnessReader.load(tmp_path / "direction.safetensors")


def test_a_reader_shows_itself(reader):
    hostile = replace(reader, model="<script>")
    assert "&lt;script&gt;" in hostile._repr_html_()
    assert "<script>" not in hostile._repr_html_()
    assert f"AUC {reader.auc:.3f}, {reader.hits:.0%} of harmful" in repr(reader)
    assert "AUC" not in repr(HarmfulnessReader(torch.ones(2), 0.0, 1, "prompt"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layer": 3}, "has the layers 0 to 2, and no layer 3"),
        ({"false_alarms": 1.0}, "a share from 0 to less than 1"),
        ({"misses": 1.0}, "misses is a share"),
        ({"n_folds": 1}, "at least 2 parts"),
        ({"n_folds": 13}, "'safesteer-pairs/val' has 12 of the rarer kind"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(tiny_llama, twelve, settings, sentence):
    with pytest.raises(SafeSteerError, match=sentence):
        fit_reader(tiny_llama, twelve, **settings)


def test_an_unknown_pooling_is_one_sentence(twelve):
    with pytest.raises(SafeSteerError, match="must be prompt or instruction, not 'last'"):
        _check(twelve, "last", (0.1, 0.02), 5)


def test_damaged_weights_are_named(tiny_llama, twelve):
    chat = copy_of(tiny_llama)
    blocks(chat.model)[0].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(SafeSteerError, match="resid_pre of layer 1 of 'tiny-llama' is not finite"):
        fit_reader(chat, twelve)
