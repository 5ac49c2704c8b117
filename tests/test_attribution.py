"""Token attribution: alignment and parts against naive loops, planted examples, hostile text."""

import html
import json
from dataclasses import asdict, replace
from math import isclose, log
from statistics import median

import pandas as pd
import pytest
import torch
from rich.console import Console

from conftest import PROMPTS, assert_near, batch_of, naive_logits, random_vector
from safesteer._errors import SafeSteerError
from safesteer._token_text import readable, running, token_text, visible
from safesteer.attribution.coverage import (
    Controls,
    StepSums,
    matched_sets,
    read_answers,
    sum_by_step,
    text_coverage,
)
from safesteer.attribution.explanation import explain, pick_traces
from safesteer.attribution.result import Attribution
from safesteer.attribution.stability import jaccard, measure_stability
from safesteer.attribution.stories import logit_parts, neighbours, token_stories
from safesteer.attribution.tracing import trace
from safesteer.attribution.votes import allowed_ids, subset_means, subset_rankings
from safesteer.attribution.word_groups import GROUPS, NO_RULE, by_cluster, group_of
from safesteer.models.batch import PromptBatch
from safesteer.models.head import output_head
from safesteer.models.parts import hf_model
from safesteer.prompts.prompt_set import load_prompts
from safesteer.report import direction_figures, figures
from safesteer.report.page import as_json, build_page, write_report
from safesteer.report.page_data import load_page_data
from safesteer.settings import ExplainConfig, TokenConfig
from safesteer.steering.direction import Direction, steer
from safesteer.tokens.sampling import AnswerStates, sample_answers
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenSet

CONFIG = TokenConfig(k=12, k_vote=20, horizon=4, n_samples=3, min_steered_prob=1e-4)
ANSWER = "I cannot help you with this. Naïve 🙂 text,\nin two lines."
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u202eevil\u202c \u2066x\u2069",
    "שלום עולם, مرحبا",
    "我不能帮助你",
    "👩‍👩‍👧 &amp; & \u2028 \x00 \x1b[31m",
    "{{data}} {{script}} ${x} \\u003c",
    "a" * 500,
)


def plain_direction(chat, coeff: float = 1.0) -> Direction:
    """A direction for any tiny model, at layer 1."""
    return Direction(random_vector(chat.d_model, seed=3), 1, "-1", "instruction", coeff)


@pytest.fixture(scope="module")
def sampled(tiny_llama, direction) -> AnswerStates:
    return sample_answers(tiny_llama, direction, PROMPTS, CONFIG)


@pytest.fixture(scope="module")
def chosen(tiny_llama, direction, sampled) -> TokenSet:
    return select_tokens(tiny_llama, direction, PROMPTS, CONFIG, sampled=sampled)


@pytest.fixture(scope="module")
def attribution(tiny_llama, direction, chosen, few) -> Attribution:
    config = ExplainConfig(n_prompts=4, n_harmful=3, max_tokens=10, n_sets=3, n_splits=3)
    return explain(tiny_llama, direction, chosen, tiny_llama, prompts=few, config=config)


def test_what_the_prompt_teacher_selected_is_read_with_its_samples(tiny_llama, direction, few):
    by_prompt = select_tokens(tiny_llama, direction, PROMPTS, replace(CONFIG, teacher="prompt"))
    config = ExplainConfig(n_prompts=4, n_harmful=3, n_traces=1, max_tokens=10, n_sets=2, n_splits=2)
    texts = explain(tiny_llama, direction, by_prompt, prompts=few, config=config).coverage.texts
    want = ["prompted samples, harmless prompts (as in selection)", "prompted samples, harmful prompts"]
    assert [text.name for text in texts][:2] == want


# Trace ---------------------------------------------------------------------------------------


