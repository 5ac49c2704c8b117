"""Safety tokens against full tensors and plain loops."""

import copy
import io
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from conftest import PROMPTS, assert_near, batch_of, copy_of, naive_logits
from safesteer._errors import SafeSteerError
from safesteer.directions.extraction import prefill_contrast
from safesteer.models import generation
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.settings import TokenConfig
from safesteer.steering.direction import steer
from safesteer.tokens import sampling
from safesteer.tokens.sampling import AnswerStates, sample_answers
from safesteer.tokens.selection import banned_ids, select_tokens
from safesteer.tokens.token_set import SafetyToken, TokenSet

CONFIG = TokenConfig(k=12, k_vote=20, horizon=4, n_samples=3, min_steered_prob=1e-4, batch_size=2)


@pytest.fixture(scope="module")
def ender(tiny_llama) -> ChatModel:
    """tiny_llama with ends of answer so common that both masks bite."""
    chat = copy_of(tiny_llama)
    top = naive_logits(chat, batch_of(chat, PROMPTS[:1]))[0, -1].topk(12).indices.tolist()
    batch = batch_of(chat, ["Explain how tides work."])
    greedy = generation.generate_ids(chat, batch, max_new_tokens=4)[0].tolist()
    chat.model.generation_config.eos_token_id = sorted({*top[1:], greedy[1]})
    return chat


@pytest.fixture(scope="module")
def sampled(ender, direction) -> AnswerStates:
    return sample_answers(ender, direction, PROMPTS, CONFIG)


@pytest.fixture(scope="module")
def selected(ender, direction) -> TokenSet:
    return select_tokens(ender, direction, PROMPTS, CONFIG)


