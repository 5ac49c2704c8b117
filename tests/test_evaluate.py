"""Intervals, perplexity and drift against plain references; base, teacher and student side by side."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from conftest import copy_of
from safesteer._errors import SafeSteerError
from safesteer._intervals import bootstrap, wilson
from safesteer.directions.extraction import mean_difference
from safesteer.evaluation.scores import Evaluation, evaluate, score_model
from safesteer.judges.judge import ModelJudge, Verdict
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import as_chat
from safesteer.models.drift import kl_on_answers
from safesteer.models.generation import greedy_ids
from safesteer.models.templates import render
from safesteer.models.text_loss import WIKITEXT, perplexity, wikitext
from safesteer.prompts.prompt_set import load_prompts
from safesteer.settings import EvaluateConfig
from safesteer.steering.direction import steer

SMALL = EvaluateConfig(n_prompts=3, max_new_tokens=4, perplexity_tokens=64)


def test_wilson_known_values():
    # Closed form at the edges: 0 of n has the upper end z^2 / (n + z^2).
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 10)[1] == pytest.approx(1.96**2 / (10 + 1.96**2))
    low, high = wilson(95, 100)
    assert (round(low, 3), round(high, 3)) == (0.888, 0.978)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_mean_and_is_seeded():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = bootstrap(values)
    assert low < sum(values) / 200 < high
    assert (low, high) == bootstrap(values)
    assert bootstrap([2.0] * 5) == (2.0, 2.0)


@torch.no_grad()
def test_perplexity_equals_the_models_own_loss(tiny_llama):
    text = "The river runs down from the hills and past the old mill to the sea. " * 3
    ids = torch.tensor([tiny_llama.encode(text)])
    width = 16
    losses = []
    for start in range(0, ids.shape[1], width):
        window = ids[:, start : start + width]
        if window.shape[1] > 1:
            losses += [float(tiny_llama.model(window, labels=window).loss)] * (window.shape[1] - 1)
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(tiny_llama, text, width=width) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SafeSteerError, match="fewer than two tokens"):
        perplexity(tiny_llama, "")


def test_wikitext_is_one_text_again(tmp_path):
    (tmp_path / WIKITEXT).write_text('{"prompt": " = A =\\n"}\n{"prompt": "b\\n"}\n')
    assert wikitext(tmp_path) == " = A =\nb\n"


@torch.no_grad()
def test_kl_on_answers_equals_a_naive_loop(tiny_llama):
    base, prompts = tiny_llama, load_prompts().split("val").first(5)
    direction = mean_difference(base, prompts).direction(base, "-1", 1, coeff=2.0)
    lens = as_chat(to_bridge(base))
    texts, answers = prompts.harmless, ["A b", "Some answer", "x", "longer answer here", "no"]
    with steer(lens, direction):
        kls = kl_on_answers(base, lens, texts, answers, batch_size=3)
    for text, answer, kl in zip(texts, answers, kls, strict=True):
        head, tail = base.encode(render(base.tokenizer, text)), base.encode(answer)
        ids = torch.tensor([head + tail])
        p = base.model(ids).logits[0, len(head) - 1 :].double().log_softmax(-1)
        with steer(base, direction):
            q = base.model(ids).logits[0, len(head) - 1 :].double().log_softmax(-1)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_scores_count_what_the_judge_says(tiny_llama):
    prompts = load_prompts().split("test").first(4)
    config = replace(SMALL, n_prompts=None)
    refused = set(prompts.harmful[:3])
    scores, answers = score_model(
        tiny_llama, tiny_llama, prompts, config, judge=lambda prompt, answer: prompt in refused
    )
    assert scores.refusal_rate_harmful == 0.75
    assert scores.refusal_rate_harmless == 0.0
    assert (scores.n, scores.counts) == (4, "refused")
    assert [len(answers[label]) for label in ("harmful", "harmless")] == [4, 4]


class HalfJudge(ModelJudge):
    """It has no reply for the first two harmful prompts."""

    version = "0"

    def verdicts(self, prompts, answers):
        silent = load_prompts().split("test").first(3).harmful[:2]
        return [
            Verdict(p, a, "half", None if p in silent else 1.0, None)
            for p, a in zip(prompts, answers, strict=True)
        ]


def test_answers_without_a_verdict_are_counted(tiny_llama, tmp_path):
    """They count as not refused, which nobody would see in the rate."""
    prompts, config = load_prompts().split("test").first(3), EvaluateConfig(max_new_tokens=2, n_prompts=3)
    made = evaluate(tiny_llama, prompts=prompts, config=config, judge=HalfJudge())
    assert made.scores["base"].n_unknown == (2, 0)
    assert made.scores["base"].refusal_rate_harmful == pytest.approx(1 / 3)
    assert made.lines()[0].endswith("; no verdict on 2 and 0 answers")
    made.save(tmp_path)
    assert Evaluation.load(tmp_path).scores == made.scores


@pytest.fixture
def moved(tiny_llama):
    """A model that answers differently."""
    chat = replace(tiny_llama, model=deepcopy(tiny_llama.model))
    with torch.no_grad():
        chat.model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    return chat


def test_without_its_answers_the_base_writes_them(tiny_llama, moved):
    prompts = load_prompts().split("test").first(3)
    answers = greedy_ids(tiny_llama, prompts.harmless, SMALL.n_kl_tokens)
    handed_over = score_model(moved, tiny_llama, prompts, SMALL, base_answers=answers)[0]
    written = score_model(moved, tiny_llama, prompts, SMALL)[0]
    assert written.kl_harmless == pytest.approx(handed_over.kl_harmless, rel=1e-5)
    assert written.kl_harmless > 1e-6
    assert score_model(tiny_llama, tiny_llama, prompts, SMALL)[0].kl_harmless == 0.0


def test_an_evaluation_holds_the_scores_of_each_model_by_itself(tiny_llama, moved, direction):
    """Teacher: the base, steered; drift of all along the base's answers; the base is left as it was."""
    test, shares, pairs = load_prompts().split("test").across(3), [], []
    weights = {n: p.clone() for n, p in tiny_llama.model.named_parameters()}

    def judge(prompt: str, answer: str) -> bool:
        pairs.append((prompt, answer))
        return len(answer) % 2 == 0

    result = evaluate(
        tiny_llama, moved, direction, load_prompts(), SMALL, judge=judge, progress=shares.append
    )
    assert list(result.scores) == ["base", "teacher", "student"]
    assert len(pairs) == len(set(pairs))  # a judge may cost money
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0])
    base, _ = score_model(tiny_llama, tiny_llama, test, SMALL, judge=judge)
    along = greedy_ids(tiny_llama, test.harmless, SMALL.n_kl_tokens, SMALL.batch_size)
    student, _ = score_model(moved, tiny_llama, test, SMALL, judge=judge, base_answers=along)
    teacher = copy_of(tiny_llama)
    with steer(teacher, direction):
        steered, _ = score_model(teacher, tiny_llama, test, SMALL, judge=judge, base_answers=along)
    assert result.scores == {"base": base, "teacher": steered, "student": student}
    assert steered.kl_harmless > 1e-3
    assert all(torch.equal(p, weights[n]) for n, p in tiny_llama.model.named_parameters())
    rows = {(row["prompt"], row["label"]): row for row in result.answers}
    assert list(rows) == [(t, k) for k in ("harmful", "harmless") for t in test.texts(k)]
    for row in rows.values():
        for name in result.scores:
            assert row[f"{name}_refuses"] == (len(row[name]) % 2 == 0)