def test_each_token_has_the_probability_that_the_position_before_it_gave(chat):
    direction = plain_direction(chat)
    tokens = select_tokens(chat, direction, PROMPTS, CONFIG)
    (got,) = trace(chat, direction, tokens, PROMPTS[:1], [ANSWER], chat)
    ids = chat.tokenizer(ANSWER, add_special_tokens=False).input_ids
    assert [t.id for t in got.tokens] == ids[:32]
    for t, token in enumerate(got.tokens):
        batch = PromptBatch.of(chat.tokenizer, PROMPTS[:1], [ids[:t]])  # what came before only
        base = naive_logits(chat, batch)[0, -1].log_softmax(-1)
        with steer(chat, direction):
            teacher = naive_logits(chat, batch)[0, -1].log_softmax(-1)
        assert_near(token.p_base, base[ids[t]].exp())
        assert_near(token.p_steered, teacher[ids[t]].exp())
        assert token.p_student == token.p_base
        assert token.rank_base == int((base > base[ids[t]]).sum()) + 1
        assert_near(token.lift, teacher[ids[t]] - base[ids[t]], 1e-3)
        assert [a.id for a in token.top_steered] == teacher.topk(5).indices.tolist()
        kl = float((teacher.exp() * (teacher - base)).sum())
        assert isclose(token.kl, kl, rel_tol=1e-3, abs_tol=1e-4)
        parts = teacher.exp() * (teacher - base) - teacher.exp() + base.exp()
        assert isclose(token.kl_share, float(parts[tokens.ids].sum()) / kl, abs_tol=1e-3)
        assert token.in_s == (ids[t] in tokens.ids.tolist())


def test_a_trace_without_a_student_or_without_a_token(tiny_llama, direction, chosen):
    first, empty = trace(tiny_llama, direction, chosen, PROMPTS[:2], [ANSWER, ""], max_tokens=3)
    assert len(first.tokens) == 3
    assert first.tokens[0].p_student is None
    assert first.tokens[0].top_student == ()
    assert empty.tokens == ()
    assert "student" not in first.to_frame().dropna(axis=1).columns


def test_a_trace_renders_in_a_notebook_and_a_terminal_without_markup(tiny_llama, direction, chosen):
    hostile = "<b>[red]hi</b>"
    (got,) = trace(tiny_llama, direction, chosen, [hostile], [hostile])
    page = got._repr_html_()
    assert "<b>[" not in page
    assert "&lt;" in page
    console = Console(width=120, record=True)
    console.print(got)
    assert "[red]" in console.export_text()


# Stories -----------------------------------------------------------------------------------------


def test_votes_of_the_story_are_the_votes_of_the_selection(tiny_llama, direction, sampled, chosen):
    everything = torch.ones((*sampled.valid.shape, 1), dtype=torch.bool)
    means = subset_means(tiny_llama, sampled, everything)
    allowed = allowed_ids(tiny_llama, means, CONFIG)
    stories = token_stories(tiny_llama, direction, chosen, sampled, allowed, k_vote=CONFIG.k_vote)
    assert list(stories) == chosen.ids.tolist()
    for token in chosen.tokens:
        story, best = stories[token.id], token.contexts[0]
        assert (story.votes, story.votes_by_position) == (token.votes, token.votes_by_position)
        assert sum(p.votes for p in story.votes_by_prompt) == token.votes
        assert story.group in GROUPS
        place = story.places[0]
        assert place.p_steered >= place.p_base
        assert story.lift > 0
        if best.p_steered - best.p_base == place.p_steered - place.p_base:
            assert place.answer_so_far == best.answer_so_far


def test_lift_and_ranks_of_a_story_are_those_of_the_models_own_probabilities(
    tiny_llama, direction, sampled, chosen
):
    """Base and steered model read each answer up to each counting position, one at a time."""
    allowed = torch.ones(tiny_llama.d_vocab, dtype=torch.bool)
    allowed[int(chosen.ids[0]) + 1 :: 2] = False  # other tokens take no part in the vote, but in the ranks
    stories = token_stories(tiny_llama, direction, chosen, sampled, allowed, k_vote=5)
    votes = {token: [] for token in chosen.ids.tolist()}
    for row, step in sampled.valid.nonzero().tolist():
        so_far = sampled.completion_ids[row, :step].tolist()
        batch = PromptBatch.of(tiny_llama.tokenizer, [sampled.prompts[row]], [so_far])
        base = naive_logits(tiny_llama, batch)[0, -1].double().softmax(-1)
        with steer(tiny_llama, direction):
            steered = naive_logits(tiny_llama, batch)[0, -1].double().softmax(-1)
        lift = (steered / base).log()
        for token in lift.masked_fill(~allowed, -torch.inf).topk(5).indices.tolist():
            if token in votes:
                ranks = [1 + int((p > p[token]).sum()) for p in (base, steered)]
                numbers = (float(lift[token]), float(base[token]), float(steered[token]), *ranks)
                votes[token].append((sampled.prompts[row], step + 1, *numbers))
    assert sum(len(voted) > 1 for voted in votes.values()) > 3
    for token, voted in votes.items():
        story = stories[token]
        assert story.votes == len(voted)
        if not voted:
            assert (story.lift, story.rank_base, story.rank_steered) == (None, None, None)
            continue
        _, _, *columns = zip(*voted, strict=True)
        means = [sum(column) / len(voted) for column in columns[:3]]
        assert (story.lift, story.p_base, story.p_steered) == pytest.approx(tuple(means), rel=1e-3)
        assert (story.rank_base, story.rank_steered) == tuple(median(column) for column in columns[3:])
        best = max(voted, key=lambda vote: vote[4] - vote[3])
        place = story.places[0]
        got = (place.p_base, place.p_steered, place.rank_base, place.rank_steered)
        assert (place.prompt, place.step) == best[:2]
        assert got == pytest.approx(best[3:], rel=1e-3)


