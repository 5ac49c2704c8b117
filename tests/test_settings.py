"""Settings without sense are one sentence, whichever stage they are of."""

import pytest

from safesteer._errors import SafeSteerError
from safesteer.recipes import paper, quick, recipe


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("distill.lr", "nan", "must be positive and finite"),
        ("distill.lr", "inf", "must be positive and finite"),
        ("distill.decay", "0", "must lie above 0 and at most at 1"),
        ("distill.beta", "1", "must lie above 0"),
        ("distill.warmup", "2", "must lie between 0 and 1"),
        ("distill.anchor_weight", "-1", "must be at least 0 and finite"),
        ("distill.n_steps", "9999999999", "must be at least 1 and below"),
        ("distill.divergence", "sideways", "must be one of"),
        ("tokens.k", "0", "must be at least 1"),
        ("tokens.min_steered_prob", "nan", "must lie between 0 and 1"),
        ("tokens.seed", "-1", "must be at least 0"),
        ("sweep.max_kl", "nan", "must be a number"),
        ("sweep.batch_size", "0", "must be at least 1"),
        ("evaluation.perplexity_width", "1", "must be at least 2"),
        ("explain.n_sets", "0", "must be at least 1"),
        ("coeff", "inf", "must be finite"),
        ("coeff", "nan", "must be finite"),
        ("native_share", "-1", "must be at least 0"),
        ("n_direction", "0", "must be at least 1"),
        ("dtype", "int8", "must be one of"),
        ("seed", "x", "must be a number"),
        ("seed", "-3", "must be at least 0"),
        ("distill", "3", "Unknown setting 'distill'"),
    ],
)
def test_a_setting_without_sense_is_one_sentence(key, value, said):
    with pytest.raises(SafeSteerError, match=said) as error:
        recipe("quick", **{key: value})
    assert "\n" not in str(error.value)


def test_thresholds_can_be_switched_off_and_none_is_kept():
    found = recipe("quick", **{"sweep.max_kl": "inf", "sweep.min_steering": "-inf", "coeff": "none"})
    assert (found.sweep.max_kl, found.coeff) == (float("inf"), None)


def test_the_seed_is_that_of_everything():
    assert recipe("quick", seed="3") == recipe("quick", 3) == quick(3)
    assert recipe("paper", seed=7) == paper(7)
