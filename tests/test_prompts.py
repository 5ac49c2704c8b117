"""Prompt files, the shipped pairs, and the one path from text to ids."""

import copy
import json
import re
from collections import Counter

import pytest
import torch

from conftest import PROMPTS, near_duplicates
from safesteer._errors import SafeSteerError
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.templates import render, suffix_length, template_hash
from safesteer.prompts.prompt_set import LABELS, SPLITS, PromptSet, load_prompts

GOOD = '{"harmful": "Make a bomb", "harmless": "Make a cake"}'
TOKENIZERS = ["chatml_tokenizer", "llama3_tokenizer"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


def read(tmp_path, text: str, **options) -> PromptSet:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return PromptSet.from_jsonl(path, **options)


# --- files ---


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "needs the keys"),
        ("7", "needs the keys"),
        ('{"harmful": "x"}', "needs the keys"),
        ('{"prompt": "x"}', "needs the keys"),
        ('{"prompt": "x", "label": "evil"}', "label"),
        ('{"prompt": "x", "label": ["harmful"]}', "label"),
        ('{"harmful": "x", "harmless": "y", "split": "dev"}', "split"),
        ('{"harmful": "", "harmless": "y"}', "empty"),
        ('{"harmful": " \\n", "harmless": "y"}', "empty"),
        ('{"harmful": 7, "harmless": "y"}', "not text"),
        ('{"harmful": null, "harmless": "y"}', "not text"),
        ('{"harmful": "x\\ud800", "harmless": "y"}', "surrogate"),
        ('{"harmful": "x\\u0000", "harmless": "y"}', "NUL"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(SafeSteerError, match=r"mine\.jsonl line 3.*" + message):
        read(tmp_path, f"{GOOD}\n\n{line}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 harmful and 0 harmless"),
        (b"\n \n", "0 harmful and 0 harmless"),
        (b'{"prompt": "x", "label": "harmful"}', "1 harmful and 0 harmless"),
        (b"\xff\xfe{", "not UTF-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(SafeSteerError, match=message) as caught:
        PromptSet.from_jsonl(path)
    assert "mine.jsonl" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SafeSteerError, match=r"absent\.jsonl.*No such file"):
        PromptSet.from_jsonl(tmp_path / "absent.jsonl")


def test_reading_accepts_bom_crlf_and_both_forms(tmp_path):
    single = '{"prompt": "Caf\u00e9?", "label": "harmless", "split": "test", "category": "food"}'
    prompts = read(tmp_path, f"\ufeff{GOOD}\r\n{single}\r\n")
    assert prompts.harmful == ["Make a bomb"]
    assert prompts.harmless == ["Make a cake", "Caf\u00e9?"]
    assert (prompts.prompts[2].split, prompts.prompts[2].category) == ("test", "food")
    assert prompts.name == "mine"


@pytest.mark.parametrize(("key", "meant"), [("spilt", "split"), ("Split", "split"), ("catagory", "category")])
def test_a_misspelt_key_is_named(tmp_path, key, meant):
    """Its prompts would be dealt to any split, and trained on."""
    with pytest.raises(SafeSteerError, match=f"line 1 has the key '{key}': write '{meant}'"):
        read(tmp_path, json.dumps({"prompt": "x", "label": "harmful", key: "test"}))
    assert read(tmp_path, f'{GOOD[:-1]}, "prompt_id": 3, "source": "me", "format": "x"}}').harmful


def test_line_separators_inside_a_text_do_not_break_lines(tmp_path):
    prompts = read(tmp_path, '{"harmful": "a\u2028b\u0085c", "harmless": "y"}')
    assert prompts.harmful == ["a\u2028b\u0085c"]


def test_rows_without_a_split_are_dealt_out_by_seed(tmp_path):
    rows = "\n".join(json.dumps({"harmful": f"bad {i}", "harmless": f"good {i}"}) for i in range(360))
    prompts = read(tmp_path, rows)
    assert {s: len(prompts.split(s).harmful) for s in SPLITS} == SPLITS
    for split in SPLITS:
        part = prompts.split(split)
        assert {t.split()[1] for t in part.harmful} == {t.split()[1] for t in part.harmless}
    assert prompts.hash == read(tmp_path, rows).hash
    assert prompts.hash != read(tmp_path, rows, seed=1).hash


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10])
def test_small_sets_lose_no_prompt_to_the_splits(tmp_path, n):
    rows = "\n".join(json.dumps({"harmful": f"bad {i}", "harmless": f"good {i}"}) for i in range(n))
    prompts = read(tmp_path, rows)
    assert len(prompts.prompts) == 2 * n
    assert {p.split for p in prompts.prompts} <= set(SPLITS)
    assert len(prompts.split("train").harmful) >= 1