def test_logit_parts_equal_the_plain_formula(chat):
    direction, ids = plain_direction(chat), torch.tensor([5, 17, 100])
    direct, change = logit_parts(chat, direction, ids, PROMPTS)
    norm, (weight, _, cap, _) = hf_model(chat.model).get_decoder().norm, output_head(chat.model)
    gain = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    n_real = len(chat.tokenizer)
    rows = weight[ids] - weight[:n_real].mean(0)
    want_direct, want_change = torch.zeros(3), torch.zeros(3)
    for prompt in PROMPTS:
        seen, logits = [], []
        hook = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0, -1]))
        logits.append(naive_logits(chat, batch_of(chat, [prompt]))[0, -1])
        with steer(chat, direction):
            logits.append(naive_logits(chat, batch_of(chat, [prompt]))[0, -1])
        hook.remove()
        raw = [z if cap is None else cap * torch.atanh(z / cap) for z in logits]
        moved = (raw[1] - raw[0])[:n_real]
        want_change += (moved[ids] - moved.mean()) / len(PROMPTS)
        rms = seen[1].pow(2).mean().sqrt()
        want_direct += rows @ (gain * direction.vector / rms) / len(PROMPTS)
    assert_near(direct, want_direct, 1e-3)
    assert_near(change, want_change, 1e-3)


def test_neighbours_are_real_tokens_nearest_by_cosine(tiny_qwen2):
    weight = output_head(tiny_qwen2.model)[0]
    nearest, _ = neighbours(tiny_qwen2, torch.tensor([40, 41]), 3)
    n_real = len(tiny_qwen2.tokenizer)
    cosine = torch.cosine_similarity(weight[40], weight[:n_real], dim=-1)
    cosine[40] = -1
    assert_near([c for _, c in nearest], cosine.topk(3).values)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        (" sorry", "starts a refusal"),
        ("Unfortunately", "starts a refusal"),
        (" illegal", "names the harm"),
        (" harmful", "names the harm"),
        (" However", "hedges"),
        ("\n\n", "format"),
        ("⟨E2 80⟩", "format"),
        (" banana", "other"),
    ],
)
def test_groups_follow_their_rules(text, group):
    assert group_of(text, [])[0] == group


def test_a_group_can_come_from_neighbours():
    near = [(" désolé", 0.9), (" sorry", 0.7), (" banana", 0.6)]
    group, reason = group_of(" perdón", near)
    assert (group, reason) == ("starts a refusal", "like its neighbour 'sorry' (cosine 0.70)")
    assert group_of(" perdón", [(" sorry", 0.3)])[0] == "other"


def test_a_group_can_come_from_the_user(attribution):
    by_text, by_id = list(attribution.stories.values())[:2]
    changed = attribution.with_groups({by_text.text.strip(): "hedges", by_id.id: "other"})
    story = changed.stories[by_text.id]
    assert (story.group, story.group_reason) == ("hedges", "your choice")
    assert changed.stories[by_id.id].group == "other"
    assert list(changed.stories) == list(attribution.stories)
    assert changed.coverage == attribution.coverage
    with pytest.raises(SafeSteerError, match="'nonsense'"):
        attribution.with_groups({"a": "nonsense"})


def test_a_group_for_a_token_outside_s_is_refused(attribution):
    with pytest.raises(SafeSteerError, match="'nonsense' is no token of S"):
        attribution.with_groups({"nonsense": "hedges"})


