"""Stage 1 as one call, with each form of a model that people have at hand."""

from dataclasses import fields, replace

import pytest
import torch
from conformance.families import build

from conftest import assert_near, random_vector
from safesteer._errors import SafeSteerError
from safesteer.directions import finding
from safesteer.directions.calibration import ANSWER_TOKENS
from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import prefill_contrast
from safesteer.directions.finding import find_direction
from safesteer.directions.inspection import component_contributions
from safesteer.directions.sweeping import sweep
from safesteer.models.bridge import to_bridge
from safesteer.models.generation import generate
from safesteer.settings import DirectionConfig
from safesteer.steering.direction import Direction

CONFIG = DirectionConfig(n_train=4, n_val=3, n_compare_prompts=2, n_compared=1, extraction="prefill")
REFUSAL_IDS = torch.tensor([7, 40, 90])


def refuses_nothing(prompt: str, answer: str) -> bool:
    return False


@pytest.fixture(params=["chat", "bridge", "pair"])
def model(request, tiny_llama, bridges):
    """The same model as a ChatModel, a TransformerBridge and (model, tokenizer)."""
    pair = (tiny_llama.model, tiny_llama.tokenizer)
    return {"chat": tiny_llama, "bridge": bridges["tiny-llama"].model, "pair": pair}[request.param]


@pytest.fixture(scope="module")
def expected(tiny_llama):
    return find_direction(tiny_llama, config=CONFIG, judge=refuses_nothing)


def test_a_direction_is_read_from_every_form_of_a_model(model, expected, tiny_llama):
    direction = find_direction(model, config=CONFIG, judge=refuses_nothing)
    direction.check(tiny_llama)
    assert (direction.layer, direction.coeff) == (expected.layer, expected.coeff)
    assert_near(direction.vector, expected.vector)
    assert direction.native_share == expected.native_share


def test_every_form_of_a_model_is_swept(model, tiny_llama, few):
    candidates = prefill_contrast(model, few)
    table = sweep(model, candidates, few, REFUSAL_IDS, CONFIG).table
    want = sweep(tiny_llama, prefill_contrast(tiny_llama, few), few, REFUSAL_IDS, CONFIG).table
    for name in ("ablation_refusal", "steering_refusal", "kl_harmless"):
        assert table[name].to_numpy() == pytest.approx(want[name].to_numpy(), abs=1e-3, nan_ok=True)
    assert table.kept.tolist() == want.kept.tolist()


def test_contributions_are_read_from_every_form_of_a_model(model, tiny_llama, direction, few):
    table = component_contributions(model, direction, few.first(2))
    want = component_contributions(tiny_llama, direction, few.first(2))
    assert table.component.tolist() == want.component.tolist()
    assert table.difference.tolist() == pytest.approx(want.difference.tolist(), abs=1e-4)


def test_experts_that_return_their_scores_too_are_read(few):
    chat = build("gpt-oss")
    direction = Direction(random_vector(chat.d_model), 1, "-1", "given")
    assert set(component_contributions(chat, direction, few.first(2)).kind) == {"embed", "head", "mlp"}


def test_a_found_direction_carries_what_it_was_chosen_from(expected, tmp_path):
    """It saves as a plain direction, and shows the sweep."""
    assert isinstance(expected.sweep.candidates, Candidates)
    assert expected.rates.layer.tolist() == [expected.layer] * 4  # nothing refuses: all coefficients
    assert expected.coeff == expected.rates["coeff"].min()
    assert not expected.refusal_tokens.learnt
    assert "prefill contrast" in expected.story()[1]
    assert "<table" in expected._repr_html_()
    expected.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert type(again) is Direction
    assert again.metadata == {
        f.name: getattr(expected, f.name) for f in fields(Direction) if f.name != "vector"
    }
    stronger = expected.with_coeff(3.0)
    assert (stronger.coeff, stronger.sweep) == (3.0, expected.sweep)


def test_a_given_coefficient_needs_no_answers(tiny_llama, expected):
    shares = []
    config = DirectionConfig(n_train=4, n_val=3, extraction="prefill", coeff=0.7)
    direction = find_direction(tiny_llama, config=config, judge=refuses_nothing, progress=shares.append)
    assert (direction.coeff, direction.rates) == (0.7, None)
    assert direction.layer == int(direction.sweep.best.layer)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


AUTO = DirectionConfig(
    n_train=4, n_val=3, n_compare_prompts=2, n_compared=1, n_held_out=0, max_kl=1e9, min_steering=-1e9
)


@pytest.mark.parametrize("native_share", [0.5, 0.5001])
def test_whether_a_model_refuses_is_read_from_its_answers(tiny_llama, pairs, monkeypatch, native_share):
    """The difference of means from the share on that is asked for, whatever a first token says."""
    harmful = pairs.split("val").harmful
    answers = dict(zip(harmful, generate(tiny_llama, harmful, max_new_tokens=ANSWER_TOKENS), strict=True))
    half = set(harmful[::2])

    def refuses_half(prompt, answer):
        return prompt in half and answer == answers[prompt]

    monkeypatch.setattr(finding, "filter_by_refusal", lambda chat, prompts, ids: prompts)
    config = replace(AUTO, native_share=native_share)
    direction = find_direction(tiny_llama, config=config, judge=refuses_half)
    assert direction.native_share == 0.5
    assert direction.extraction == ("instruction" if native_share == 0.5 else "prefill")
    assert "refuses 50% of harmful val prompts by itself" in direction.story()[1]