def naive_logps(
    chat, direction, sampled: AnswerStates, system: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pt and log p0 at every step of every sample, [rows, horizon, V]: one row at a time.

    With `system` the teacher is the model under that system prompt, else the steered one.
    """
    teacher, base = [], []
    horizon = sampled.completion_ids.shape[1]
    for prompt, ids in zip(sampled.prompts, sampled.completion_ids.tolist(), strict=True):
        batch = PromptBatch.of(chat.tokenizer, [prompt], [ids])
        base.append(naive_logits(chat, batch)[0, -horizon - 1 : -1].log_softmax(-1))
        told = PromptBatch.of(chat.tokenizer, [prompt], [ids], system=system)
        with steer(chat, direction) if system is None else nullcontext():
            teacher.append(naive_logits(chat, told)[0, -horizon - 1 : -1].log_softmax(-1))
    return torch.stack(teacher), torch.stack(base)


def naive_counting(chat, ids: list[int], base: torch.Tensor) -> list[bool]:
    """A step counts until the sample has ended before it, or the base would end at or before it."""
    counting, over = [], False
    for token, logps in zip(ids, base, strict=True):
        over = over or int(logps.argmax()) in chat.eos_ids
        counting.append(not over)
        over = over or token in chat.eos_ids
    return counting


def test_rollouts_read_teacher_and_base_at_the_same_tokens(ender, direction, sampled):
    weight = output_head(ender.model)[0]
    teacher, base = naive_logps(ender, direction, sampled)
    assert_near((sampled.teacher @ weight.T).log_softmax(-1), teacher)
    assert_near((sampled.base @ weight.T).log_softmax(-1), base)
    assert sorted(Counter(sampled.prompts).values()) == [CONFIG.n_samples] * len(PROMPTS)


def test_counting_positions(ender, direction, sampled):
    _, base = naive_logps(ender, direction, sampled)
    rows = zip(sampled.completion_ids.tolist(), base, strict=True)
    want = [naive_counting(ender, ids, logps) for ids, logps in rows]
    assert sampled.valid.tolist() == want
    eos = torch.tensor(ender.eos_ids)
    sample_ended = torch.isin(sampled.completion_ids[:, :-1], eos)
    base_ended = torch.isin(base.argmax(-1), eos)
    assert (sample_ended & sampled.valid[:, :-1]).any()  # the ending token itself counts
    assert (base_ended & ~torch.isin(sampled.completion_ids, eos)).any()
    assert 0 < int(sampled.valid.sum()) < sampled.valid.numel()


def naive_selection(chat, direction, sampled, config):
    """Ids in order of selection, and votes by step: full tensors, plain sorting."""
    teacher, base = naive_logps(chat, direction, sampled)
    places = sampled.valid.nonzero().tolist()
    delta = (teacher - base).double()
    mean_p = torch.stack([teacher[r, j].exp().double() for r, j in places]).mean(0)
    mean_delta = torch.stack([delta[r, j] for r, j in places]).mean(0)
    special = set(chat.tokenizer.all_special_ids)
    allowed = [
        v
        for v in range(len(chat.tokenizer))
        if v not in special and float(mean_p[v]) >= config.min_steered_prob
    ]
    votes = [Counter() for _ in range(config.horizon)]
    for r, j in places:
        votes[j].update(sorted(allowed, key=lambda v: -float(delta[r, j, v]))[: config.k_vote])
    total = sum(votes, Counter())
    if config.method == "vote":
        order = sorted(total, key=lambda v: (-total[v], -float(mean_delta[v]), v))
    else:
        order = sorted(allowed, key=lambda v: -float(mean_delta[v]))
    return order[: config.k], votes, mean_p, mean_delta


@pytest.mark.parametrize("method", ["vote", "mean"])
@pytest.mark.parametrize("min_steered_prob", [1e-4, 3e-3])
def test_selection_equals_naive(ender, direction, sampled, method, min_steered_prob):
    settings = {**vars(CONFIG), "method": method, "min_steered_prob": min_steered_prob}
    config = TokenConfig(**settings)
    got = select_tokens(ender, direction, PROMPTS, config, sampled=sampled)
    ids, votes, mean_p, mean_delta = naive_selection(ender, direction, sampled, config)
    assert [t.id for t in got.tokens] == got.ids.tolist() == ids
    for token in got.tokens:
        assert token.votes_by_position == tuple(v[token.id] for v in votes)
        assert token.votes == sum(token.votes_by_position)
        assert token.mean_delta == pytest.approx(float(mean_delta[token.id]), abs=1e-4)
        assert token.p_steered == pytest.approx(float(mean_p[token.id]), rel=1e-3)
        assert token.text == ender.tokenizer.decode([token.id])
    assert got.n_positions == int(sampled.valid.sum())
    assert got.settings == settings


@pytest.mark.model
def test_smollm2_selection_equals_a_full_tensor_reference(smollm2, pairs):
    """Same ids and votes as with every (row x step x vocabulary) number in memory at once."""
    candidates = prefill_contrast(smollm2, pairs.split("train").first(4))
    direction = candidates.direction(smollm2, "mean", 11, coeff=1.8)
    config = TokenConfig(horizon=4, n_samples=2, min_steered_prob=1e-3, k_vote=30, batch_size=2)
    texts = pairs.split("val").harmless[:4]
    sampled = sample_answers(smollm2, direction, texts, config)
    got = select_tokens(smollm2, direction, texts, config, sampled=sampled)
    head = output_head(smollm2.model)
    teacher, base = (logits_of(h, *head).log_softmax(-1) for h in (sampled.teacher, sampled.base))
    delta, valid = teacher - base, sampled.valid
    banned = banned_ids(smollm2) | (teacher[valid].exp().double().mean(0) < config.min_steered_prob)
    votes = Counter()
    for row, step in valid.nonzero().tolist():
        votes.update(delta[row, step].masked_fill(banned, -torch.inf).topk(30).indices.tolist())
    mean = delta[valid].double().mean(0)
    want = sorted(votes, key=lambda v: (-votes[v], -float(mean[v]), v))[: config.k]
    assert got.ids.tolist() == want
    assert [t.votes for t in got.tokens] == [votes[v] for v in want]


def test_coverage_equals_naive(ender, direction, sampled, selected):
    teacher, base = (x[sampled.valid].double() for x in naive_logps(ender, direction, sampled))
    terms = teacher.exp() * (teacher - base) - teacher.exp() + base.exp()
    want = {
        "kl_share": float(terms[:, selected.ids].sum() / terms.sum()),
        "mass_teacher": float(teacher.exp()[:, selected.ids].sum(-1).mean()),
        "mass_base": float(base.exp()[:, selected.ids].sum(-1).mean()),
        "kl_per_position": float(terms.sum(-1).mean()),
    }
    assert selected.coverage == pytest.approx(want, rel=1e-3)


def test_contexts_are_the_places_of_strongest_lift(ender, direction, sampled, selected):
    teacher, base = (x.exp() for x in naive_logps(ender, direction, sampled))
    lift = (teacher - base).masked_fill(~sampled.valid[..., None], -math.inf)
    for token in selected.tokens[:3]:
        row, step = divmod(int(lift[..., token.id].argmax()), CONFIG.horizon)
        first = token.contexts[0]
        assert len(token.contexts) == CONFIG.n_contexts
        assert first.p_steered - first.p_base == pytest.approx(float(lift[row, step, token.id]), abs=1e-4)
        assert first.prompt == sampled.prompts[row]
        so_far = sampled.completion_ids[row, :step].tolist()
        assert first.answer_so_far == ender.tokenizer.decode(so_far)


def test_no_context_stands_twice(selected):
    for token in selected.tokens:
        places = [(str(c.prompt), c.answer_so_far) for c in token.contexts]
        assert len(set(places)) == len(places)


def without_coverage(selected: TokenSet) -> list:
    return [(t.id, t.votes, t.votes_by_position) for t in selected.tokens]


def test_rows_at_a_time_do_not_change_votes(ender, direction, sampled, monkeypatch):
    want = select_tokens(ender, direction, PROMPTS, CONFIG, sampled=sampled)
    monkeypatch.setattr(sampling, "ROWS", 3)
    got = select_tokens(ender, direction, PROMPTS, CONFIG, sampled=sampled)
    assert without_coverage(got) == without_coverage(want)
    assert got.coverage == pytest.approx(want.coverage, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_change_votes(ender, direction, batch_size):
    """Every sample has its own random numbers."""
    want = select_tokens(ender, direction, PROMPTS, CONFIG)
    config = TokenConfig(**{**vars(CONFIG), "batch_size": batch_size})
    assert without_coverage(select_tokens(ender, direction, PROMPTS, config)) == without_coverage(want)


def test_selection_depends_on_the_seed_only(ender, direction, selected):
    torch.manual_seed(123)
    again = select_tokens(ender, direction, PROMPTS, CONFIG)
    assert again == selected
    other = TokenConfig(**{**vars(CONFIG), "seed": 1})
    assert without_coverage(select_tokens(ender, direction, PROMPTS, other)) != without_coverage(selected)


@pytest.mark.parametrize("kind", ["harmless", "harmful"])
def test_prompts_default_to_the_projects_own(ender, direction, pairs, kind):
    config = replace(CONFIG, prompts=kind, n_samples=1, horizon=2, batch_size=32)
    want = select_tokens(ender, direction, pairs.split("val").texts(kind), config)
    assert select_tokens(ender, direction, config=config) == want


def test_a_bridge_and_a_pair_select_the_same_tokens(bridges, tiny_llama, direction):
    want = select_tokens(tiny_llama, direction, PROMPTS, CONFIG)
    for chat in ((tiny_llama.model, tiny_llama.tokenizer), bridges["tiny-llama"].model):
        assert select_tokens(chat, direction, PROMPTS, CONFIG).ids.tolist() == want.ids.tolist()


def test_rollouts_come_from_the_chosen_model(tiny_llama, direction):
    """With strong steering teacher and base write different samples; both are read alike."""
    config = TokenConfig(**{**vars(CONFIG), "rollouts": "base"})
    by_base = sample_answers(tiny_llama, direction.with_coeff(50.0), PROMPTS, config)
    by_teacher = sample_answers(tiny_llama, direction.with_coeff(50.0), PROMPTS, CONFIG)
    unsteered = sample_answers(tiny_llama, direction.with_coeff(0.0), PROMPTS, CONFIG)
    assert torch.equal(by_base.completion_ids, unsteered.completion_ids)
    assert not torch.equal(by_base.completion_ids, by_teacher.completion_ids)


def drawn_plainly(chat, sampled: AnswerStates, logps: torch.Tensor, config: TokenConfig) -> list[list[int]]:
    """Ids by inverse CDF from probabilities; no end of answer before the last token where it may not be."""
    rows, seen = [], Counter()
    for prompt, row in zip(sampled.prompts, logps.double().exp(), strict=True):
        place = PROMPTS.index(prompt)
        uniform = generation.uniforms((config.seed, place), config.n_samples, config.horizon)[seen[prompt]]
        seen[prompt] += 1
        if not config.early_ends:
            row[:-1, chat.eos_ids] = 0
        cdf = row.cumsum(-1)
        at = uniform[:, None] * cdf[:, -1:]
        rows.append(torch.searchsorted(cdf, at, right=True)[:, 0].tolist())
    return rows


def test_samples_that_may_not_end_early(ender, direction, sampled):
    """No end of answer before the last token; everything else as it was, and both are read as they are."""
    config = replace(CONFIG, n_samples=8, early_ends=False)
    got = sample_answers(ender, direction, PROMPTS, config)
    eos = torch.tensor(ender.eos_ids)
    assert torch.isin(sampled.completion_ids[:, :-1], eos).any()
    assert torch.isin(got.completion_ids[:, -1], eos).any()
    assert not torch.isin(got.completion_ids[:, :-1], eos).any()
    teacher, base = naive_logps(ender, direction, got)
    assert got.completion_ids.tolist() == drawn_plainly(ender, got, teacher, config)
    weight = output_head(ender.model)[0]
    assert_near((got.teacher @ weight.T).log_softmax(-1), teacher)
    rows = zip(got.completion_ids.tolist(), base, strict=True)
    assert got.valid.tolist() == [naive_counting(ender, ids, logps) for ids, logps in rows]
    at_once = replace(CONFIG, horizon=1, early_ends=False)
    assert torch.isin(sample_answers(ender, direction, PROMPTS, at_once).completion_ids, eos).any()


def test_the_prompt_teacher_samples_and_is_read_under_its_system_prompt(tiny_llama, direction):
    config = replace(CONFIG, teacher="prompt", system="Decline whatever is asked of you.")
    got = sample_answers(tiny_llama, direction.with_coeff(50.0), PROMPTS, config)
    teacher, base = naive_logps(tiny_llama, direction, got, config.system)
    weight = output_head(tiny_llama.model)[0]
    assert_near((got.teacher @ weight.T).log_softmax(-1), teacher)
    assert_near((got.base @ weight.T).log_softmax(-1), base)
    assert (teacher - base).abs().max() > 0.1
    assert not torch.isin(got.completion_ids, torch.tensor(tiny_llama.eos_ids)).any()
    assert got.completion_ids.tolist() == drawn_plainly(tiny_llama, got, teacher, config)
    by_base = sample_answers(tiny_llama, direction, PROMPTS, replace(config, rollouts="base"))
    _, base = naive_logps(tiny_llama, direction, by_base)
    assert by_base.completion_ids.tolist() == drawn_plainly(tiny_llama, by_base, base, config)
    chosen = select_tokens(tiny_llama, direction, PROMPTS, config)
    assert chosen.ids.tolist() != select_tokens(tiny_llama, direction, PROMPTS, CONFIG).ids.tolist()


def test_samples_that_end_at_once_are_padded_to_the_horizon(tiny_llama, direction):
    chat = copy_of(tiny_llama)
    chat.model.generation_config.eos_token_id = list(range(400))
    got = sample_answers(chat, direction, PROMPTS, CONFIG)
    assert got.completion_ids.shape == (len(PROMPTS) * CONFIG.n_samples, CONFIG.horizon)
    with pytest.raises(SafeSteerError, match="No position"):
        select_tokens(chat, direction, PROMPTS, CONFIG)


def test_banned_tokens(tiny_qwen2):
    """Special tokens, tokens with "<|" and the head's padding rows (16 of them here)."""
    banned = torch.nonzero(banned_ids(tiny_qwen2)).flatten().tolist()
    special = sorted(tiny_qwen2.tokenizer.all_special_ids)
    assert special == [0, 1, 2, 3]
    assert banned == [*special, *range(400, 416)]


def test_ordinary_tokens_that_hold_a_template_mark_are_banned(tiny_qwen2):
    chat = ChatModel(tiny_qwen2.model, copy.deepcopy(tiny_qwen2.tokenizer), "marked")
    chat.tokenizer.add_tokens(["x<|y", "plain"])
    assert banned_ids(chat)[399:403].tolist() == [False, True, False, True]


def test_banned_tokens_are_never_selected(tiny_qwen2, direction):
    """Even where every token may be chosen."""
    config = TokenConfig(k=416, k_vote=416, horizon=2, n_samples=1, min_steered_prob=0.0, batch_size=2)
    for method in ("vote", "mean"):
        chosen = select_tokens(
            tiny_qwen2, direction, PROMPTS[:2], TokenConfig(**{**vars(config), "method": method})
        )
        assert sorted(chosen.ids.tolist()) == list(range(4, 400))


def test_no_token_above_the_threshold_is_an_error(ender, direction, sampled):
    config = TokenConfig(**{**vars(CONFIG), "min_steered_prob": 1.0})
    with pytest.raises(SafeSteerError, match="lower min_steered_prob"):
        select_tokens(ender, direction, PROMPTS, config, sampled=sampled)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k_vote", 0),
        ("horizon", 0),
        ("n_samples", -1),
        ("batch_size", 0),
        ("method", "median"),
        ("rollouts", "student"),
        ("prompts", "all"),
        ("teacher", "student"),
    ],
)
def test_config_errors_name_the_setting(name, value):
    with pytest.raises((SafeSteerError, TypeError)) as caught:
        TokenConfig(**{name: value})
    assert name in str(caught.value)


