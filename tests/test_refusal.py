"""Refusal tokens are learnt where the model refuses, and scores keep their order."""

import pytest
import torch

from conftest import PROMPTS, assert_near, batch_of, naive_logits, plainly_padded
from safesteer._errors import SafeSteerError
from safesteer.directions.refusal_tokens import (
    REFUSALS,
    RefusalTokens,
    learn_refusal_tokens,
    refusal_scores,
    refusal_token_ids,
)
from safesteer.judges.wording import refuses
from safesteer.models.forward import last_logits
from safesteer.models.logits import refusal_score


def test_refusal_tokens_are_first_tokens_of_refusals_only(tiny_llama):
    tokenizer = tiny_llama.tokenizer
    starts = [tiny_llama.decode([i]) for i in refusal_token_ids(tokenizer).tolist()]
    assert all(any(t.startswith(s) for t in REFUSALS) for s in starts)
    shared = refusal_token_ids(tokenizer, ("Sorry", "Xylophone"), ("Sorry", "Yes")).tolist()
    assert shared == tiny_llama.encode("Xylophone")[:1]
    with pytest.raises(SafeSteerError, match="same tokens"):
        refusal_token_ids(tokenizer, ("Sorry",), ("Sorry",))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_refusal_scores_keep_the_order_of_prompts(chat, batch_size):
    ids = torch.tensor([7, 40, 90])
    want = [float(refusal_score(naive_logits(chat, batch_of(chat, [p]))[0, -1], ids)) for p in PROMPTS]
    assert_near(refusal_scores(chat, list(PROMPTS), ids, batch_size=batch_size), want)


def test_last_logits_equal_the_models_own(chat):
    want = naive_logits(chat, plainly_padded(chat))[:, -3:]
    assert_near(last_logits(chat, batch_of(chat), 3), want)


def test_tokens_are_learnt_by_judging_what_follows_them(chat, few):
    """A judge that calls one start a refusal finds exactly that token."""
    texts = learn_refusal_tokens(chat, few.harmful, few.harmless, lambda prompt, answer: False).table.text
    start = next(
        t for t in texts if t.isalnum() and t.isascii() and not any(o.startswith(t) for o in texts if o != t)
    )
    learnt = learn_refusal_tokens(chat, few.harmful, few.harmless, lambda _, answer: answer.startswith(start))
    assert learnt.learnt
    selected = learnt.table[learnt.table.refusal]
    assert start in selected.text.tolist()
    assert all(start.startswith(t.strip()) for t in selected.text)
    assert learnt.table.iloc[0].refused == learnt.table.iloc[0].n
    assert sorted(learnt.ids.tolist()) == sorted(selected.token_id)
    assert "learnt from the model" in repr(learnt)


def test_the_answer_judged_is_the_models_own_continuation(tiny_llama, few):
    judged = {}

    def judge(prompt, answer):
        judged.setdefault(prompt, []).append(answer)
        return False

    table = learn_refusal_tokens(
        tiny_llama, few.harmful[:2], few.harmless, judge, max_new_tokens=4, system=None
    ).table
    i = int(table.token_id[0])
    head = batch_of(tiny_llama, [few.harmful[0]]).prompt_ids
    out = tiny_llama.model.generate(
        torch.cat([head, torch.tensor([[i]])], 1), max_new_tokens=4, do_sample=False
    )
    assert tiny_llama.decode_answer(out[0, head.shape[1] :].tolist()) in judged[few.harmful[0]]
    first = naive_logits(tiny_llama, plainly_padded(tiny_llama, few.harmful[:2]))[:, -1].softmax(-1).mean(0)
    assert table.p_harmful[0] == pytest.approx(float(first[i]), abs=1e-5)


def test_a_model_that_never_refuses_falls_back_on_written_refusals(tiny_llama, few):
    learnt = learn_refusal_tokens(tiny_llama, few.harmful, few.harmless, refuses)
    assert not learnt.learnt
    assert sorted(learnt.ids.tolist()) == refusal_token_ids(tiny_llama.tokenizer).tolist()
    assert "written refusals" in repr(learnt)


def test_learnt_tokens_save_and_show(tiny_llama, few, tmp_path):
    learnt = learn_refusal_tokens(tiny_llama, few.harmful, few.harmless, refuses)
    learnt.save(tmp_path / "refusal_tokens.csv")
    assert (tmp_path / "refusal_tokens.csv").read_text().startswith("token_id,text,p_harmful")
    assert "<table" in learnt._repr_html_()
    with pytest.raises(SafeSteerError, match="needs harmful"):
        learn_refusal_tokens(tiny_llama, [], few.harmless, refuses)


def test_a_token_with_a_carriage_return_is_read_back(tiny_llama, few, tmp_path):
    learnt = learn_refusal_tokens(tiny_llama, few.harmful, few.harmless, refuses)
    texts = ["\r", "\r\n", "a,\n'", "None", *learnt.table.text[4:]]
    odd = RefusalTokens(learnt.table.assign(text=texts))
    odd.save(tmp_path / "refusal_tokens.csv")
    assert RefusalTokens.load(tmp_path / "refusal_tokens.csv").table.text.tolist() == texts


@pytest.mark.model
def test_smollm2_starts_its_refusals_with_i(smollm2, pairs):
    val = pairs.split("val")
    learnt = learn_refusal_tokens(smollm2, val.harmful, val.harmless, refuses)
    assert learnt.learnt
    assert "I" in learnt.table.text[learnt.table.refusal].tolist()