def test_a_trace_needs_an_answer_and_an_author_per_prompt(tiny_llama, direction, chosen):
    for answers, authors in (([], None), ("I cannot", None), (["I"], ["base", "student"])):
        with pytest.raises(SafeSteerError, match="one answer per prompt"):
            trace(tiny_llama, direction, chosen, ["Hello"], answers, authors=authors)


def test_tokens_of_s_keep_their_votes_below_the_threshold(tiny_llama, direction, chosen, few):
    """On fewer answers than selection read, a token's mean probability may fall below the threshold."""
    strict = {**chosen.settings, "min_steered_prob": 0.5}
    told = explain(tiny_llama, direction, replace(chosen, settings=strict), prompts=few)
    assert [story.votes for story in told.stories.values()].count(0) < len(chosen)


def test_matched_sets_stay_near_where_neighbours_run_out():
    p_base, everything = torch.linspace(0, 1, 500), torch.ones(500, dtype=torch.bool)
    ranking = torch.arange(499, 449, -1)  # all of them map to the same neighbours
    controls = Controls(everything, everything, n_sets=4)
    for drawn in matched_sets(ranking, len(ranking), p_base, controls):
        assert len(set(drawn.tolist())) == len(ranking)
        assert drawn.min() >= 400 - len(ranking)


def test_a_token_without_a_rule_takes_the_group_of_its_cluster():
    sorry, hedge = torch.tensor([1.0, 0.0, 0.1]), torch.tensor([0.0, 1.0, -0.1])
    contexts = torch.stack([sorry, sorry, hedge, sorry, hedge])
    named = (
        [("starts a refusal", "word list: sorry")] * 2
        + [("hedges", "word list: but")]
        + [
            ("other", NO_RULE),
            ("other", NO_RULE),
        ]
    )
    got = by_cluster(named, contexts, contexts)
    assert [g for g, _ in got] == ["starts a refusal"] * 2 + ["hedges", "starts a refusal", "other"]
    assert got[3][1] == "same context cluster as 2 tokens of this group"
    assert got[4][1] == NO_RULE  # one named peer is not enough


# Coverage ------------------------------------------------------------------------------------


def test_parts_add_up_to_the_whole_when_the_set_is_the_vocabulary(tiny_llama, sampled):
    n = tiny_llama.d_vocab
    everything = torch.ones(n, dtype=torch.bool)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    sums, controls = sum_by_step(tiny_llama, sampled), Controls(everything, everything, n_sets=2)
    coverage = text_coverage("x", sums, order, n, controls, (1, n))
    for curve in coverage.curves:
        if curve.name == "matched in base probability":
            continue  # nothing is left to match with
        for share in (curve.kl_share, curve.mass_teacher, curve.mass_base):
            assert isclose(share.mean[-1], 1, rel_tol=1e-4)
            assert share.mean[0] <= share.mean[-1]
    assert sum(s.n_positions for s in coverage.steps) == int(sampled.valid.sum())


def test_sums_by_step_equal_a_loop_over_positions(tiny_llama, direction):
    states = read_answers(tiny_llama, direction, PROMPTS[:3], [ANSWER, "Yes", ""], max_tokens=12)
    sums, want = sum_by_step(tiny_llama, states), 0.0
    assert states.prompts == PROMPTS[:2]
    for prompt, answer in zip(PROMPTS[:2], (ANSWER, "Yes"), strict=True):
        ids = tiny_llama.tokenizer(answer, add_special_tokens=False).input_ids[:12]
        batch = PromptBatch.of(tiny_llama.tokenizer, [prompt], [ids])
        at = slice(-len(ids) - 1, -1)
        base = naive_logits(tiny_llama, batch)[0, at].log_softmax(-1)
        with steer(tiny_llama, direction):
            teacher = naive_logits(tiny_llama, batch)[0, at].log_softmax(-1)
        want += float((teacher.exp() * (teacher - base)).sum())
    assert isclose(float(sums.kl.sum()), want, rel_tol=1e-3)


def test_a_planted_set_carries_more_than_its_controls():
    n, planted = 1000, torch.arange(100, 120)
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, n, generator=generator, dtype=torch.float64) + 0.1
    kl = torch.full((1, n), 1e-3, dtype=torch.float64)
    kl[0, planted] = 1.0
    sums = StepSums(kl, base, base, torch.tensor([10]))
    everything = torch.ones(n, dtype=torch.bool)
    coverage = text_coverage("x", sums, planted, 20, Controls(everything, everything), (5, 20))
    share = {c.name: c.kl_share.mean[-1] for c in coverage.curves}
    assert share["S"] == share["best possible"] == coverage.at_k("S") > 0.9
    assert max(v for k, v in share.items() if k.startswith(("random", "matched"))) < 0.1