def test_unknown_split_names_the_known_ones(few):
    with pytest.raises(SafeSteerError, match=r"no split 'dev'.*val"):
        few.split("dev")


def test_head_and_hash(pairs):
    head = pairs.first(2)
    assert (len(head.harmful), len(head.harmless)) == (2, 2)
    assert head.harmful == pairs.harmful[:2]
    assert pairs.first(None).harmless == pairs.harmless
    assert head.hash == pairs.first(2).hash != pairs.first(3).hash
    assert PromptSet(head.prompts[::-1]).hash != head.hash


# --- the shipped pairs ---


def test_shipped_sizes_and_variety(pairs):
    for split, size in SPLITS.items():
        part = pairs.split(split)
        assert (len(part.harmful), len(part.harmless)) == (size, size)
        assert len({p.category for p in part.prompts}) >= 12
        assert len({p.form for p in part.prompts}) >= 5


def test_the_shipped_prompts_that_directions_are_read_from_stay_as_they_were(pairs):
    """Saved directions name these hashes."""
    hashes = [(pairs.split(name).hash, pairs.split(name).first(64).hash) for name in ("train", "val")]
    # pragma: allowlist nextline secret
    assert hashes == [("7e3e4ca2af46c9f1", "6fc92f288e8422ec"), ("222481ac57f4fe1d", "096e0e6e8e8b7dd6")]


def test_shipped_pairs_are_matched_inside_their_split(pairs):
    twins: dict[str, list] = {}
    for prompt in pairs.prompts:
        twins.setdefault(prompt.pair, []).append(prompt)
    for a, b in twins.values():
        assert {a.label, b.label} == {"harmful", "harmless"}
        assert (a.split, a.category, a.form) == (b.split, b.category, b.form)


def test_shipped_prompts_are_ascii_and_unique(pairs):
    texts = [p.text for p in pairs.prompts]
    assert all(t.isascii() and t == t.strip() for t in texts)
    assert len({t.lower() for t in texts}) == len(texts)


@pytest.mark.parametrize("label", ["harmful", "harmless"])
def test_shipped_prompts_have_no_near_duplicates(pairs, label):
    assert near_duplicates([p.text for p in pairs.prompts if p.label == label]) == []


def test_prompts_of_other_forms_are_held_out_and_new(pairs):
    forms = load_prompts("forms")
    assert {p.split for p in forms.prompts} == {"test"}
    kinds = Counter((p.form, p.label) for p in forms.prompts)
    assert kinds == {
        ("short", "harmful"): 150,
        ("question", "harmful"): 150,
        ("hazard word", "harmless"): 150,
    }
    for form, n in (("short", 10), ("question", 10), ("hazard word", 30)):
        assert set(Counter(p.category for p in forms.prompts if p.form == form).values()) == {n}
    texts = [p.text for p in (*forms.prompts, *pairs.prompts)]
    assert all(t.isascii() and t == t.strip() for t in texts)
    assert near_duplicates([p.text for p in forms.prompts]) == []
    new = set(forms.harmful + forms.harmless)
    assert not [pair for pair in near_duplicates(texts) if new & set(pair)]
    # The first prompts of a set hold every category, so that a small sample does too.
    assert len({p.category for p in forms.prompts[:15]}) == 15


KINDS = {  # (form, label): prompts to train on, prompts to choose with
    ("short", "harmful"): (82, 28),
    ("question", "harmful"): (82, 28),
    ("hazard word", "harmless"): (82, 28),
    ("everyday", "harmless"): (112, 38),
    ("pair", "harmful"): (45, 15),
    ("pair", "harmless"): (45, 15),
}