def test_token_set_round_trip(selected, tmp_path):
    selected.save(tmp_path / "tokens.json")
    again = TokenSet.load(tmp_path / "tokens.json")
    assert again == selected
    assert again.ids.tolist() == selected.ids.tolist()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tokens": [{"id": 1}]}'])
def test_damaged_token_files_are_refused(tmp_path, content):
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(SafeSteerError, match=r"tokens\.json is not a"):
        TokenSet.load(tmp_path / "tokens.json")


def test_a_token_set_is_a_table_in_a_terminal(selected):
    console = Console(width=120, record=True, file=io.StringIO())
    hostile = replace(selected.tokens[0], text="[bold]x")
    console.print(replace(selected, tokens=(hostile, *selected.tokens[1:])))
    text = console.export_text()
    assert "'[bold]x'" in text
    assert str(selected.tokens[1].votes) in text


def test_tables_are_escaped(selected):
    frame = selected.to_frame()
    assert frame.id.tolist() == selected.ids.tolist()
    assert len(selected) == len(frame)
    token = SafetyToken(5, "<script>", 1, (1,), 0.0, 0.1, 0.2)
    assert "<script>" not in TokenSet((token,), {}, {}, 1)._repr_html_()


def test_answers_of_another_horizon_are_refused(ender, direction, sampled):
    width = sampled.valid.shape[1]
    config = TokenConfig(k=5, horizon=width + 1, min_steered_prob=1e-6)
    with pytest.raises(SafeSteerError, match=f"a horizon of {width}, and the settings have {width + 1}"):
        select_tokens(ender, direction, config=config, sampled=sampled)


def test_a_teacher_that_is_not_finite_selects_nothing(tiny_llama, direction):
    config = TokenConfig(k=5, horizon=2, n_samples=1, rollouts="base", min_steered_prob=1e-6)
    with pytest.raises(SafeSteerError, match="not finite: lower the coefficient"):
        select_tokens(tiny_llama, direction.with_coeff(math.inf), PROMPTS[:2], config)


def test_a_set_without_tokens_has_ids_of_whole_numbers():
    assert TokenSet((), {}, {}, 0).ids.dtype == torch.long