def test_matched_sets_match_and_leave_the_set_alone():
    p_base = torch.logspace(-6, -1, 2000)
    ranking = torch.tensor([50, 1000, 1990])
    everything = torch.ones(2000, dtype=torch.bool)
    for matched in matched_sets(ranking, 3, p_base, Controls(everything, everything, n_sets=4)):
        assert not set(matched.tolist()) & set(ranking.tolist())
        assert len(set(matched.tolist())) == 3
        for p, p_matched in zip(p_base[ranking], p_base[matched], strict=True):
            assert abs(log(float(p / p_matched))) < 0.3


# Stability -----------------------------------------------------------------------------------


def test_the_ranking_of_all_positions_is_the_selection(tiny_llama, sampled, chosen):
    everything = torch.ones((*sampled.valid.shape, 1), dtype=torch.bool)
    (ranking,), _ = subset_rankings(tiny_llama, sampled, everything, CONFIG, CONFIG.k)
    assert ranking == chosen.ids.tolist()


def test_a_subset_of_the_horizon_ranks_as_the_selection_at_that_horizon(tiny_llama, direction, sampled):
    subsets = torch.ones((*sampled.valid.shape, 2), dtype=torch.bool)
    subsets[:, 2:, 1] = False
    config = replace(CONFIG, min_steered_prob=1e-12)
    rankings, _ = subset_rankings(tiny_llama, sampled, subsets, config, CONFIG.k)
    short = AnswerStates(
        *(getattr(sampled, f)[:, :2] for f in ("teacher", "base", "completion_ids", "valid")), sampled.prompts
    )
    want = select_tokens(tiny_llama, direction, PROMPTS, replace(config, horizon=2), sampled=short)
    assert rankings[1] == want.ids.tolist()


def test_equal_samples_are_perfectly_stable(tiny_llama, sampled):
    first = [i for i in range(len(sampled.prompts)) for _ in range(4) if i % 3 == 0]
    same = AnswerStates(
        sampled.teacher[first],
        sampled.base[first],
        sampled.completion_ids[first],
        sampled.valid[first],
        tuple(sampled.prompts[i] for i in first),
    )
    result = measure_stability(tiny_llama, same, CONFIG, ks=(5, 10), n_splits=2)
    curves = {c.name: c.jaccard for c in result.stability.curves}
    assert curves["samples"].mean == (1.0, 1.0)
    assert all(
        0 <= low <= high <= 1 for c in curves.values() for low, high in zip(c.low, c.high, strict=True)
    )


def test_jaccard():
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert (jaccard([1], [1]), jaccard([1], [2]), jaccard([], [])) == (1.0, 0.0, 0.0)


# Explain -------------------------------------------------------------------------------------


def test_an_explanation_survives_its_file(attribution, tmp_path):
    attribution.save(tmp_path / "attribution.json")
    again = Attribution.load(tmp_path / "attribution.json")
    assert again == attribution
    raw = json.loads((tmp_path / "attribution.json").read_text())
    assert set(raw) == {"traces", "stories", "coverage", "stability"}
    story = raw["stories"][str(next(iter(attribution.stories)))]
    assert {"votes_by_position", "p_steered", "rank_steered", "places"} <= set(story)
    assert again.traces[0].tokens[0].top_base[0].p <= 1
    (tmp_path / "attribution.json").write_text('{"traces": []}')
    with pytest.raises(SafeSteerError, match="not an attribution file"):
        Attribution.load(tmp_path / "attribution.json")


def test_an_explanation_is_deterministic(tiny_llama, direction, chosen, few, attribution):
    config = ExplainConfig(n_prompts=4, n_harmful=3, max_tokens=10, n_sets=3, n_splits=3)
    again = explain(tiny_llama, direction, chosen, tiny_llama, prompts=few, config=config)
    assert again == attribution