@pytest.mark.parametrize(("passing", "n_harmful"), [(0, (20, 32)), (7, (20, 32)), (8, (8, 8))])
def test_a_refusing_model_of_which_few_first_tokens_say_so(tiny_llama, monkeypatch, passing, n_harmful):
    """The published filter would leave too few prompts: 'auto' takes all, 'instruction' does as published."""

    def some_pass(chat, prompts, ids):
        if not passing:
            raise SafeSteerError("The difference of means needs both.")
        return prompts.first(passing)

    monkeypatch.setattr(finding, "filter_by_refusal", some_pass)
    config = replace(AUTO, n_train=20, n_val=None)
    direction = find_direction(tiny_llama, config=config, judge=lambda prompt, answer: True)
    assert (direction.native_share, direction.extraction) == (1.0, "instruction")
    assert direction.n_harmful == n_harmful
    assert f"from {n_harmful[0]} harmful prompts, scored on {n_harmful[1]}" in direction.story()[1]
    if passing:
        published = replace(config, extraction="instruction")
        assert find_direction(tiny_llama, config=published, judge=refuses_nothing).n_harmful == (passing,) * 2


def test_prompts_that_are_scored_are_those_that_pass_the_filter(tiny_llama, pairs, monkeypatch):
    """The first of those that pass, not those that pass of the first."""
    seen, val = {}, pairs.split("val").across(None)

    def passing(chat, prompts, ids):
        return prompts.after(len(prompts.harmful) // 2)

    def scored(chat, candidates, prompts, ids, config, *, held_out, progress):
        seen.update(scored=prompts, held_out=held_out)
        return sweep(chat, candidates, prompts, ids, config, held_out=held_out, progress=progress)

    monkeypatch.setattr(finding, "filter_by_refusal", passing)
    monkeypatch.setattr(finding, "sweep", scored)
    find_direction(tiny_llama, config=replace(AUTO, extraction="instruction"), judge=refuses_nothing)
    assert seen["scored"].harmful == val.harmful[16:19]
    assert seen["held_out"].harmless == val.harmless[19:]


def test_a_model_that_does_not_refuse_is_read_by_prefill(tiny_llama):
    direction = find_direction(tiny_llama, config=AUTO, judge=refuses_nothing)
    assert (direction.native_share, direction.extraction) == (0.0, "prefill")
    never = DirectionConfig(n_train=4, n_val=3, extraction="instruction")
    with pytest.raises(SafeSteerError, match="difference of means needs both"):
        find_direction(tiny_llama, config=never, judge=refuses_nothing)


def test_a_model_that_transformer_lens_does_not_know_has_a_direction():
    chat = build("helium")
    with pytest.raises(SafeSteerError, match="cannot bridge"):
        to_bridge(chat)
    find_direction(chat, config=CONFIG, judge=refuses_nothing).check(chat)


@pytest.fixture
def own_file(tiny_llama, direction, tmp_path):
    """A direction of one's own, whose coefficient no table of coefficients holds."""
    own = replace(direction, coeff=2.3)
    own.check(tiny_llama)
    own.save(tmp_path / "own.safetensors")
    return own, str(tmp_path / "own.safetensors")


def test_a_direction_of_ones_own_is_scored_and_taken_as_it_is(tiny_llama, own_file):
    own, file = own_file
    found = find_direction(tiny_llama, config=replace(CONFIG, file=file), judge=refuses_nothing)
    assert found.metadata == own.metadata
    assert torch.equal(found.vector, own.vector)
    scored = found.sweep.table.dropna(subset=["steering_refusal"])
    assert scored[["layer", "position"]].values.tolist() == [[own.layer, own.position]]
    assert "a direction of your own, scored on 3" in found.story()[1]


def test_the_coefficient_of_the_settings_goes_before_that_of_the_file(tiny_llama, own_file):
    config = replace(CONFIG, file=own_file[1], coeff=0.7)
    assert find_direction(tiny_llama, config=config, judge=refuses_nothing).coeff == 0.7


def test_thresholds_act_on_a_direction_of_ones_own_where_they_are_asked_for(tiny_llama, own_file):
    config = replace(CONFIG, file=own_file[1], rank_by="ablation", max_kl=0.0)
    with pytest.raises(SafeSteerError, match=r"No candidate passed.*KL"):
        find_direction(tiny_llama, config=config, judge=refuses_nothing)


def test_a_file_that_cannot_make_a_teacher_is_refused(tiny_llama, tiny_qwen2, own_file, tmp_path):
    own, file = own_file
    with pytest.raises(SafeSteerError, match=r"own\.safetensors"):
        find_direction(tiny_qwen2, config=replace(CONFIG, file=file), judge=refuses_nothing)
    replace(own, operation="ablate").save(tmp_path / "ablate.safetensors")
    config = replace(CONFIG, file=str(tmp_path / "ablate.safetensors"))
    with pytest.raises(SafeSteerError, match="operation 'ablate'"):
        find_direction(tiny_llama, config=config, judge=refuses_nothing)
    replace(own, coeff=-1.5).save(tmp_path / "negative.safetensors")
    config = replace(CONFIG, file=str(tmp_path / "negative.safetensors"))
    with pytest.raises(SafeSteerError, match=r"holds the coefficient -1\.5"):
        find_direction(tiny_llama, config=config, judge=refuses_nothing)
