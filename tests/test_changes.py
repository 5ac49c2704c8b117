"""Text quality, changes between two models on the same prompts, and the ledger of looks."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from conftest import copy_of
from safesteer._errors import SafeSteerError
from safesteer.evaluation.changes import change_over_seeds, paired_change
from safesteer.evaluation.curves import bias_curve, curve_area, over_refusal_at, refusal_margins
from safesteer.evaluation.ledger import log_look, looks
from safesteer.evaluation.quality import asks_for_code, repeats_itself, text_quality
from safesteer.models.bridge import to_bridge
from safesteer.models.hashing import weights_hash

WHOLE = "the cat sat on the mat and the dog sat on the rug"


def test_repeated_runs_of_words_are_counted():
    assert not repeats_itself(WHOLE)
    assert repeats_itself(WHOLE + " and " + WHOLE)
    assert not repeats_itself("one two three")
    assert not repeats_itself("")


def test_text_quality_is_the_mean_over_answers():
    prompts = ["Hello", "Write a Python function that adds.", "Write a poem.", "Give me an SQL query."]
    answers = ["a b a b a b a b", "def add(a, b):\n    return a + b", "", "I cannot."]
    quality = text_quality(prompts, answers)
    assert [asks_for_code(p) for p in prompts] == [False, True, False, True]
    assert (quality.repeats, quality.code, quality.n, quality.n_code) == (0.25, 0.5, 4, 2)
    assert quality.words == pytest.approx((8 + 7 + 0 + 2) / 4)
    assert quality.distinct == pytest.approx((2 / 8 + 5 / 7 + 0 + 1) / 4)
    assert text_quality(["Hello"], ["Hi"]).code is None


def test_a_verdict_that_pandas_read_as_nan_is_unknown():
    before, after = [1.0, 0.0, float("nan"), 1.0], [0.0, float("nan"), 1.0, 1.0]
    assert paired_change(before, after) == paired_change([True, True], [False, True])


def test_a_paired_change_is_mcnemars():
    before = [True] * 10 + [False] * 30
    after = [True] * 8 + [False] * 2 + [True] * 12 + [False] * 18
    change = paired_change(before, after)
    assert (change.gained, change.lost, change.n) == (12, 2, 40)
    assert change.value == pytest.approx(0.25)
    assert change.p == pytest.approx(binomtest(2, 14).pvalue)
    assert change.low < 0.25 < change.high
    assert change.low > 0
    assert paired_change(after, before).value == -0.25


def test_the_paired_interval_is_narrower_than_two_rates_allow():
    """The same prompts are refused by both but for one: nothing but that prompt changes."""
    before = [i % 2 == 0 for i in range(100)]
    after = [True, *before[1:-1], True]
    change = paired_change(before, after)
    assert change.value == pytest.approx(0.01)
    assert change.high - change.low < 0.1  # of two rates of 50 % alone: 0.27
    assert change.p == 1.0


def test_the_paired_interval_is_newcombes():
    """His example of method 10: 36 hold for both, 12 for the first alone, 2 for the second, of 50."""
    before, after = [True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2
    change = paired_change(before, after)
    assert (change.value, change.low, change.high) == pytest.approx((-0.2, -0.3404, -0.0569), abs=5e-5)
    back = paired_change(after, before)
    assert (back.low, back.high) == pytest.approx((-change.high, -change.low))


@pytest.mark.parametrize(("n", "base", "gained", "lost"), [(24, 0.5, 0.04, 0.0), (50, 0.3, 0.2, 0.05)])
def test_the_paired_interval_holds_the_true_change_as_often_as_it_says(n, base, gained, lost):
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        kinds = random.choice(4, n, p=[base - lost, lost, gained, 1 - base - gained])
        change = paired_change((kinds < 2).tolist(), ((kinds == 0) | (kinds == 2)).tolist())
        held += change.low <= gained - lost <= change.high
    assert held / 400 > 0.92


def test_where_no_prompt_differs_the_interval_is_not_a_point():
    for verdicts in ([False] * 24, [True] * 24, [True, False] * 12):
        change = paired_change(verdicts, verdicts)
        assert change.low < -0.02 < 0 < 0.02 < change.high


def test_unknown_verdicts_leave_their_prompt_out():
    assert paired_change([None, True, False], [True, True, None]).n == 1
    with pytest.raises(SafeSteerError, match="No prompt has a verdict"):
        paired_change([None], [True])
    with pytest.raises(SafeSteerError, match="cannot be paired"):
        paired_change([True], [True, False])


def test_seeds_widen_the_interval():
    before = [False] * 50
    alike = [[True] * 20 + [False] * 30] * 3
    apart = [[True] * n + [False] * (50 - n) for n in (5, 20, 35)]
    mean, low, high = change_over_seeds(before, alike)
    wide_mean, wide_low, wide_high = change_over_seeds(before, apart)
    assert mean == wide_mean == pytest.approx(0.4)
    assert wide_high - wide_low > 1.3 * (high - low)


def test_the_ledger_only_grows(tiny_llama, tmp_path):
    assert looks(tmp_path).empty
    log_look(tmp_path, tiny_llama, "test", 100, "a, with comma")
    first = (tmp_path / "looks.csv").read_text()
    log_look(tmp_path / "looks.csv", tiny_llama, "xstest", 5, "again")
    assert (tmp_path / "looks.csv").read_text().startswith(first)
    table = looks(tmp_path)
    assert list(table.split) == ["test", "xstest"]
    assert table.why[0] == "a, with comma"
    assert set(table.weights) == {weights_hash(tiny_llama.model)}


def test_the_hash_tells_a_student_from_its_base(tiny_llama):
    student = copy_of(tiny_llama)
    before = weights_hash(tiny_llama.model)
    assert before == weights_hash(student.model) == weights_hash(to_bridge(tiny_llama))
    student.model.model.layers[-1].mlp.down_proj.weight.data += 0.01
    assert weights_hash(student.model) != before
    assert student.fingerprint == tiny_llama.fingerprint


# --- curves ---


def test_a_curve_is_read_between_its_points_and_at_its_ends():
    points = pd.DataFrame({"harmful": [0.8, 0.4, 0.4], "over_refusal": [0.3, 0.2, 0.1]})
    assert over_refusal_at(points, 0.4) == pytest.approx(0.1)  # the better of two points
    assert over_refusal_at(points, 0.9) == pytest.approx(0.65)  # on the way to refusing everything
    assert over_refusal_at(points, 0.2) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("harmful", "over_refusal", "area"), [([], [], 0.5), ([1.0], [0.0], 0.0), ([0.0], [1.0], 0.5)]
)
def test_the_area_is_a_half_by_chance_and_nothing_for_a_perfect_model(harmful, over_refusal, area):
    points = pd.DataFrame({"harmful": harmful, "over_refusal": over_refusal}, dtype=float)
    assert curve_area(points) == pytest.approx(area)


def test_points_without_their_columns_are_named():
    with pytest.raises(SafeSteerError, match=r"not \['over_refusal'\]"):
        curve_area(pd.DataFrame({"harmful": [0.5]}))


def test_the_line_of_a_constant_is_the_share_of_prompts_whose_likeliest_first_token_it_makes(tiny_llama):
    prompts, ids = ["Pick a lock.", "Break a door down.", "Bake bread."], torch.tensor([3, 5, 8])
    margins = refusal_margins(tiny_llama, ids, prompts, batch_size=2)
    for nats in (-50.0, 0.0, 0.5, 50.0):
        opens = []
        for text in prompts:
            turns = [{"role": "user", "content": text}]
            tokenizer, model = tiny_llama.tokenizer, tiny_llama.model
            chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            inputs = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
            logits = model(**inputs).logits[0, -1].detach().clone()
            logits[ids] += nats
            opens.append(int(logits.argmax()) in ids.tolist())
        line = bias_curve(margins[:2], margins[2:], nats=(nats,))
        assert line.harmful.tolist() == [sum(opens[:2]) / 2]
        assert line.over_refusal.tolist() == [float(opens[2])]


def test_a_model_without_refusal_tokens_has_no_margins(tiny_llama):
    with pytest.raises(SafeSteerError, match="no refusal tokens"):
        refusal_margins(tiny_llama, torch.tensor([], dtype=torch.long), ["Hello"])