def test_an_explanation_takes_a_pair_and_our_prompts(tiny_llama, direction, chosen):
    config = ExplainConfig(n_prompts=2, n_harmful=1, n_traces=1, max_tokens=4, n_sets=1, n_splits=1)
    pair = tiny_llama.model, tiny_llama.tokenizer
    attribution = explain(pair, direction, chosen, config=config)
    val = load_prompts().split("val")
    assert {p.prompt for s in attribution.stories.values() for p in s.places} <= set(val.harmless[:2])
    (answer,) = attribution.traces
    assert answer.prompt in (val.harmful if answer.label == "harmful" else val.harmless)


def test_an_explanation_is_a_table_with_a_row_per_token(attribution, chosen):
    table = attribution.to_frame()
    assert table.id.tolist() == chosen.ids.tolist()
    story = attribution.stories[chosen.tokens[0].id]
    assert table.loc[0, "later_layers"] == story.change - story.direct
    assert table.loc[0, "p_steered"] == story.p_steered


def test_an_explanation_renders_in_a_notebook_without_markup(attribution):
    first = next(iter(attribution.stories.values()))
    hostile = replace(first, text="<img src=x>")
    page = replace(attribution, stories=attribution.stories | {first.id: hostile})._repr_html_()
    assert "<img" not in page
    assert "&lt;img src=x&gt;" in page
    text = attribution.coverage.texts[0]
    assert f"{text.at_k('S'):.1%}" in page
    assert f"{text.at_k('matched in base probability'):.1%}" in page
    assert "prompts" in page
    assert f"{len(attribution.stories)} tokens" in repr(attribution)


def test_given_answers_are_traced_and_counted(tiny_llama, direction, chosen, few):
    rows = answer_rows(4)
    config = ExplainConfig(n_prompts=2, n_harmful=2, max_tokens=8, n_sets=2, n_splits=2)
    attribution = explain(tiny_llama, direction, chosen, prompts=few, answers=rows, config=config)
    assert {t.author for t in attribution.traces} == {"teacher", "base"}
    kinds = {c.answers: c.n for c in attribution.coverage.answer_shares}
    assert kinds["refusals by the teacher"] == 8
    assert kinds["base answers to harmful prompts that do not refuse"] == 4
    assert attribution.coverage.texts[-1].name == "base model's answers to harmful prompts"


def test_changed_prompts_are_traced_first():
    rows = answer_rows(3)
    rows[2]["student_refuses"] = True
    picked = pick_traces(rows, 3, with_student=True)
    assert [(r["prompt"], author) for r, author in picked][:2] == [
        (rows[2]["prompt"], "student"),
        (rows[2]["prompt"], "base"),
    ]


# Text ----------------------------------------------------------------------------------------


def test_invisible_characters_are_shown():
    assert visible(" a\n\t\u200f\x00\ue000") == "␣a⏎⇥⟨U+200F⟩␀⟨U+E000⟩"
    assert readable("a b\nc") == "a b⏎c"
    assert running("a b\nc\u202e\ud800") == "a b\nc⟨U+202E⟩⟨U+D800⟩"
    assert running("👩‍👩‍👧 我 שלום") == "👩‍👩‍👧 我 שלום"


def test_lone_bytes_are_shown_as_bytes(tiny_llama):
    tokenizer = tiny_llama.tokenizer
    ids = tokenizer("🙂", add_special_tokens=False).input_ids
    shown = "".join(token_text(tokenizer, i) for i in ids)
    assert shown.replace("⟩⟨", " ") == "⟨F0 9F 99 82⟩"
    plain = tokenizer(" harm", add_special_tokens=False).input_ids
    assert "".join(token_text(tokenizer, i) for i in plain) == " harm"


# Report --------------------------------------------------------------------------------------

EVALUATION = {  # no number twice, so that none can stand in another's place
    name: {
        "refusal_rate_harmful": harmful,
        "refusal_rate_harmful_ci": [harmful - 0.11, harmful + 0.04],
        "refusal_rate_harmless": harmless,
        "refusal_rate_harmless_ci": [harmless - 0.02, harmless + 0.15],
        "kl_harmless": kl,
        "kl_harmless_ci": [kl * 0.75, kl * 1.5],
        "perplexity": perplexity,
        "n": 100,
    }
    for name, harmful, harmless, kl, perplexity in (
        ("base", 0.25, 0.03, 0.0, 12.5),
        ("teacher", 0.94, 0.42, 1.236, 31.25),
        ("student", 0.81, 0.07, 0.124, 14.14),
    )
}