@pytest.mark.parametrize("kind", ["bridge", "pair"])
def test_a_bridge_and_a_pair_are_measured_as_the_model_is(tiny_llama, direction, kind):
    model = to_bridge(tiny_llama) if kind == "bridge" else (tiny_llama.model, tiny_llama.tokenizer)
    result = evaluate(model, direction=direction, config=SMALL)
    want = evaluate(tiny_llama, direction=direction, config=SMALL)
    assert result.answers == want.answers
    for name, scores in want.scores.items():
        numbers = scores.refusal_rate_harmful, scores.kl_harmless, scores.perplexity
        measured = result.scores[name]
        assert (measured.refusal_rate_harmful, measured.kl_harmless, measured.perplexity) == pytest.approx(
            numbers, rel=1e-3, abs=1e-5
        )


def test_an_evaluation_prints_renders_and_comes_back_from_its_folder(tiny_llama, tmp_path):
    result = evaluate(tiny_llama, config=SMALL)
    assert repr(result).startswith("Evaluation(base: refused ")
    assert "perplexity" in result.lines()[0]
    assert result.to_frame().loc["base", "n"] == 3
    assert "<table" in result._repr_html_()
    result.save(tmp_path)
    assert Evaluation.load(tmp_path) == result
    (tmp_path / "answers.jsonl").unlink()
    assert Evaluation.load(tmp_path) == Evaluation(result.scores)
    (tmp_path / "evaluation.json").write_text("{}[")
    with pytest.raises(SafeSteerError, match=r"evaluation\.json"):
        Evaluation.load(tmp_path)
