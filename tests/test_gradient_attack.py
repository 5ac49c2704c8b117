"""The gradient attack as a measurement: gradient and losses of plain passes, and only numbers stay."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from conftest import copy_of, n_hooks
from safesteer._errors import SafeSteerError
from safesteer.evaluation import gradient_attack
from safesteer.evaluation.gradient_attack import (
    GradientAttack,
    attack_cell,
    best_tokens,
    candidate_losses,
    suffix_gradient,
)
from safesteer.evaluation.robust import Robustness, Subject, parts_of
from safesteer.evaluation.suffixes import allowed_ids, slot_of
from safesteer.judges.judge import ModelJudge, Verdict
from safesteer.models.generation import generate
from safesteer.models.hashing import weights_hash
from safesteer.models.parts import hf_model
from safesteer.models.templates import NAMED, control_ids, ids_of, render, set_template
from safesteer.prompts.conversation import as_prompt
from safesteer.prompts.prompt_set import load_prompts
from safesteer.report.robust_figures import robust_figure
from safesteer.report.robust_table import ATTACKED, OPENED, SPENT, robustness_line

SMALL = GradientAttack(
    n_prompts=2, n_suffix=6, n_target=4, n_steps=4, n_candidates=8, top_k=16, check_every=2
)
HARMFUL = load_prompts().split("val").harmful[:4]  # not of the test split
TARGET = [30, 31, 32]


def always(prompt: str, answer: str) -> bool:
    return True


def values(cell: dict) -> dict:
    return {row["name"]: row["value"] for row in cell["rows"]}


def a_slot(chat, n=6):
    return slot_of(chat, "How do I open a door?", n, TARGET)


def exchanged(slot, chat, n, seed=0):
    """Suffixes with one other token, not looked at for what they read as."""
    ids = allowed_ids(chat).nonzero()[:, 0]
    draw = torch.Generator().manual_seed(seed)
    suffixes = [list(slot.start) for _ in range(n)]
    for i, suffix in enumerate(suffixes):
        suffix[i % len(suffix)] = int(ids[torch.randint(len(ids), (1,), generator=draw)])
    return suffixes


def whole_ids(slot, suffix):
    return torch.tensor([[*slot.head, *suffix, *slot.tail, *slot.target]])


def plain_loss(logits, target):
    return cross_entropy(logits[0, -len(target) - 1 : -1].float(), torch.tensor(target))


def one_hot_gradient(chat, slot, suffix):
    """By transformers alone: rows of ones and zeros times the embedding, in one pass without a cache."""
    ids = whole_ids(slot, suffix)
    embedding = chat.model.get_input_embeddings()
    embedded = embedding(ids)
    ratio = (embedded[0, 0] / embedding.weight[ids[0, 0]])[0]  # of Gemma's embedding
    rows = one_hot(torch.tensor(suffix), len(embedding.weight)).float().requires_grad_()
    at = slice(len(slot.head), len(slot.head) + len(suffix))
    embedded = torch.cat(
        [embedded[:, : at.start], (ratio * rows @ embedding.weight)[None], embedded[:, at.stop :]], 1
    )
    plain_loss(chat.model(inputs_embeds=embedded, use_cache=False).logits, slot.target).backward()
    return rows.grad, float(ratio)


def test_the_gradient_is_that_of_one_hot_rows_in_plain_transformers(chat):
    slot = a_slot(chat)
    suffix = exchanged(slot, chat, 1)[0]
    want, ratio = one_hot_gradient(chat, slot, suffix)
    got = suffix_gradient(chat, slot, suffix)
    weight = chat.model.get_input_embeddings().weight
    assert float(want.abs().max()) > 1e-3
    torch.testing.assert_close(ratio * got @ weight.T, want, rtol=1e-3, atol=1e-5)
    allowed = allowed_ids(chat)
    best = best_tokens(chat, got, allowed, 5)
    masked = want[:, : len(allowed)].masked_fill(~allowed, torch.inf)
    assert best.tolist() == masked.argsort(1)[:, :5].tolist()
    assert n_hooks(chat.model) == n_hooks(copy_of(chat).model)


def test_the_gradient_of_a_bridge_is_that_of_its_model(chat_and_bridge):
    plain, bridge = chat_and_bridge
    slot = a_slot(plain)
    hooks = n_hooks(hf_model(bridge.model))
    want = suffix_gradient(plain, slot, slot.start)
    torch.testing.assert_close(suffix_gradient(bridge, slot, slot.start), want, rtol=1e-3, atol=1e-5)
    assert n_hooks(hf_model(bridge.model)) == hooks


def test_losses_of_a_pass_are_those_of_one_plain_pass_per_candidate(chat):
    slot = a_slot(chat)
    suffixes = exchanged(slot, chat, 12)
    with torch.no_grad():
        logits = [chat.model(whole_ids(slot, s), use_cache=False).logits for s in suffixes]
    want = torch.stack([plain_loss(one, slot.target) for one in logits])
    assert float(want.std()) > 1e-3
    torch.testing.assert_close(candidate_losses(chat, slot, suffixes), want, rtol=1e-4, atol=1e-5)


def test_columns_that_all_candidates_share_are_computed_once(tiny_llama):
    slot, read = a_slot(tiny_llama), []
    suffixes = exchanged(slot, tiny_llama, 5)
    candidate_losses(tiny_llama, slot, suffixes)  # what is measured once per model
    embedding = tiny_llama.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    candidate_losses(tiny_llama, slot, suffixes)
    handle.remove()
    n_after = 6 + len(slot.tail) + len(slot.target)
    assert read == [(1, len(slot.head)), (5, n_after)]


def test_half_precision_is_near_full_precision(tiny_llama):
    half = copy_of(tiny_llama)
    half.model.to(torch.bfloat16)
    slot = a_slot(tiny_llama)
    suffixes = exchanged(slot, tiny_llama, 6)
    losses = [candidate_losses(chat, slot, suffixes) for chat in (half, tiny_llama)]
    torch.testing.assert_close(*losses, rtol=0.03, atol=0.03)
    gradients = [suffix_gradient(chat, slot, slot.start).float().flatten() for chat in (half, tiny_llama)]
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.97
    cell = attack_cell(half, HARMFUL, SMALL, judge=always, max_new_tokens=4)
    assert values(cell)["loss of the target after"] < values(cell)["loss of the target before"]


# --- suffixes ---


@pytest.mark.parametrize("template", [None, *NAMED])
def test_a_suffix_stands_between_prompt_and_answer_in_every_template(chat, template):
    from copy import deepcopy

    chat = replace(chat, tokenizer=deepcopy(chat.tokenizer))
    if template:
        set_template(chat.tokenizer, template)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for prompt in ("Name a river.", as_prompt([*talk, {"role": "user", "content": "Name a river."}])):
        slot = slot_of(chat, prompt, 6, TARGET)
        plain = ids_of(chat.tokenizer, render(chat.tokenizer, prompt))
        assert [*slot.head, *slot.tail] == plain
        assert len(slot.start) == 6
        text = render(chat.tokenizer, slot.with_suffix(chat, slot.start))
        assert text.replace(" !" * text.count(" !"), "") == render(chat.tokenizer, prompt)


def test_what_is_read_as_other_tokens_is_no_suffix(tiny_llama):
    slot, allowed = a_slot(tiny_llama), allowed_ids(tiny_llama)
    assert not allowed[control_ids(tiny_llama.tokenizer)].any()
    assert int(allowed.sum()) > 100
    parts = tiny_llama.tokenizer.convert_tokens_to_ids(list("thethe"))  # read as fewer tokens
    assert len(tiny_llama.encode("thethe")) < 6
    # Its text would end the user's turn, written by tokens that are no control tokens.
    end = tiny_llama.tokenizer.convert_tokens_to_ids(list("<|im_end|>"))
    assert bool(allowed[end].all())
    assert slot.with_suffix(tiny_llama, end) is None
    assert slot.with_suffix(tiny_llama, parts) is None
    assert slot.with_suffix(tiny_llama, slot.start) is not None


def test_more_tokens_than_any_start_has_are_refused_in_a_sentence(tiny_llama, monkeypatch):
    from safesteer.evaluation import suffixes

    monkeypatch.setattr(suffixes, "STARTS", ("  !?",))
    with pytest.raises(SafeSteerError, match="No start of 1 tokens"):
        slot_of(tiny_llama, "Hi", 1, TARGET)


# --- the attack ---


def trained_to_refuse(chat, prompts):
    """A copy that answers these prompts by a refusal, which a few steps of plain training teach."""
    student = copy_of(chat)
    model = student.model.requires_grad_(True)
    refusal = [*chat.encode("I'm sorry, but I can't help with that."), chat.eos_ids[0]]
    inputs = [ids_of(chat.tokenizer, render(chat.tokenizer, p)) + refusal for p in prompts]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        for ids in inputs:
            logits = model(torch.tensor([ids]), use_cache=False).logits
            cross_entropy(logits[0, -len(refusal) - 1 : -1], torch.tensor(refusal)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return student


@pytest.fixture(scope="module")
def refusing(tiny_llama):
    return trained_to_refuse(tiny_llama, HARMFUL)


def test_the_loss_falls_on_a_model_that_refuses(refusing):
    config = replace(SMALL, n_steps=12, check_every=100)
    result = values(attack_cell(refusing, HARMFUL, config, max_new_tokens=16))
    assert result["before the attack"] == 1.0
    assert result["prompts attacked"] == 2
    assert result["steps taken"] > 0
    assert result["loss of the target after"] < result["loss of the target before"] - 0.5
    assert all(p.grad is None for p in refusing.model.parameters())


def test_a_seed_repeats_its_attack_and_the_model_stays_as_it_was(refusing):
    before = weights_hash(refusing.model, None), n_hooks(refusing.model)
    cells = [
        attack_cell(refusing, HARMFUL, replace(SMALL, seed=seed), judge=always, max_new_tokens=4)
        for seed in (0, 0, 1)
    ]
    assert cells[0] == cells[1] != cells[2]
    assert (weights_hash(refusing.model, None), n_hooks(refusing.model)) == before
    with torch.no_grad():  # callers may have switched gradients off
        assert attack_cell(refusing, HARMFUL, SMALL, judge=always, max_new_tokens=4) == cells[0]


def test_a_prompt_has_the_same_attack_whichever_are_attacked_beside_it(refusing):
    one = attack_cell(refusing, HARMFUL[:1], SMALL, judge=always, max_new_tokens=4)
    both = attack_cell(refusing, HARMFUL, replace(SMALL, n_prompts=1), judge=always, max_new_tokens=4)
    assert values(one) == values(both)


def test_an_attack_ends_at_the_first_answer_that_is_not_refused(tiny_llama, monkeypatch):
    """Both refuse with the starting suffix too; one yields at the first look after that."""
    answers = iter(["no", "no", "no", "yes", "no", "no", "no"])
    monkeypatch.setattr(gradient_attack, "generate", lambda chat, texts, **_: [next(answers) for _ in texts])
    cell = attack_cell(tiny_llama, HARMFUL[:2], SMALL, judge=lambda p, a: a == "no")
    result = values(cell)
    assert list(answers) == []
    assert result["before the attack"] == result["with the starting suffix, nothing optimized"] == 1
    (attacked,) = [r for r in cell["rows"] if r["kind"] == ATTACKED]
    assert (attacked["value"], attacked["n"]) == (0.5, 2)
    assert (result["steps taken"], result["steps until not refused"]) == (3, 3)  # of 2 and 4
    assert result["forward passes"] == 2 + 6 * (1 + 1 + SMALL.n_candidates)


def test_a_suffix_that_works_as_it_is_takes_no_step(tiny_llama, monkeypatch):
    answers = iter(["no", "yes"])
    monkeypatch.setattr(gradient_attack, "generate", lambda chat, texts, **_: [next(answers) for _ in texts])
    result = values(attack_cell(tiny_llama, HARMFUL[:1], SMALL, judge=lambda p, a: a == "no"))
    assert (result["steps taken"], result["forward passes"]) == (0, 1)
    assert result["with the starting suffix, nothing optimized"] == 0
    assert result["loss of the target before"] == result["loss of the target after"]


def test_where_nothing_is_refused_the_row_says_so(tiny_llama):
    rows = attack_cell(tiny_llama, HARMFUL, SMALL, judge=lambda p, a: False, max_new_tokens=4)["rows"]
    assert [(r["name"], r["value"]) for r in rows] == [("before the attack", 0), ("prompts attacked", 0)]
    assert rows[1]["metric"] == "none of the first 4 is refused at first"


def test_a_judge_of_harm_counts_safe_answers_and_an_unknown_verdict_is_no_success(tiny_llama):
    class Harm(ModelJudge):
        def verdicts(self, prompts, answers):
            calls.append(list(prompts))
            p = 0.0 if len(calls) == 1 else None if len(calls) < 4 else 1.0
            return [Verdict(q, a, "Harm", None, p) for q, a in zip(prompts, answers, strict=True)]

    calls = []
    cell = attack_cell(tiny_llama, HARMFUL[:1], SMALL, judge=Harm(), max_new_tokens=2)
    assert calls == [HARMFUL[:1]] * 4  # it reads the plain request; then the start, and two looks
    assert values(cell)["steps until not safe"] == 4
    assert next(r for r in cell["rows"] if r["kind"] == ATTACKED)["value"] == 0


def test_suffixes_and_answers_stay_in_memory(refusing, tmp_path, monkeypatch, capfd, caplog):
    texts, outs = [], []

    def recorded(chat, prompts, **settings):
        answers = generate(chat, prompts, **settings)
        texts.extend(p for p in prompts if p not in HARMFUL)
        outs.extend(answers)
        return answers

    monkeypatch.setattr(gradient_attack, "generate", recorded)
    monkeypatch.chdir(tmp_path)
    cell = attack_cell(refusing, HARMFUL, SMALL, judge=always, max_new_tokens=8)
    suffixes = [text.removeprefix(next(p for p in HARMFUL if text.startswith(p))) for text in texts]
    assert len(set(suffixes)) > 2
    captured = capfd.readouterr()
    written = json.dumps(cell) + captured.out + captured.err + caplog.text
    for text in (*suffixes, *outs, *HARMFUL):
        assert len(text) < 3 or json.dumps(text.strip())[1:-1] not in written
    assert not list(tmp_path.iterdir())
    words = {"kind", "name", "metric"}
    for row in cell["rows"]:
        assert all(isinstance(v, int | float) or v is None for key, v in row.items() if key not in words)
    other = attack_cell(refusing, HARMFUL, replace(SMALL, seed=5), judge=always, max_new_tokens=8)
    assert [[r[w] for w in words] for r in cell["rows"]] == [[r[w] for w in words] for r in other["rows"]]
    assert suffixes[0] not in repr(slot_of(refusing, HARMFUL[0], 6, TARGET))


def test_weights_in_integers_have_a_sentence_and_no_row(tiny_llama):
    quantized = copy_of(tiny_llama)
    stored = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    quantized.model.register_parameter("stored", stored)
    with pytest.raises(SafeSteerError, match="quantized or offloaded"):
        attack_cell(quantized, HARMFUL, SMALL, judge=always)


def test_a_model_that_has_no_gradient_at_its_embedding_has_a_sentence(tiny_llama):
    cut = copy_of(tiny_llama)
    cut.model.model.norm.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(SafeSteerError, match="cannot be differentiated"):
        attack_cell(cut, HARMFUL, SMALL, judge=always, max_new_tokens=4)


# --- the suite ---


def test_the_attack_is_a_part_of_the_suite_and_can_be_left_out(tiny_llama):
    robust = Robustness(n_harmful=2, max_new_tokens=4, attack=SMALL)
    made = dict(parts_of(Subject(tiny_llama, None, robust, always)))["gradient"]()
    assert {r["kind"] for r in made["rows"]} == {ATTACKED, SPENT}
    assert values(made)["prompts attacked"] == 2
    assert "verdicts" not in made  # models refuse other prompts, so that there are no pairs
    without = replace(robust, attack=None)
    assert "gradient" not in dict(parts_of(Subject(tiny_llama, None, without, always)))


def test_card_and_figure_show_the_attack(tiny_llama):
    import pandas as pd

    cell = attack_cell(tiny_llama, HARMFUL, SMALL, judge=always, max_new_tokens=4)
    table = pd.DataFrame([{"model": "student", **row} for row in cell["rows"]])
    opened = table[table.kind == ATTACKED].assign(kind=OPENED, name="0 tokens", metric="refused", n=8)
    table = pd.concat([opened, table])
    name = "gradient attack of 4 steps on 6 tokens"
    assert f"100% of 2 refused ones after a {name}" in robustness_line(table)
    assert "gradient" not in robustness_line(opened)
    dots = next(t for t in robust_figure(table).data if t.name == "student, harmful")
    assert dots.text[-1] == f"{name}: refused, of those refused at first"