def answer_rows(n: int, texts: tuple[str, ...] = ("Sure, here is a plan.\n1. Begin",)) -> list[dict]:
    """n harmful and n harmless rows of answers.jsonl."""
    return [
        {
            "prompt": f"{label} request {i}: {texts[i % len(texts)]}",
            "label": label,
            "category": "test",
            "base": texts[i % len(texts)],
            "teacher": "I'm sorry, I cannot help.",
            "student": texts[(i + 1) % len(texts)],
            "base_refuses": False,
            "teacher_refuses": True,
            "student_refuses": False,
        }
        for label in ("harmful", "harmless")
        for i in range(n)
    ]


def fill_run(path, tokens: TokenSet, attribution: Attribution | None, answers: list[dict], model="tiny"):
    """A run folder with every file a report reads, without a training run."""
    path.mkdir(exist_ok=True)
    manifest = {
        "name": "safesteer",
        "model": model,
        "preset": "quick",
        "seed": 0,
        "created": "2026-01-02T03:04:05Z",
        "recipe": {"tokens": asdict(CONFIG), "note": model},
        "versions": {"torch": "2"},
        "prompts_hash": "ab",
        "template_hash": "cd",
        "stages": {"tokens": {"seconds": 1.5, "peak_mb": 100.0}},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    rows = ["extraction,position,layer,ablation_refusal,steering_refusal,kl_harmless,kept,reason"]
    for position in ("-2", "-1"):
        rows += [f"instruction,{position},{i},{-i},{i - 2},0.05,{i > 1},reason {i}" for i in range(4)]
        rows += [f"instruction,{position},4,,,,False,layer in the last 20% of the model (not run)"]
    (path / "sweep.csv").write_text("\n".join(rows) + "\n")
    tokens.save(path / "tokens.json")
    steps = [
        {
            "step": i,
            "loss": 1 / i,
            "mass_on_s_student": i / 30,
            "mass_on_s_teacher": 0.5,
            "mass_on_s_anchor": 0.1,
        }
        for i in range(1, 11)
    ]
    (path / "history.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (path / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in answers))
    if attribution:
        attribution.save(path / "attribution.json")
    return path


def hostile_tokens(tokens: TokenSet) -> TokenSet:
    """The same set with texts that attack a page."""
    renamed = tuple(
        replace(
            t,
            text=HOSTILE[i % len(HOSTILE)],
            contexts=tuple(replace(c, prompt=HOSTILE[i % len(HOSTILE)]) for c in t.contexts),
        )
        for i, t in enumerate(tokens.tokens)
    )
    return replace(tokens, tokens=renamed)


def test_hostile_text_stays_text(tmp_path, chosen):
    tokens = hostile_tokens(chosen)
    run = fill_run(tmp_path / "run", tokens, None, answer_rows(8, HOSTILE), model=HOSTILE[0])
    page = write_report(run).read_text(encoding="utf-8")
    plain = build_page(load_page_data(fill_run(tmp_path / "plain", chosen, None, answer_rows(8))))
    for tag in ("<script", "</script", "<img", "<!--", "onerror=alert(1)>"):
        assert page.count(tag) == plain.count(tag)
    assert "\u202e" not in page
    start = page.index('id="data">') + len('id="data">')
    shown = json.loads(page[start : page.index("</script>", start)])
    assert shown["answers"][0]["base"] == HOSTILE[0]
    assert shown["answers"][6]["base"] == HOSTILE[6]


def test_json_in_a_page_cannot_end_its_script():
    text = as_json({"a": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


def test_a_page_loads_nothing_and_states_what_is_missing(tmp_path):
    (tmp_path / "manifest.json").write_text('{"model": "m"}')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    shell = html.unescape(page[: page.index('id="data"')])
    assert "default-src 'none'" in shell
    assert "http://" not in shell
    assert "https://" not in shell
    missing = load_page_data(tmp_path)["missing"]
    files = {"evaluation", "sets", "answers", "sweep", "tokens", "history", "attribution", "direction"}
    files |= {"reader", "shift", "lens", "dial"}
    assert set(missing) == files
    assert all("is missing" in line for line in missing.values())


def test_a_damaged_file_costs_its_section_only(tmp_path, chosen, attribution):
    run = fill_run(tmp_path / "run", chosen, attribution, answer_rows(2))
    for name in ("sweep.csv", "history.jsonl", "attribution.json"):
        (run / name).write_text("broken\x00{")
    shown = load_page_data(run)
    assert set(shown["missing"]) == {
        "sets",
        "sweep",
        "history",
        "attribution",
        "direction",
        "reader",
        "shift",
        "lens",
        "dial",
    }
    assert shown["tokens"]
    assert write_report(run).stat().st_size > 0


def test_a_report_of_200_prompts_is_under_8_mb(tmp_path, chosen, attribution):
    many = replace(attribution, traces=(attribution.traces * 200)[:200])
    rows = answer_rows(100, ("A plausible answer of some length. " * 12,))
    page = write_report(fill_run(tmp_path / "run", chosen, many, rows))
    assert page.stat().st_size < 8_000_000


def test_a_story_in_the_page_is_the_story(tmp_path, chosen, attribution):
    rows = load_page_data(fill_run(tmp_path / "run", chosen, attribution, []))["tokens"]["rows"]
    for row, token in zip(rows, chosen.tokens, strict=True):
        story = attribution.stories[token.id]
        assert (row["group"], row["votes_by_position"]) == (story.group, list(token.votes_by_position))
        for name in ("p_base", "p_steered", "rank_base", "rank_steered", "direct", "later_layers"):
            assert_near(row["story"][name], getattr(story, name), 1e-3)
        for shown, place in zip(row["story"]["places"], story.places, strict=True):
            assert (shown["step"], shown["rank_steered"]) == (place.step, place.rank_steered)
            assert shown["answer_so_far"] == readable(place.answer_so_far)


def test_the_evaluation_in_the_page_is_that_of_its_file(tmp_path, chosen):
    run = fill_run(tmp_path / "run", chosen, None, [])
    page = write_report(run).read_text(encoding="utf-8")
    start = page.index('id="data">') + len('id="data">')
    shown = json.loads(page[start : page.index("</script>", start)])
    scores = json.loads((run / "evaluation.json").read_text())
    assert list(shown["evaluation"]) == list(scores)
    bars = shown["figures"]["evaluation"]["data"]
    for bar, (name, of_model) in zip(bars, scores.items(), strict=True):
        for key, value in of_model.items():
            assert shown["evaluation"][name][key] == pytest.approx(value, abs=1e-4)
        rates = [of_model["refusal_rate_harmful"], of_model["refusal_rate_harmless"]]
        limits = [of_model["refusal_rate_harmful_ci"], of_model["refusal_rate_harmless_ci"]]
        whiskers = zip(bar["y"], bar["error_y"]["arrayminus"], bar["error_y"]["array"], strict=True)
        assert (bar["name"], bar["x"]) == (name, ["harmful prompts", "harmless prompts"])
        assert bar["y"] == pytest.approx(rates, abs=1e-4)
        for (y, minus, plus), (low, high) in zip(whiskers, limits, strict=True):
            assert (y - minus, y + plus) == pytest.approx((low, high), abs=1e-4)


def test_a_trace_in_the_page_is_the_trace(tmp_path, chosen, attribution):
    shown = load_page_data(fill_run(tmp_path / "run", chosen, attribution, []))["traces"]
    for row, want in zip(shown["rows"], attribution.traces, strict=True):
        for got, token in zip(row["tokens"], want.tokens, strict=True):
            assert got[0] == token.id
            assert shown["vocabulary"][str(token.id)] == visible(token.text)
            assert_near(got[1], [token.p_base, token.p_steered, token.p_student], 1e-3)
            assert_near(got[7][1][1], token.top_steered[0].p, 1e-3)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_hold_plain_numbers(theme, tmp_path, chosen, attribution):
    run = fill_run(tmp_path / "run", chosen, attribution, [])
    table = pd.read_csv(run / "sweep.csv", dtype={"position": str})
    one = table[table.position == "-1"]
    rows = [asdict(t) for t in hostile_tokens(chosen).tokens]
    made = [
        direction_figures.sweep_figure(table, theme, chosen=("-1", 3)),
        direction_figures.sweep_figure(one, theme, chosen=("-1", 3)),
        figures.votes_figure(rows, theme),
        figures.coverage_figure(attribution.coverage.texts[0], theme),
        figures.steps_figure(attribution.coverage, theme),
        figures.stability_figure(attribution.stability, theme),
    ]
    for figure in made:
        text = figure.to_json()
        assert "NaN" not in text
        assert "<img" not in text
    heat = made[0].data[0]
    assert heat.z[0][-1] is None
    assert "not run" in heat.text[0][-1]
