"""Settings: bounds, one sentence per mistake, one seed, and a recipe file that is read as it was written."""

import dataclasses

import pytest

from safesteer import settings as every_setting
from safesteer._errors import SafeSteerError
from safesteer.prompts.prompt_set import load_prompts
from safesteer.recipes import PRESETS, SECTIONS, Recipe, for_family, quick, recipe
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
        ("direction.coeff", "-1.8", "must be above 0"),  # a teacher that refuses less
        ("direction.native_share", "-1", "must be at least 0"),
        ("direction.n_train", "0", "must be at least 1"),
        ("direction.extraction", "magic", "must be 'auto', 'instruction'"),
        ("evaluate.perplexity_width", "1", "must be at least 2"),
        ("explain.n_sets", "0", "must be at least 1"),
        ("dtype", "int8", "must be 'auto', 'float32', 'bfloat16' or 'float16'"),
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
    for preset in PRESETS:
        changed = recipe(preset, seed="7")
        seeds = {getattr(getattr(changed, name), "seed", 7) for name in SECTIONS}
        assert {changed.seed, *seeds} == {7}
    own = recipe(seed=7, **{"tokens.seed": 3})
    assert (own.seed, own.tokens.seed, own.distill.seed) == (7, 3, 7)
    assert {getattr(getattr(recipe("paper"), name), "seed", 42) for name in SECTIONS} == {42}


# What the authors' scripts for Qwen and for Llama set, or where they set nothing what sections 3 and 4 of
# arXiv 2606.02530 say (read for facts; bfloat16 is theirs for all weights, here of what does not train).
PUBLISHED = {
    "dtype": ("bfloat16", "bfloat16"),
    # the direction: 128 + 128 prompts to read, 32 + 32 to select on, d added as it is
    "direction.extraction": ("instruction", "instruction"),
    "direction.n_train": (None, None),  # all of the split: 128 pairs, below
    "direction.n_val": (None, None),  # 32 pairs
    "direction.coeff": (1.0, 1.0),
    "direction.rank_by": ("ablation", "ablation"),
    "direction.max_layer_share": (0.8, 0.8),
    "direction.max_kl": (0.1, 0.1),
    "direction.min_steering": (0.0, 0.0),
    "direction.n_kl_tokens": (1, 1),
    # S
    "tokens.k": (50, 50),
    "tokens.k_vote": (200, 200),
    "tokens.n_samples": (8, 8),
    "tokens.horizon": (7, 5),
    "tokens.min_steered_prob": (1e-8, 1e-7),
    "tokens.early_ends": (False, False),  # min_new_tokens = H - 1
    "tokens.method": ("vote", "vote"),
    "tokens.teacher": ("steered", "steered"),
    "tokens.rollouts": ("teacher", "teacher"),
    "tokens.prompts": ("harmless", "harmless"),
    # distillation: 100 harmful prompts x 8 answers of 512 tokens, 32 sequences per optimizer step, one epoch
    "distill.divergence": ("reverse", "reverse"),
    "distill.normalizer": ("partial", "partial"),
    "distill.support": ("safety", "safety"),
    "distill.teacher": ("steered", "steered"),
    "distill.rollouts": ("student", "student"),
    "distill.splits": (("distill",), ("distill",)),
    "distill.train_layers": ("all", "all"),
    "distill.lora_rank": (0, 0),
    "distill.n_steps": (25, 25),
    "distill.harmful_per_step": (4, 4),
    "distill.n_rollouts": (8, 8),
    "distill.harmless_per_step": (0, 0),
    "distill.max_new_tokens": (512, 512),
    "distill.decay": (1.0, 1.0),
    "distill.precision": ("bfloat16", "bfloat16"),
    "distill.lr": (1e-5, 1e-6),
    "distill.warmup": (0.1, 0.1),
    "distill.weight_decay": (0.0, 0.0),
    "distill.max_grad_norm": (1.0, 1.0),
    "distill.check_every": (0, 0),
}


def values(chosen: Recipe) -> dict:
    return {name: value for name, value, *_ in chosen.rows()}


