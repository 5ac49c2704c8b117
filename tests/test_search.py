"""The search on a tiny model: resumed, ended early, corrected, and a recipe that repeats its trial."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_pipeline import SMALL, model_folder  # noqa: F401

import safesteer as ss
from conftest import assert_near, n_hooks, naive_kl
from safesteer._errors import SafeSteerError
from safesteer.alignment import align
from safesteer.directions import finding
from safesteer.directions.finding import find_direction
from safesteer.evaluation.ledger import looks
from safesteer.models.generation import generate, greedy_ids
from safesteer.prompts.prompt_set import PromptSet
from safesteer.recipes import Recipe, recipe
from safesteer.run_folder import Run
from safesteer.searching import shared
from safesteer.searching import study as study_module
from safesteer.searching.choosing import pick_trial
from safesteer.searching.ranking import Outcomes, corrected, dominated_by, front, goes_on, knee
from safesteer.searching.records import finished_trials, import_optuna, open_study
from safesteer.searching.shared import Shared, are_twins, drawn_val
from safesteer.searching.space import SPACE, Range, resolve_space, starting_point, with_settings
from safesteer.searching.study import search

QUIET = Console(quiet=True)
SMALLER = SMALL | {"distill.n_steps": 3, "evaluate.max_new_tokens": 3, "distill.watch_every": 0}
N_TRIALS = 4


def odd(prompt: str, answer: str) -> bool:
    """A judge that tells answers of random models apart."""
    return len(answer) % 2 == 1


def small_prompts() -> PromptSet:
    """A few pairs of every split, with the test split, which a search must not read."""
    prompts = ss.load_prompts()
    parts = [prompts.split(name).first(n) for name, n in (("train", 6), ("val", 18), ("distill", 6))]
    test = prompts.split("test").first(3)
    return PromptSet(tuple(p for part in (*parts, test) for p in part.prompts), "small")


def searched(model, out, **options):
    options = {"n_trials": N_TRIALS, "prompts": small_prompts(), "judge": odd, "console": QUIET} | options
    return search(str(model), out, recipe(**SMALLER), **options)


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("search") / "search"
    searched(model_folder, out)
    return out


def trials(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "trials.csv", keep_default_na=True)


# --- the study ---


def test_every_trial_is_a_row_with_its_settings(folder):
    table = trials(folder)
    assert table.trial.tolist() == list(range(N_TRIALS))
    assert set(table.state) <= {"complete", "ended", "failed"}
    space = resolve_space(SPACE, recipe(**SMALLER))
    for entry in space:
        values = table[entry.name]
        assert values.between(entry.low * 0.99, entry.high * 1.01).all(), entry.name
        assert values.nunique() > 1, entry.name
    complete = table[table.state == "complete"].set_index("trial")
    assert len(complete) > 1
    assert (complete.n_pairs == 18).all()
    for number, row in complete.iterrows():
        measured = json.loads((folder / "trials" / f"{number:03d}.json").read_text())["measured"]
        for label, rate in (("harmful", row.harmful), ("harmless", row.over_refusal)):
            assert measured[label] == [odd("", answer) for answer in measured[f"{label}_answers"]]
            assert len(measured[label]) == 18
            assert rate == pytest.approx(sum(measured[label]) / 18)
        assert len(measured["kls"]) == 18
        assert row.kl == pytest.approx(sum(measured["kls"]) / 18)
    for column in ("harmful", "over_refusal", "kl"):  # numbers that are all alike would hide a mix-up
        assert complete[column].nunique() > 1
    assert (complete.harmful != complete.over_refusal).any()


def test_the_first_trial_is_the_recipe_as_it_is(folder):
    first, start = trials(folder).iloc[0], recipe(**SMALLER)
    assert first["distill.lr"] == start.distill.lr
    assert first["distill.n_steps"] == start.distill.n_steps
    assert first["direction.max_layer_share"] == start.direction.max_layer_share


def test_the_test_split_is_sealed_and_looks_at_val_are_noted(folder, model_folder, tmp_path):  # noqa: F811
    table = looks(folder)
    assert set(table.split) == {"val"}
    assert {"search: base", "search: trial 0"} <= set(table.why)
    seen = []

    def judge(prompt, answer):
        seen.append(prompt)
        return odd(prompt, answer)

    prompts = small_prompts()
    searched(model_folder, tmp_path / "s", n_trials=1, judge=judge, prompts=prompts)
    assert not set(seen) & set(prompts.split("test").harmful + prompts.split("test").harmless)
    without = PromptSet(tuple(p for p in prompts.prompts if p.split != "test"), "without")
    searched(model_folder, tmp_path / "w", n_trials=1, prompts=without)


def test_the_recipe_is_taken_as_it_is_and_repeats_its_trial(folder, model_folder, tmp_path):  # noqa: F811
    """Direction, S and history of `align` are those of the trial; val is not trained on."""
    chosen = Recipe.load(folder / "recipe.toml")
    assert "val" not in chosen.distill.splits
    out = align(
        str(model_folder),
        tmp_path / "run",
        chosen,
        prompts=small_prompts(),
        judge=odd,
        stages=("direction", "tokens", "distill", "export"),
        console=QUIET,
    )
    table = trials(folder)
    page = (folder / "search.html").read_text()
    number = next(t["trial"] for t in data_of(page)["trials"] if t["chosen"])
    record = json.loads((folder / "trials" / f"{number:03d}.json").read_text())
    run = Run(out, str(model_folder), chosen, small_prompts(), odd, odd, QUIET)
    base = run.load_base()
    assert repr(run.load_direction(base)) == record["direction"]
    assert [t.text for t in run.load_tokens().tokens] == record["tokens"]
    val = drawn_val(small_prompts(), chosen.seed)
    student, measured = run.load_student(), record["measured"]
    of_base = json.loads((folder / "trials" / "base.json").read_text())["measured"]
    answers = generate(student, val.harmful, max_new_tokens=SMALLER["evaluate.max_new_tokens"])
    assert measured["harmful_answers"] == answers != of_base["harmful_answers"]
    said = zip(val.harmless, greedy_ids(base, val.harmless, chosen.evaluate.n_kl_tokens), strict=True)
    kls = [naive_kl(base, student, prompt, ids) for prompt, ids in said]
    assert measured["kls"] == pytest.approx(kls, rel=0.01)
    assert table.set_index("trial").kl[number] == pytest.approx(sum(kls) / len(kls), rel=1e-3)


def test_a_search_that_is_cut_off_repeats_an_uninterrupted_one(folder, model_folder, tmp_path, monkeypatch):  # noqa: F811
    real, n = study_module.try_settings, []

    def dies(*args, **options):
        n.append(1)
        if len(n) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(study_module, "try_settings", dies)
    with pytest.raises(KeyboardInterrupt):
        searched(model_folder, tmp_path / "s")
    monkeypatch.setattr(study_module, "try_settings", real)
    searched(model_folder, tmp_path / "s")
    again, whole = trials(tmp_path / "s"), trials(folder)
    assert again.state.tolist().count("interrupted") == 1
    assert again[again.state == "interrupted"].reason.item() == "tried again in a later trial"
    finished = again[again.state != "interrupted"].reset_index(drop=True)
    names = [*(e.name for e in SPACE), "state", "harmful", "over_refusal", "kl"]
    pd.testing.assert_frame_equal(finished[names], whole[names])


def test_what_is_drawn_depends_on_the_trials_that_are_finished_alone(tmp_path):
    """Also where the sampler learns from them: a study that is cut off at any trial draws the same."""
    space, optuna = resolve_space(SPACE, recipe()), import_optuna()

    def drawn(folder, cut: tuple[int, ...]) -> list[dict]:
        study, params = open_study(folder), []
        while (done := len(finished_trials(study))) < 14:
            trial = study_module._ask(study, space, 3, done)
            if done in cut and len(study.trials) == done + 1:
                study = open_study(folder)  # as after a kill
                continue
            params.append(trial.params)
            if done % 4 == 3:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                lr = trial.params["distill.lr"]
                study.tell(trial, (lr, lr**2, trial.params["direction.coeff"]))
        return params

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = drawn(tmp_path / "whole", ())
    assert len({json.dumps(params) for params in whole}) == 14
    assert drawn(tmp_path / "cut", (12,)) == whole


def test_a_finished_search_goes_on_with_more_trials_and_keeps_the_others(model_folder, tmp_path):  # noqa: F811
    space = [entry for entry in SPACE if entry.name == "distill.lr"]
    searched(model_folder, tmp_path / "s", n_trials=1, space=space)
    before = trials(tmp_path / "s")
    searched(model_folder, tmp_path / "s", n_trials=2, space=space)
    after = trials(tmp_path / "s")
    assert len(after) == 2
    pd.testing.assert_frame_equal(after.head(1)[before.columns], before, check_dtype=False)
    with pytest.raises(SafeSteerError, match="a search with another space"):
        searched(model_folder, tmp_path / "s", n_trials=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thing").touch()
    with pytest.raises(SafeSteerError, match="holds no search"):
        searched(model_folder, tmp_path / "other")


def test_a_trial_that_fails_or_is_ended_keeps_its_reason(model_folder, tmp_path, monkeypatch):  # noqa: F811
    """A threshold that nothing reaches fails trials; a look that says no ends them."""
    never = [Range("tokens.min_steered_prob", 0.999, 1.0, "no token is as likely")]
    with pytest.raises(SafeSteerError, match=r"None of the 2 trials .* trials\.csv says why"):
        searched(model_folder, tmp_path / "s", n_trials=2, space=never)
    table = trials(tmp_path / "s")
    assert table.state.tolist() == ["failed", "failed"]
    assert table.reason.str.contains("No token has a mean steered probability").all()
    asked = []
    monkeypatch.setattr(
        study_module, "goes_on", lambda losses, others: asked.append(others) or len(asked) < 3
    )
    lr = [Range("distill.lr", 1e-4, 1e-3, "faster", log=True)]
    searched(model_folder, tmp_path / "e", n_trials=2, space=lr)
    table = trials(tmp_path / "e")
    assert table.state.tolist() == ["complete", "ended"]
    assert table.reason[1] == "among the worse half after 33% of the steps, on 8 val prompts of each kind"
    assert table.n_pairs.tolist() == [18, 8]
    assert [len(others) for others in asked] == [0, 0, 1]
    assert not (tmp_path / "e" / "trials" / "001.json").exists()


def test_an_adapter_leaves_the_base_as_it_was(tiny_llama, tmp_path):
    pytest.importorskip("peft")
    before, hooks = {n: p.clone() for n, p in tiny_llama.model.named_parameters()}, n_hooks(tiny_llama.model)
    lr = [Range("distill.lr", 1e-3, 1e-2, "faster", log=True)]
    small = recipe(**SMALLER | {"distill.lora_rank": 2})
    search(
        tiny_llama,
        tmp_path / "s",
        small,
        n_trials=2,
        space=lr,
        prompts=small_prompts(),
        judge=odd,
        console=QUIET,
    )
    assert dict(tiny_llama.model.named_parameters()).keys() == before.keys()
    assert all((p == before[n]).all() for n, p in tiny_llama.model.named_parameters())
    assert n_hooks(tiny_llama.model) == hooks
    assert (trials(tmp_path / "s").kl > 0).all()


def test_what_a_search_cannot_do_is_said_before_any_work(tiny_llama, tmp_path, monkeypatch):
    def fails(sentence, settings=None, **options):
        with pytest.raises(SafeSteerError, match=sentence):
            search(tiny_llama, tmp_path / "s", recipe(**(settings or {})), console=QUIET, **options)
        assert not (tmp_path / "s").exists()

    fails("Unknown setting 'distill.rate'", space=[Range("distill.rate", 0, 1, "")])
    fails("range of distill.lr from 0.01 to 0.001 is empty", space=[Range("distill.lr", 0.01, 0.001, "")])
    fails("distill.decay must be at most 1", space=[Range("distill.decay", 0.5, 2.0, "")])
    fails(
        "coeff is None, so there are no multiples", space=[Range("direction.coeff", 1, 2, "", relative=True)]
    )
    fails("varies distill.lr twice", space=[SPACE[-1], SPACE[-1]])
    fails("no setting to vary", space=[])
    fails("nothing is left to train on", {"distill.splits": "val"})
    fails("at least one trial", n_trials=0)
    fails("leave out distill.sharded", {"distill.sharded": True})
    fails("leave out direction.file", {"direction.file": "own.safetensors"})
    fails("give them to load_model", {"template": "raw"})
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    fails(r"needs optuna: pip install 'safesteer\[search\]'")


# --- the space ---


@pytest.mark.parametrize("preset", ["quick", "two-sided", "paper-qwen"])
def test_the_space_fits_every_preset(preset):
    start = recipe(preset)
    space = resolve_space(SPACE, start)
    assert all(entry.reason and entry.low < entry.high and not entry.relative for entry in space)
    point = starting_point(space, start)
    assert {"distill.lr", "distill.n_steps", "tokens.k"} <= point.keys()
    assert with_settings(start, point) == start


@pytest.mark.parametrize("extraction", ["prefill", "instruction"])
def test_what_trials_share_is_what_the_stages_make(tiny_llama, monkeypatch, extraction):
    """For every coefficient and range of layers; candidates are read once and scored once per coefficient."""
    monkeypatch.setattr(finding, "filter_by_refusal", lambda chat, prompts, ids: prompts)
    prompts = small_prompts()
    config = ss.DirectionConfig(
        extraction=extraction, n_train=6, n_val=3, n_compare_prompts=2, max_kl=1e9, min_steering=-1e9
    )
    reading = finding.read_candidates(tiny_llama, prompts, config, odd)
    val = drawn_val(prompts, 0)
    measured = study_module.measure(
        tiny_llama, tiny_llama, val.first(1), ss.EvaluateConfig(max_new_tokens=1), odd
    )
    both = Shared(tiny_llama, prompts, val, reading, measured, [], 1.0, odd)
    scored, real = [], shared.sweep
    monkeypatch.setattr(shared, "sweep", lambda *args: scored.append(args) or real(*args))
    small = ss.TokenConfig(k=5, horizon=2, n_samples=1, min_steered_prob=1e-4)
    for coeff in (None, 1.4, None):
        for share in (0.6, 1.0):
            asked = replace(config, coeff=coeff, max_layer_share=share)
            direction = shared.shared_direction(both, asked)
            want = find_direction(tiny_llama, prompts, asked, judge=odd)
            assert direction.metadata == want.metadata
            assert_near(direction.vector, want.vector)
            for k in (5, 3):
                tokens = shared.shared_tokens(both, direction, replace(small, k=k))
                alone = ss.select_tokens(tiny_llama, want, prompts.split("val").harmless, replace(small, k=k))
                assert tokens.ids.tolist() == alone.ids.tolist()
    assert len(scored) == 2
    wide, args = next(made for asked, made in both.sweeps.items() if asked.coeff == 1.4), scored[1]
    for share, n_layers in ((0.3, 1), (0.6, 2), (1.0, 3)):
        kept = real(*args[:4], replace(args[4], max_layer_share=share)).table.kept
        narrow = wide.up_to(share).table
        assert narrow.kept.tolist() == kept.tolist()
        assert not narrow.kept[narrow.layer >= n_layers].any()
    assert wide.table.kept[wide.table.layer == 2].any()
    assert len(both.sampled) <= shared.N_SAMPLED
    # A range of the user's own may vary what is swept and sampled, too.
    for changed in ({"horizon": 1}, {"horizon": 3}, {"n_samples": 2}, {"prompts": "harmful"}, {"seed": 5}):
        settings = replace(small, **changed)
        texts = prompts.split("val").texts(settings.prompts)
        alone = ss.select_tokens(tiny_llama, want, texts, settings)
        assert shared.shared_tokens(both, want, settings).ids.tolist() == alone.ids.tolist()
    strict = replace(config, coeff=1.4, max_kl=0.0, rank_by="ablation")
    with pytest.raises(SafeSteerError, match="candidate"):
        shared.shared_direction(both, strict)


def test_val_is_drawn_pair_by_pair(pairs):
    val = pairs.split("val")
    drawn = drawn_val(pairs, 3)
    assert are_twins(val)
    assert are_twins(drawn)
    assert sorted(drawn.harmful) == sorted(val.harmful)
    assert drawn.harmful != val.harmful
    assert drawn.harmful != drawn_val(pairs, 4).harmful
    mine = PromptSet(tuple(replace(p, pair="") for p in val.prompts), "mine")
    assert not are_twins(mine)


# --- the front, the knee, the halving, the correction ---


def test_the_front_is_what_no_other_beats():
    losses = np.random.default_rng(0).random((40, 3))
    want = [not any((o <= x).all() and (o < x).any() for o in losses) for x in losses]
    assert front(losses).tolist() == want
    assert not dominated_by(np.ones((3, 3))).any()  # equal trials do not beat each other
    assert front(losses)[knee(losses)]


def test_half_of_the_trials_go_on_at_a_look():
    chain = [[x, x, x] for x in np.linspace(0, 1, 9)]
    alone = [goes_on(losses, [o for o in chain if o is not losses]) for losses in chain]
    assert alone == [True] * 5 + [False] * 4
    assert goes_on([9.0, 9.0, 9.0], chain[:3])  # too few to compare with
    assert goes_on([9.0, 9.0, -1.0], chain)  # better in one of three


def noisy(rng, rates, n=32) -> Outcomes:
    """Trials whose true refusal rates are known; nothing else differs."""
    harmful = (rng.random((len(rates), n)) < np.array(rates)[:, None]).astype(float)
    same = np.full((len(rates), n), 0.1)
    return Outcomes(harmful, same, same, True)


def test_the_luck_of_the_best_of_equal_trials_is_taken_back():
    """Thirty trials that all refuse half: the best of them looks far better than it is."""
    rng, apparent, worth = np.random.default_rng(0), [], []
    for _ in range(30):
        rows = corrected(noisy(rng, [0.5] * 30), n_draws=200).set_index(["rule", "objective"])
        row = rows.loc[("most harmful refused", "harmful")]
        apparent.append(row.on_val)
        worth.append(row.corrected)
    assert np.mean(apparent) - 0.5 > 0.15
    assert abs(np.mean(worth) - 0.5) < 0.4 * (np.mean(apparent) - 0.5)


def test_a_clear_winner_has_little_luck():
    outcomes = noisy(np.random.default_rng(1), [0.95, *[0.3] * 10])
    table = corrected(outcomes, n_draws=500)
    row = table.set_index(["rule", "objective"]).loc[("most harmful refused", "harmful")]
    assert row.trial == 0
    assert abs(row.optimism) < 0.02
    assert row.low < row.corrected < row.high
    assert table.optimism[table.objective == "kl"].abs().max() < 1e-12  # all the same: no luck
    again = corrected(outcomes, n_draws=500)
    pd.testing.assert_frame_equal(table, again)


# --- the choice and the page ---


def data_of(page: str) -> dict:
    text = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(text)


def test_another_trial_can_be_picked(folder, tmp_path):
    table = trials(folder)
    number = int(table[table.state == "complete"].trial.max())
    before = (folder / "recipe.toml").read_text()
    path = pick_trial(folder, number)
    row = table.set_index("trial").loc[number]
    chosen = {name: value for name, value, *_ in Recipe.load(path).rows()}
    assert all(chosen[entry.name] == pytest.approx(row[entry.name]) for entry in SPACE)
    assert [t["trial"] for t in data_of((folder / "search.html").read_text())["trials"] if t["chosen"]] == [
        number
    ]
    pick_trial(folder)
    assert (folder / "recipe.toml").read_text() == before
    with pytest.raises(SafeSteerError, match="Trial 99 is not complete, so it cannot be picked: pick one of"):
        pick_trial(folder, 99)
    with pytest.raises(SafeSteerError, match="holds no search"):
        pick_trial(tmp_path)


def test_a_damaged_study_is_one_sentence(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "s")
    (tmp_path / "s" / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(SafeSteerError, match="is not a study that this version of Optuna can read"):
        pick_trial(tmp_path / "s")


def test_the_page_holds_every_trial_and_some_answers(folder):
    page = (folder / "search.html").read_text()
    assert "Content-Security-Policy" in page
    data = data_of(page)
    assert len(data["trials"]) == N_TRIALS
    complete = [t for t in data["trials"] if t["state"] == "complete"]
    assert data["answers"].keys() == data["made"].keys() == {str(t["trial"]) for t in complete}
    rows = data["answers"][str(complete[0]["trial"])]
    assert [r["label"] for r in rows] == ["harmful"] * 4 + ["harmless"] * 4
    assert {r["rule"] for r in data["luck"]} >= {"the knee", "most harmful refused"}
    points = [n for trace in data["figure"]["data"] for n in trace.get("customdata", [])]
    assert sorted(points) == [t["trial"] for t in complete]


def test_the_command_searches_and_picks(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from safesteer.cli import app
    from safesteer.searching import choosing

    calls = []
    monkeypatch.setattr(
        study_module, "search", lambda *a, **o: calls.append((a, o)) or tmp_path / "recipe.toml"
    )
    monkeypatch.setattr(choosing, "pick_trial", lambda *a: calls.append(a) or tmp_path / "recipe.toml")
    options = [
        "--out",
        str(tmp_path),
        "--trials",
        "5",
        "--set",
        "distill.lr=1e-4",
        "--set",
        "distill.decay=0.5",
    ]
    done = CliRunner().invoke(app, ["search", "some/model", *options])
    assert done.exit_code == 0, done.output
    (model, out, chosen), options = calls[0]
    assert (model, out, chosen.distill.lr, options["n_trials"]) == ("some/model", tmp_path, 1e-4, 5)
    assert [e.name for e in options["space"]] == [e.name for e in SPACE if e.name != "distill.lr"]
    assert f"--recipe {tmp_path / 'recipe.toml'}" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["search", "some/model", "--out", str(tmp_path), "--pick", "3"])
    assert done.exit_code == 0, done.output
    assert calls[1] == (tmp_path, 3)
