"""Choosing a strength: by answers, by drift, over a table of strengths."""

from dataclasses import replace

import pytest
import torch

from conftest import PROMPTS, batch_of, naive_logits
from safesteer._errors import SafeSteerError
from safesteer.directions import calibration
from safesteer.directions.calibration import (
    calibrate_to_kl,
    choose_coeff,
    choose_direction,
    drift,
    strength_table,
)
from safesteer.directions.refusal_tokens import refusal_scores
from safesteer.models.logits import kl_divergence
from safesteer.models.text_loss import perplexity
from safesteer.steering.direction import steer

REFUSAL_IDS = torch.tensor([7, 40, 90])


def test_calibration_compares_answers(tiny_llama, direction, monkeypatch):
    """The smallest sufficient coefficient; among directions the one whose answers refuse."""
    tried = []

    def fake(coeff_that_refuses):
        def answer(chat, prompts, max_new_tokens):
            layer, coeff = tried[-1]
            return ["no" if layer == 2 and coeff >= coeff_that_refuses else "yes"] * len(prompts)

        return answer

    monkeypatch.setattr(calibration, "steer", lambda c, d, k: tried.append((d.layer, k)) or steer(c, d, k))
    monkeypatch.setattr(calibration, "generate", fake(1.4))
    directions = [replace(direction, layer=1), replace(direction, layer=2)]

    def run():
        return choose_coeff(tiny_llama, directions, ["a", "b"], lambda prompt, answer: answer == "no")

    best, table = run()
    assert (best.layer, best.coeff) == (2, 1.4)
    assert table.refusal_rate.tolist() == [0, 0, 0, 1]
    assert table.coeff.tolist() == [1.2, 1.2, 1.4, 1.4]
    monkeypatch.setattr(calibration, "generate", fake(99))
    assert (run()[0].layer, run()[0].coeff) == (1, 1.2)  # nothing refuses: the first, the gentlest


def test_a_short_look_finds_the_layer_that_a_first_token_hides(tiny_llama, direction, monkeypatch):
    """Only layer 2 refuses, and it comes last: the look at every candidate must still find it."""
    tried = []
    monkeypatch.setattr(calibration, "steer", lambda c, d, k: tried.append(d.layer) or steer(c, d, k))

    def answers(chat, prompts, max_new_tokens):
        return ["no" if tried[-1] == 2 else "yes"] * len(prompts)

    monkeypatch.setattr(calibration, "generate", answers)
    directions = [replace(direction, layer=layer) for layer in (0, 1, 2)]
    shares = []
    best, table = choose_direction(
        tiny_llama, directions, ["a", "b"], lambda _, text: text == "no", n_best=2, progress=shares.append
    )
    assert (best.layer, best.coeff) == (2, 1.2)
    assert table.layer.tolist() == [2, 0]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_nothing_to_choose_by_is_a_sentence(tiny_llama, direction):
    for directions, prompts, message in (
        ([direction], [], "no prompts to choose by"),
        ([], ["Hi"], "no directions to choose by"),
    ):
        for choose in (choose_coeff, choose_direction):
            with pytest.raises(SafeSteerError, match=message):
                choose(tiny_llama, directions, prompts, lambda prompt, answer: False)


def test_rates_name_the_position(tiny_llama, direction):
    two = [direction, replace(direction, position="-2")]
    _, rates = choose_coeff(tiny_llama, two, ["Hi"], lambda prompt, answer: False, coeffs=(1.2,))
    assert rates[["position", "layer"]].values.tolist() == [["-1", 1], ["-2", 1]]


def test_drift_is_the_kl_of_the_steered_model(tiny_llama, direction):
    for coeff in (0.0, 1.0):
        kl = drift(tiny_llama, direction, PROMPTS, coeff, n_tokens=1, batch_size=3)
        for i, text in enumerate(PROMPTS):
            batch = batch_of(tiny_llama, [text])
            base = naive_logits(tiny_llama, batch)[0, -1]
            with steer(tiny_llama, direction, coeff):
                want = kl_divergence(base, naive_logits(tiny_llama, batch)[0, -1])
            assert float(kl[i]) == pytest.approx(float(want), abs=1e-4)


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_calibrate_spends_the_kl_it_was_given(tiny_llama, direction, target):
    calibrated = calibrate_to_kl(tiny_llama, direction, PROMPTS, target_kl=target)
    spent = float(drift(tiny_llama, direction, PROMPTS, calibrated.coeff).mean())
    assert spent == pytest.approx(target, rel=0.03)
    assert torch.equal(calibrated.vector, direction.vector)


def test_calibrate_refuses_what_cannot_be_reached(tiny_llama, direction):
    with pytest.raises(SafeSteerError, match=r"Even coefficient 0\.01"):
        calibrate_to_kl(tiny_llama, direction, PROMPTS, target_kl=5.0, max_coeff=0.01)
    with pytest.raises(SafeSteerError, match="positive"):
        calibrate_to_kl(tiny_llama, direction, PROMPTS, target_kl=0.0)


def test_the_table_has_the_numbers_of_each_strength(tiny_llama, direction, few, monkeypatch):
    monkeypatch.setattr(calibration, "ANSWER_TOKENS", 2)
    text = "The tide comes in twice a day, and the boats lie on the sand in between."
    directions, shares = [replace(direction, layer=layer) for layer in (1, 2)], []
    table = strength_table(
        tiny_llama,
        directions,
        few,
        REFUSAL_IDS,
        coeffs=(0.0, 1.0),
        judge=lambda prompt, answer: prompt in few.harmful[:3],
        text=text,
        progress=shares.append,
    )
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert list(zip(table.layer, table.coeff, strict=True)) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert table.refusal_rate_harmful.tolist() == [0.5] * 4
    assert table.refusal_rate_harmless.tolist() == [0.0] * 4
    base = table[table.coeff == 0]
    assert base.kl_harmless.tolist() == [0.0, 0.0]
    assert base.perplexity.tolist() == [pytest.approx(perplexity(tiny_llama, text))] * 2
    with steer(tiny_llama, directions[1], 1.0):
        want = float(refusal_scores(tiny_llama, few.harmful, REFUSAL_IDS).mean())
        assert table.iloc[3].perplexity == pytest.approx(perplexity(tiny_llama, text))
    assert table.iloc[3].refusal_score == pytest.approx(want)