@pytest.mark.parametrize(("place", "preset"), [(0, "paper-qwen"), (1, "paper-llama")])
def test_the_papers_presets_are_the_authors_scripts(place, preset):
    got = values(recipe(preset))
    assert {name: got[name] for name in PUBLISHED} == {name: both[place] for name, both in PUBLISHED.items()}
    assert got["preset"] == preset
    pairs = load_prompts()
    sizes = {name: len(pairs.split(name).harmful) for name in ("train", "val", "distill")}
    assert sizes == {"train": 128, "val": 32, "distill": 100}
    assert got["distill.n_steps"] * got["distill.harmful_per_step"] == sizes["distill"]  # one epoch
    assert got["distill.harmful_per_step"] * got["distill.n_rollouts"] == 32
    # T = 1 and top-p 1 are no settings: answers are sampled by the model's own probabilities.
    assert not [name for name in got if "temperature" in name or "top_p" in name]


def test_presets():
    assert recipe() == quick()
    qwen, llama = values(recipe("paper-qwen")), values(recipe("paper-llama"))
    different = {name for name, value in qwen.items() if value != llama[name]}
    assert different == {"preset", "tokens.horizon", "tokens.min_steered_prob", "distill.lr", "export.dtype"}
    assert values(recipe("paper")) == qwen | {"preset": "paper"}
    with pytest.raises(SafeSteerError, match="Unknown preset"):
        recipe("fancy")


@pytest.mark.parametrize(
    ("model_type", "preset"),
    [
        ("qwen2", "paper-qwen"),
        ("qwen3_moe", "paper-qwen"),
        ("llama", "paper-llama"),
        ("llama4_text", "paper-llama"),
        ("gemma2", "paper-qwen"),
    ],
)
def test_the_preset_paper_is_that_of_the_models_family(model_type, preset):
    assert for_family(recipe("paper"), model_type) == recipe(preset)
    changes = {"tokens.k": 10, "distill.lr": 3e-6, "tokens.seed": 42}
    want = recipe(preset, 7, **changes)
    assert for_family(recipe("paper", 7, **changes), model_type) == want
    assert want.tokens.seed == 42
    for named in ("quick", "paper-qwen", "paper-llama"):
        assert for_family(recipe(named), model_type) == recipe(named)


@pytest.mark.parametrize("key", ["tokens.horizon", "tokens.min_steered_prob", "distill.lr"])
def test_a_value_of_qwen_over_the_preset_paper_is_not_lost_on_a_llama(key):
    """Whether it was named could not be told later."""
    value = values(recipe("paper-qwen"))[key]
    for written in (value, str(value)):
        with pytest.raises(SafeSteerError, match=f"{key}=.* use the preset 'paper-qwen' or 'paper-llama'"):
            recipe("paper", **{key: written})
        assert recipe("paper-qwen", **{key: written}) == recipe("paper-qwen")


def test_every_setting_says_what_it_means():
    rows = list(recipe().rows())
    assert len({name for name, *_ in rows}) == len(rows) > 60
    for name, _, _, description in rows:
        assert description.endswith((".", ",", "and")) or len(description) > 20, name
    assert {kind.__name__ for kind in SECTIONS.values()} <= set(dir(every_setting))


def test_a_recipe_file_is_read_as_it_was_written(tmp_path):
    for preset in PRESETS:
        written = recipe(preset, seed=5, **{"direction.n_val": "none", "distill.splits": "distill"})
        written.save(tmp_path / "r.toml")
        # With every value in it, a file leaves nothing to the model's family.
        assert Recipe.load(tmp_path / "r.toml") == for_family(written)
    assert "# Size of S. [tokens]" in (tmp_path / "r.toml").read_text()


def test_the_seed_of_a_written_recipe_is_that_of_every_stage(tmp_path):
    """One line of the file changes it; a stage with a seed of its own keeps that."""
    path = tmp_path / "r.toml"
    recipe(seed=5, **{"tokens.seed": 8}).save(path)
    path.write_text(path.read_text().replace("\nseed = 5\n", "\nseed = 3\n", 1))
    assert Recipe.load(path) == recipe(seed=3, **{"tokens.seed": 8})


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
