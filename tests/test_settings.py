"""Settings: bounds, one sentence per mistake, one seed, and a recipe file that is read as it was written."""

import dataclasses

import pytest

from safesteer import settings as every_setting
from safesteer._errors import SafeSteerError
from safesteer.recipes import SECTIONS, Recipe, paper, quick, recipe
from safesteer.settings import DistillConfig, TokenConfig


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("distill.lr", "nan", "distill.lr must be a finite number, not 'nan'"),
        ("distill.lr", "inf", "must be a finite number"),
        ("distill.lr", "0", "must be above 0"),
        ("distill.lr", "fast", "must be a valid number"),
        ("distill.decay", "0", "must be above 0"),
        ("distill.beta", "1", "must be below 1"),
        ("distill.warmup", "2", "must be at most 1"),
        ("distill.anchor_weight", "-1", "must be at least 0"),
        ("distill.n_steps", "9999999999", "must be at most 2147483647"),
        ("distill.n_steps", "0", "must be at least 1"),
        ("distill.divergence", "sideways", "must be 'reverse', 'forward', 'symmetric' or 'jsd'"),
        ("distill.splits", "test", "must be 'train', 'val' or 'distill'"),
        ("distill.keep_adapter", "perhaps", "must be a valid boolean"),
        ("tokens.k", "0", "must be at least 1"),
        ("tokens.k", "-5", "must be at least 1"),
        ("tokens.min_steered_prob", "nan", "must be a finite number"),
        ("tokens.seed", "-1", "must be at least 0"),
        ("direction.max_kl", "nan", "must be at least 0"),
        ("direction.min_steering", "nan", "not 'nan'"),
        ("direction.batch_size", "0", "must be at least 1"),
        ("direction.controls", "perhaps", "must be 'random' or 'shuffled'"),
        ("direction.coeff", "inf", "must be a finite number"),
        ("direction.native_share", "-1", "must be at least 0"),
        ("direction.n_train", "0", "must be at least 1"),
        ("direction.extraction", "magic", "must be 'auto', 'instruction'"),
        ("evaluate.perplexity_width", "1", "must be at least 2"),
        ("explain.n_sets", "0", "must be at least 1"),
        ("dtype", "int8", "must be 'float32', 'bfloat16' or 'float16'"),
        ("seed", "x", "must be a valid integer"),
        ("seed", "-3", "must be at least 0"),
        ("distill", "3", "Unknown setting 'distill'"),
        ("oven.heat", "3", r"Unknown setting 'oven\.heat'"),
        ("tokens.size", "3", "Unknown setting 'tokens.size'"),
    ],
)
def test_a_bad_setting_is_one_sentence(key, value, sentence):
    with pytest.raises(SafeSteerError, match=sentence) as error:
        recipe("quick", **{key: value})
    assert "\n" not in str(error.value)


def test_a_config_of_its_own_is_checked_too():
    with pytest.raises(SafeSteerError, match=r"tokens\.k must be at least 1, not 0"):
        TokenConfig(k=0)
    with pytest.raises(SafeSteerError, match=r"Unknown setting 'distill\.steps'"):
        DistillConfig(steps=3)
    with pytest.raises(SafeSteerError, match=r"distill\.lr"):
        dataclasses.replace(DistillConfig(), lr=-1.0)


def test_thresholds_can_be_switched_off_and_none_is_a_word():
    settings = {"direction.max_kl": "inf", "direction.min_steering": "-inf", "direction.n_val": "none"}
    changed = recipe("quick", **settings).direction
    assert (changed.max_kl, changed.min_steering, changed.n_val) == (float("inf"), float("-inf"), None)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("distill.keep_adapter", "true", True),
        ("direction.controls", "random", ("random",)),
        ("direction.controls", "", ()),
        ("distill.splits", "distill, train", ("distill", "train")),
        ("distill.lora_rank", "8", 8),
        ("distill.lr", "3e-5", 3e-5),
        ("direction.coeff", "none", None),
    ],
)
def test_words_of_the_command_line_become_values(key, word, value):
    section, _, name = key.partition(".")
    assert getattr(getattr(recipe(**{key: word}), section), name) == value


def test_one_seed_sets_every_seed_unless_a_stage_has_its_own():
    for preset in ("quick", "paper"):
        changed = recipe(preset, seed="7")
        seeds = {getattr(getattr(changed, name), "seed", 7) for name in SECTIONS}
        assert {changed.seed, *seeds} == {7}
    own = recipe(seed=7, **{"tokens.seed": 3})
    assert (own.seed, own.tokens.seed, own.distill.seed) == (7, 3, 7)
    assert {getattr(getattr(recipe("paper"), name), "seed", 42) for name in SECTIONS} == {42}


def test_presets():
    assert recipe() == quick()
    published = paper().distill
    assert (published.divergence, published.normalizer, published.harmless_per_step) == (
        "reverse",
        "partial",
        0,
    )
    assert (published.rollouts, published.decay, published.splits) == ("student", 1.0, ("distill",))
    # 100 harmful prompts x 8 rollouts in optimizer steps of 32 sequences, one epoch.
    assert published.n_steps * published.harmful_per_step == 100
    assert published.harmful_per_step * published.n_rollouts == 32
    with pytest.raises(SafeSteerError, match="Unknown preset"):
        recipe("fancy")


def test_every_setting_says_what_it_means():
    rows = list(recipe().rows())
    assert len({name for name, *_ in rows}) == len(rows) > 60
    for name, _, _, description in rows:
        assert description.endswith((".", ",", "and")) or len(description) > 20, name
    assert {kind.__name__ for kind in SECTIONS.values()} <= set(dir(every_setting))


def test_a_recipe_file_is_read_as_it_was_written(tmp_path):
    for preset in ("quick", "paper"):
        written = recipe(preset, seed=5, **{"direction.n_val": "none", "distill.splits": "distill"})
        written.save(tmp_path / "r.toml")
        assert Recipe.load(tmp_path / "r.toml") == written
    assert "# Size of S. [tokens]" in (tmp_path / "r.toml").read_text()


def test_a_recipe_file_holds_what_it_changes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "paper"\nseed = 3\n\n[distill]\nlr = 1e-6\n')
    assert Recipe.load(path) == recipe("paper", 3, **{"distill.lr": 1e-6})
    assert Recipe.load(path, seed=4, **{"distill.lr": "2e-6"}) == recipe("paper", 4, **{"distill.lr": 2e-6})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = [", "is not TOML"),
        ("[distill]\nsteps = 3", r"Unknown setting 'distill\.steps'"),
        ("[oven]\nheat = 3", r"Unknown setting 'oven\.heat'"),
        ("[distill]\nlr = -1.0", "distill.lr must be above 0"),
        ("distill = 3", "Unknown setting 'distill'"),
        ('preset = "fancy"', "Unknown preset 'fancy'"),
    ],
)
def test_a_bad_recipe_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SafeSteerError, match=sentence):
        Recipe.load(path)
    with pytest.raises(SafeSteerError, match="Cannot read the recipe"):
        Recipe.load(tmp_path / "nowhere.toml")


def test_a_recipe_renders_and_hashes():
    assert "direction.extraction" in recipe()._repr_html_()
    assert recipe().hash != recipe(seed=1).hash