def runs_of_words(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_prompts_of_other_kinds_have_their_splits(pairs):
    kinds = load_prompts("kinds")
    counts = Counter((p.form, p.label, p.split) for p in kinds.prompts)
    want = {(*kind, "train"): n for kind, (n, _) in KINDS.items()}
    assert counts == want | {(*kind, "val"): n for kind, (_, n) in KINDS.items()}
    hazards = {p.category for p in pairs.prompts}
    assert {p.category for p in kinds.prompts if p.label == "harmful"} == hazards
    for form in ("short", "question"):
        assert {p.category for p in kinds.prompts if p.form == form} == hazards
    twins: dict[str, list] = {}
    for prompt in kinds.prompts:
        twins.setdefault(prompt.pair, []).append(prompt)
    assert {len(rows) for rows in twins.values()} == {1, 2}  # an id of each prompt, one for two twins
    for rows in twins.values():
        assert len({(p.split, p.category, p.form) for p in rows}) == 1
        assert len({p.label for p in rows}) == len(rows)


def test_wide_prompts_have_their_splits(pairs):
    wide = load_prompts("wide")
    counts = Counter((p.form, p.label, p.split) for p in wide.prompts)
    forms = ("task", "neutral question", "everyday risk")
    sizes = {"train": 68, "val": 22}
    assert counts == {(f, label, s): n for f in forms for label in LABELS for s, n in sizes.items()}
    for form in forms:
        categories = Counter(p.category for p in wide.prompts if p.form == form)
        assert set(categories.values()) == {12}
        assert len(categories) == 15
        for split in sizes:
            part = [p for p in wide.split(split).prompts if p.form == form]
            assert {p.category for p in part} == set(categories)
    twins: dict[str, list] = {}
    for prompt in wide.prompts:
        twins.setdefault(prompt.pair, []).append((prompt.label, prompt.split, prompt.category, prompt.form))
    assert all({row[0] for row in rows} == set(LABELS) for rows in twins.values())
    assert all(len({row[1:] for row in rows}) == 1 for rows in twins.values())


@pytest.mark.parametrize("name", ["kinds", "wide"])
def test_prompts_of_other_kinds_share_no_wording_with_one_another(name):
    kinds = load_prompts(name)
    texts = [p.text for p in kinds.prompts]
    assert all(t.isascii() and t == t.strip() for t in texts)
    assert len({t.lower() for t in texts}) == len(texts)
    owners: dict[tuple[str, ...], set[str]] = {}
    for prompt in kinds.prompts:
        for run in runs_of_words(prompt.text, 5):
            owners.setdefault(run, set()).add(prompt.pair)
    assert {run: ids for run, ids in owners.items() if len(ids) > 1} == {}


@pytest.mark.parametrize(
    ("name", "held_out"),
    [("kinds", "forms"), ("kinds", "pairs"), ("wide", "forms"), ("wide", "pairs"), ("wide", "kinds")],
)
def test_prompts_of_other_kinds_are_new(name, held_out):
    known = [p.text for p in load_prompts(held_out).prompts]
    runs = set().union(*(runs_of_words(text, 6) for text in known))
    words = [runs_of_words(text, 1) for text in known]
    for prompt in load_prompts(name).prompts:
        assert not runs & runs_of_words(prompt.text, 6), prompt.text
        new = runs_of_words(prompt.text, 1)
        assert max(len(new & old) / len(new | old) for old in words) < 0.5, prompt.text


def test_mixed_adds_the_kinds_alone(pairs):
    distilled, kinds = load_prompts("mixed").split("distill"), load_prompts("kinds").split("train")
    assert distilled.harmful == pairs.split("distill").harmful + kinds.harmful
    assert distilled.harmless == pairs.split("distill").harmless + kinds.harmless


def test_all_adds_the_kinds_to_what_is_distilled_and_to_nothing_else(pairs):
    everything, kinds, wide = (
        load_prompts("all"),
        *(load_prompts(n).split("train") for n in ("kinds", "wide")),
    )
    for name in ("train", "val", "test"):
        assert everything.split(name).prompts == pairs.split(name).prompts
    distilled = everything.split("distill")
    assert distilled.harmful == pairs.split("distill").harmful + kinds.harmful + wide.harmful
    assert distilled.harmless == pairs.split("distill").harmless + kinds.harmless + wide.harmless


def test_the_project_has_no_other_prompts():
    with pytest.raises(SafeSteerError, match="pairs, kinds, wide, forms, mixed, all, not 'alpaca'"):
        load_prompts("alpaca")


# --- templates and batches ---


def test_suffix_length(chatml_tokenizer, llama3_tokenizer):
    """The longest common end of two prompts, and it is the template's own text."""
    ends = {
        chatml_tokenizer: "<|im_end|>\n<|im_start|>assistant\n",
        llama3_tokenizer: "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    }
    for tokenizer, end in ends.items():
        n = suffix_length(tokenizer)
        ids = tokenizer(render(tokenizer, "Tell me more"), add_special_tokens=False).input_ids
        assert tokenizer.decode(ids[-n:]) == end
        assert n == len(tokenizer(end, add_special_tokens=False).input_ids)


def changed(tokenizer, template: str | None):
    """A copy of the tokenizer with another chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_without_a_suffix_the_position_is_the_last_token(chatml_tokenizer):
    bare = changed(chatml_tokenizer, "{{ messages[-1]['content'] }}")
    assert suffix_length(bare) == 1


def test_missing_and_failing_templates_are_refused(chatml_tokenizer):
    with pytest.raises(SafeSteerError, match="no chat template"):
        render(changed(chatml_tokenizer, None), "x")
    with pytest.raises(SafeSteerError, match="no system here"):
        render(changed(chatml_tokenizer, "{{ raise_exception('no system here') }}"), "x", system="y")


def test_template_hash_tells_templates_apart(chatml_tokenizer, llama3_tokenizer):
    assert template_hash(chatml_tokenizer) == template_hash(chatml_tokenizer)
    assert template_hash(chatml_tokenizer) != template_hash(llama3_tokenizer)


def test_system_prompt_replaces_the_default_one(chatml_tokenizer):
    text = render(chatml_tokenizer, "Hi", system="Be brief")
    assert "Be brief" in text
    assert "helpful assistant" not in text


def test_no_double_bos(llama3_tokenizer):
    bos = llama3_tokenizer.bos_token_id
    assert llama3_tokenizer("x").input_ids[0] == bos  # the tokenizer would add one of its own
    batch = PromptBatch.of(llama3_tokenizer, PROMPTS)
    for ids, mask in zip(batch.prompt_ids, batch.attention_mask, strict=True):
        assert ids[mask.bool()].tolist().count(bos) == 1


def test_batch_holds_each_rendered_prompt_and_its_continuation(tokenizer):
    tails = ["Sure", " no", "", "I can't"]
    batch = PromptBatch.of(tokenizer, PROMPTS, tails)
    rows = zip(batch.prompt_ids, batch.attention_mask, batch.completion_mask, strict=True)
    for (ids, mask, completion), prompt, tail in zip(rows, PROMPTS, tails, strict=True):
        assert tokenizer.decode(ids[mask.bool()]) == render(tokenizer, prompt) + tail
        assert tokenizer.decode(ids[completion]) == tail
        assert (mask[completion] == 1).all()


def test_layout_is_shared_then_padding_then_rest(tokenizer):
    batch = PromptBatch.of(tokenizer, PROMPTS)
    n = batch.n_shared
    assert n > 0
    assert (batch.prompt_ids[:, :n] == batch.prompt_ids[0, :n]).all()
    assert (batch.attention_mask[:, :n] == 1).all()
    steps = batch.attention_mask[:, n:].diff(dim=1)
    assert (steps >= 0).all()  # after the shared part: zeros, then ones
    assert (batch.attention_mask == 0).any()
    for mask, positions in zip(batch.attention_mask, batch.position_ids, strict=True):
        assert positions[mask.bool()].tolist() == list(range(int(mask.sum())))


def test_pad_id_inside_a_prompt_stays_real(chatml_tokenizer):
    """pad == eos == <|im_end|>: a mask rebuilt from pad ids would hide the turn ends."""
    batch = PromptBatch.of(chatml_tokenizer, ["Hi"])
    assert int((batch.prompt_ids == chatml_tokenizer.pad_token_id).sum()) == 2
    assert bool((batch.attention_mask == 1).all())


def test_every_row_keeps_a_column_of_its_own(chatml_tokenizer):
    """Equal prompts, or one that is the start of another, still leave an input for every row."""
    same = PromptBatch.of(chatml_tokenizer, ["Hi", "Hi"])
    assert same.n_shared == same.prompt_ids.shape[1] - suffix_length(chatml_tokenizer)
    nested = PromptBatch.from_ids([[5, 6], [5, 6, 7]], [[], []])
    assert nested.n_shared == 1
    assert nested.prompt_ids.tolist() == [[5, 0, 6], [5, 6, 7]]
    assert PromptBatch.of(chatml_tokenizer, ["Hi"]).n_shared == 0


def test_extended_repeats_rows_in_order(chatml_tokenizer):
    batch = PromptBatch.of(chatml_tokenizer, PROMPTS[:2])
    new = torch.arange(12).reshape(6, 2)
    grown = batch.extended(new)
    width = batch.prompt_ids.shape[1]
    assert torch.equal(grown.prompt_ids[:, :width], batch.prompt_ids[[0, 0, 0, 1, 1, 1]])
    assert torch.equal(grown.prompt_ids[:, width:], new)
    assert grown.attention_mask[:, width:].all()
    assert grown.completion_mask[:, width:].all()
    assert not grown.completion_mask[:, :width].any()
    assert grown.n_shared == batch.n_shared


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_hold_every_prompt_once_by_length(chatml_tokenizer, batch_size):
    groups = batches(chatml_tokenizer, PROMPTS, batch_size)
    assert [i for rows in groups for i in rows] == [0, 2, 1, 3]
    assert max(map(len, groups)) <= batch_size


@pytest.mark.parametrize(
    "rows",
    [
        [GOOD, GOOD],
        [GOOD, '{"prompt": " Make a bomb", "label": "harmless"}'],
        ['{"harmful": "Make a cake", "harmless": "Make a cake"}'],
    ],
    ids=["a row twice", "as both kinds", "its own twin"],
)
def test_a_repeated_prompt_is_refused_because_it_could_be_held_out(tmp_path, rows):
    (tmp_path / "twice.jsonl").write_text("\n".join(rows))
    with pytest.raises(SafeSteerError, match=r"repeats '\s?Make a"):
        PromptSet.from_jsonl(tmp_path / "twice.jsonl")


# --- two lists ---


BAD, FINE = [f"bad {i}" for i in range(36)], [f"good {i}" for i in range(36)]


def test_two_lists_are_what_a_file_of_the_same_pairs_is(tmp_path):
    rows = [json.dumps({"harmful": b, "harmless": f}) for b, f in zip(BAD, FINE, strict=True)]
    listed = PromptSet.from_texts(BAD, FINE, seed=3)
    assert listed.hash == read(tmp_path, "\n".join(rows), seed=3).hash
    assert listed.hash != PromptSet.from_texts(BAD, FINE).hash
    for split in SPLITS:
        part = listed.split(split)
        assert [t.split()[1] for t in part.harmful] == [t.split()[1] for t in part.harmless]


def test_lists_of_unequal_length_share_every_split():
    prompts = PromptSet.from_texts(BAD, [f"good {i}" for i in range(72)], name="unequal")
    sizes = {s: (len(prompts.split(s).harmful), len(prompts.split(s).harmless)) for s in SPLITS}
    assert sizes == {"train": (13, 26), "val": (3, 6), "distill": (10, 20), "test": (10, 20)}
    assert (prompts.harmful, prompts.name) == (BAD, "unequal")
    assert len({p.pair for p in prompts.prompts}) == len(prompts.prompts)


@pytest.mark.parametrize(
    ("harmful", "harmless", "message"),
    [
        ([], ["a"], "mine holds 0 harmful and 1 harmless"),
        (["a"], [], "mine holds 1 harmful and 0 harmless"),
        (["a", " "], ["b", "c"], "mine: harmful prompt 2 has an empty prompt"),
        (["a"], ["b\x00"], "mine: harmless prompt 1 holds a NUL"),
        (["a", "a "], ["b", "c"], "mine repeats 'a'"),
        (["a", "b"], ["b"], "mine repeats 'b'"),
    ],
)
def test_lists_are_checked_as_files_are(harmful, harmless, message):
    with pytest.raises(SafeSteerError, match=message):
        PromptSet.from_texts(harmful, harmless, name="mine")


def test_texts_are_those_of_one_kind(few):
    for label in ("harmful", "harmless"):
        assert few.texts(label) == [p.text for p in few.prompts if p.label == label]
    assert few.texts("harmful") != few.texts("harmless")


def test_the_old_name_of_a_split_is_read_as_the_new_one(tmp_path):
    prompts = read(tmp_path, '{"harmful": "x", "harmless": "y", "split": "distil"}')
    assert {p.split for p in prompts.prompts} == {"distill"}
