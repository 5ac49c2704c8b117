"""Intervals, perplexity and drift against plain references."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from safesteer._errors import SafeSteerError
from safesteer._intervals import bootstrap, wilson
from safesteer.directions.extraction import mean_difference
from safesteer.evaluation.scores import evaluate, kl_on_answers
from safesteer.models.batch import render
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import as_chat
from safesteer.models.generation import generate
from safesteer.models.text_loss import perplexity
from safesteer.prompts.prompt_set import load_prompts
from safesteer.settings import EvaluateConfig
from safesteer.steering.direction import steer


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
    ids = torch.tensor([tiny_llama.tokenizer(text, add_special_tokens=False).input_ids])
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


@torch.no_grad()
def test_kl_on_answers_equals_a_naive_loop(tiny_llama):
    base, prompts = tiny_llama, load_prompts().split("val").first(5)
    direction = mean_difference(base, prompts).direction(base, "-1", 1, coeff=2.0)
    lens = as_chat(to_bridge(base))
    texts, answers = prompts.harmless, ["A b", "Some answer", "x", "longer answer here", "no"]
    config = EvaluateConfig(batch_size=3)
    with steer(lens, direction):
        found = kl_on_answers(base, lens, texts, answers, config)
    tokenizer = base.tokenizer
    for text, reply, kl in zip(texts, answers, found, strict=True):
        head = tokenizer(render(tokenizer, text), add_special_tokens=False).input_ids
        tail = tokenizer(reply, add_special_tokens=False).input_ids
        ids = torch.tensor([head + tail])
        p = base.model(ids).logits[0, len(head) - 1 :].double().log_softmax(-1)
        with steer(base, direction):
            q = base.model(ids).logits[0, len(head) - 1 :].double().log_softmax(-1)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_evaluate_counts_what_the_judge_says(tiny_llama):
    prompts = load_prompts().split("test").first(4)
    config = EvaluateConfig(max_new_tokens=3, perplexity_tokens=64)
    refused = set(prompts.harmful[:3])
    scores, answers = evaluate(
        tiny_llama, tiny_llama, prompts, config, judge=lambda prompt, answer: prompt in refused
    )
    assert scores.refusal_rate_harmful == 0.75
    assert scores.refusal_rate_harmless == 0.0
    assert scores.n == 4
    assert [len(answers[label]) for label in ("harmful", "harmless")] == [4, 4]


def test_the_base_is_asked_where_its_answers_are_not_given(tiny_llama):
    prompts, config = (
        load_prompts().split("test").first(3),
        EvaluateConfig(max_new_tokens=4, perplexity_tokens=64),
    )
    moved = replace(tiny_llama, model=deepcopy(tiny_llama.model))
    with torch.no_grad():
        moved.model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    said = generate(tiny_llama, prompts.harmless, max_new_tokens=4)
    given = evaluate(moved, tiny_llama, prompts, config, base_answers=said)[0]
    asked = evaluate(moved, tiny_llama, prompts, config)[0]
    assert asked.kl_harmless == pytest.approx(given.kl_harmless, rel=1e-5)
    assert asked.kl_harmless > 1e-6
    assert evaluate(tiny_llama, tiny_llama, prompts, config)[0].kl_harmless == 0.0
