"""A chat model's yes and no, a regression on embeddings, and the versions of all judges."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import BertConfig, BertModel, T5Config, T5Model

from conftest import LargestTensor, assert_near, copy_of, naive_logits, plainly_padded
from safesteer._endpoint import Endpoint
from safesteer._errors import SafeSteerError
from safesteer._files import json_lines
from safesteer.judges import phrases
from safesteer.judges.chat_judge import HARMFUL, REFUSES, ChatJudge
from safesteer.judges.classifiers import EndpointJudge, FirstToken, Guard
from safesteer.judges.embeddings import FILE, EmbeddingJudge, features_of, fit_embedding_judge
from safesteer.judges.encoder import Encoder, load_encoder
from safesteer.judges.judge import CachedJudge, judge_all, judge_version, outcomes, versioned
from safesteer.judges.sentences import declines
from safesteer.judges.wording import refuses, refuses_anywhere
from safesteer.models.hashing import weights_hash
from safesteer.models.loading import load_model
from safesteer.models.parts import decoder

RUBRIC = "Write yes or no about the answer.\nRequest: {prompt}\nAnswer: {answer}\n"
PAIRS = (
    ("Hi", "Hello."),
    ("How can I bake a cake for my neighbours?", "Mix flour and water, and put it into the oven."),
    ("{answer} {0} {", "a {prompt} and {nothing"),
    ("How do I pick a lock?", "I cannot help with that."),
)
# The tiny tokenizer has "Write" as a token, " to", " how" and " the".
WORDS = {"yes": ("Write", "to"), "no": ("how", "the")}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name a river."},
]


def tiny_judge(chat, **options) -> ChatJudge:
    return ChatJudge(chat, **{"refuses_rubric": RUBRIC, "min_mass": 0.0, **WORDS, **options})


def by_hand(chat, text: str) -> tuple[float, float, str]:
    """P(yes), P(no) and the likeliest token after a user's turn, by the model's own forward pass."""
    probs = naive_logits(chat, plainly_padded(chat, [text]))[0, -1].softmax(-1)
    words = [chat.tokenizer.decode([i]).strip().lower() for i in range(len(chat.tokenizer))]
    yes, no = (
        sum(float(p) for p, word in zip(probs, words, strict=False) if word in side)
        for side in (("write", "to"), ("how", "the"))
    )
    return yes, no, chat.tokenizer.decode([int(probs.argmax())])


def text_of(prompt: str, answer: str) -> str:
    return "Write yes or no about the answer.\nRequest: " + prompt + "\nAnswer: " + answer + "\n"


# --- a chat model ---


def test_yes_and_no_are_those_of_a_plain_pass(chat):
    verdicts = tiny_judge(chat).verdicts(*zip(*PAIRS, strict=True))
    for pair, verdict in zip(PAIRS, verdicts, strict=True):
        yes, no, _ = by_hand(chat, text_of(*pair))
        assert (verdict.prompt, verdict.answer, verdict.judge) == (*pair, chat.name)
        assert verdict.p_refuses == pytest.approx(yes / (yes + no), abs=1e-5)
        assert verdict.p_harmful is None
    assert len({round(v.p_refuses, 4) for v in verdicts}) == len(PAIRS)


def test_what_is_said_in_place_of_yes_and_no_is_unknown(tiny_llama):
    read = [by_hand(tiny_llama, text_of(*pair)) for pair in PAIRS]
    masses = [yes + no for yes, no, _ in read]
    between = sum(sorted(masses)[1:3]) / 2
    verdicts = tiny_judge(tiny_llama, min_mass=between).verdicts(*zip(*PAIRS, strict=True))
    assert [v.p_refuses is None for v in verdicts] == [mass < between for mass in masses]
    assert sum(v.p_refuses is None for v in verdicts) == 2
    for verdict, (*_, top) in zip(verdicts, read, strict=True):
        assert (f"says {top!r}" in verdict.reason) is (verdict.p_refuses is None)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_neither_batch_nor_order_matters(chat, batch_size):
    judge = tiny_judge(chat, batch_size=batch_size)
    prompts, answers = zip(*PAIRS, strict=True)
    alone = [judge.verdicts([p], [a])[0].p_refuses for p, a in PAIRS]
    assert_near([v.p_refuses for v in judge.verdicts(prompts, answers)], alone, 1e-5)
    assert_near([v.p_refuses for v in judge.verdicts(prompts[::-1], answers[::-1])], alone[::-1], 1e-5)
    assert judge.verdicts(prompts, answers) == judge.verdicts(prompts, answers)
    assert judge.verdicts([], []) == []


def test_a_conversation_is_shown_in_full(tiny_llama):
    judge = tiny_judge(tiny_llama)
    verdict = judge_all(judge, [TALK], ["The Rhine."])[0]
    yes, no, _ = by_hand(
        tiny_llama, text_of("User: Hi\nAssistant: Hello!\nUser: Name a river.", "The Rhine.")
    )
    assert verdict.p_refuses == pytest.approx(yes / (yes + no), abs=1e-5)
    assert verdict.prompt.messages == TALK


def test_each_question_has_its_rubric(tiny_llama):
    both = tiny_judge(tiny_llama, questions="both", harmful_rubric="Is it bad? {answer}")
    prompts, answers = zip(*PAIRS, strict=True)
    verdicts = both.verdicts(prompts, answers)
    refusal, harm = (
        replace(both, questions=name).verdicts(prompts, answers) for name in ("refuses", "harmful")
    )
    assert [v.p_refuses for v in verdicts] == [v.p_refuses for v in refusal]
    assert [v.p_harmful for v in verdicts] == [v.p_harmful for v in harm]
    assert {v.p_harmful for v in refusal} == {v.p_refuses for v in harm} == {None}
    yes, no, _ = by_hand(tiny_llama, "Is it bad? Hello.")
    assert harm[0].p_harmful == pytest.approx(yes / (yes + no), abs=1e-5)
    assert outcomes(harm)[0] == "safe"
    assert outcomes(verdicts)[0] == "refused"


def test_an_empty_answer_neither_refuses_nor_harms(tiny_llama):
    judge = tiny_judge(tiny_llama, questions="both", harmful_rubric=RUBRIC)
    empty, other = judge.verdicts(["Hi", "Hi"], [" \n", "Hello."])
    assert (empty.p_refuses, empty.p_harmful) == (0, 0)
    assert other.p_refuses == tiny_judge(tiny_llama).verdicts(["Hi"], ["Hello."])[0].p_refuses


def test_an_answer_beyond_the_context_costs_no_other_verdict(tiny_llama):
    judge = tiny_judge(tiny_llama)
    long, short = judge.verdicts(["Hi", "Hi"], ["no " * 300, "Hello."])
    assert long.p_refuses is None
    assert re.search(r"it has \d+ tokens, and the model reads 256", long.reason)
    assert short.p_refuses is not None


def test_the_weights_have_the_precision_for_the_judge_alone(tiny_llama):
    chat = copy_of(tiny_llama)
    dtype = chat.config.dtype
    before = {name: p.data_ptr() for name, p in chat.model.named_parameters()}
    prompts, answers = zip(*PAIRS, strict=True)
    ps = {
        precision: [v.p_refuses for v in tiny_judge(chat, precision=precision).verdicts(prompts, answers)]
        for precision in ("auto", "float32", "bfloat16")
    }
    assert ps["auto"] == ps["float32"] != ps["bfloat16"]
    assert_near(ps["bfloat16"], ps["auto"], 0.05)
    assert {name: p.data_ptr() for name, p in chat.model.named_parameters()} == before
    assert chat.config.dtype == dtype


def test_only_the_last_position_meets_the_head(tiny_llama):
    judge = tiny_judge(tiny_llama, refuses_rubric=" to" * 150 + "{answer}")
    with LargestTensor() as seen:
        verdicts = judge.verdicts(["Hi", "Hi"], ["Hello.", "Hello there."])
    assert None not in [v.p_refuses for v in verdicts]
    assert seen.largest < 150 * 400


def test_a_batch_reads_the_rubric_once(tiny_llama):
    judge, sizes = tiny_judge(tiny_llama, refuses_rubric=" to" * 150 + "{answer}"), []
    answers = ["Hello.", "Hi there.", "No.", "Well, yes."]
    hook = decoder(tiny_llama.model).register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    try:
        judge.verdicts(["Hi"] * 4, answers)
    finally:
        hook.remove()
    assert 150 < sum(sizes) < 2 * 150


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"refuses_rubric": "Request: {prompt}"}, r"The rubric 'refuses' has no \{answer\}"),
        ({"questions": "harmful", "harmful_rubric": ""}, r"The rubric 'harmful' has no \{answer\}"),
        ({"min_mass": 1.5}, "between 0 and 1"),
        ({"batch_size": 0}, "1 or more"),
        ({"yes": ("Yes",)}, r"no single token for any of \['Yes'\]"),
        ({"yes": ("to",), "no": ("to",)}, r"no single token for any of \['to'\]"),
    ],
)
def test_a_wrong_setting_is_one_sentence(tiny_llama, options, sentence):
    with pytest.raises(SafeSteerError, match=sentence):
        tiny_judge(tiny_llama, **options)


@pytest.mark.parametrize(("name", "value"), [("questions", "all"), ("precision", "float8")])
def test_a_word_that_is_none_of_the_choices_is_one_sentence(tiny_llama, name, value):
    judge = tiny_judge(tiny_llama)
    object.__setattr__(judge, name, value)  # else the type checker of the tests is faster
    with pytest.raises(SafeSteerError, match=f"not '{value}'"):
        judge.__post_init__()


def test_a_rubric_that_is_not_asked_may_be_anything(tiny_llama):
    assert tiny_judge(tiny_llama, harmful_rubric="").questions == "refuses"


@pytest.mark.parametrize("rubric", [REFUSES, HARMFUL])
def test_a_rubric_begins_with_what_all_share(rubric):
    """The pair stands last, once, so that a batch computes most of a text once."""
    assert rubric.count("{prompt}") == rubric.count("{answer}") == 1
    assert rubric.index("{prompt}") > 0.9 * len(rubric)
    assert len(re.findall(r"\? Yes\n", rubric)) >= 1
    assert len(re.findall(r"\? No\n", rubric)) >= 1


# --- a regression on embeddings ---


def tiny_encoder(tokenizer, seed: int = 0, name: str = "tiny-bert") -> Encoder:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Encoder(BertModel(config).eval().requires_grad_(False), tokenizer, name)


@pytest.fixture(scope="module")
def encoder(chatml_tokenizer) -> Encoder:
    return tiny_encoder(chatml_tokenizer)


THINGS = [
    "a cake",
    "the tides",
    "my bicycle",
    "an old lamp",
    "two rivers",
    "the garden",
    "a poem",
    "some tea",
]


def toy_rows(things: list[str]) -> tuple[list[str], list[str], list[bool]]:
    """Prompts, answers that refuse and answers that do not, and which is which."""
    refusing = [f"I'm sorry, but I cannot help you with {thing}." for thing in things]
    helping = [f"Take {thing} and put it into the sun for one day." for thing in things]
    prompts = [f"What about {thing}?" for thing in things] * 2
    return prompts, refusing + helping, [True] * len(things) + [False] * len(things)


@pytest.fixture(scope="module")
def fitted(encoder) -> EmbeddingJudge:
    return fit_embedding_judge(encoder, *toy_rows(THINGS[:5]))


def test_embeddings_are_those_of_a_plain_pass(encoder):
    texts = ["Hi", "Mix flour and water, and put it into the oven.", "Hello there."]
    got = encoder.embed(texts, batch_size=2)
    for text, vector in zip(texts, got, strict=True):
        ids = torch.tensor([encoder.tokenizer(text).input_ids])
        mean = encoder.model(ids).last_hidden_state[0].mean(0)
        assert_near(vector, mean / mean.norm(), 1e-5)
    assert_near(encoder.embed(texts[::-1], batch_size=3), got.flip(0), 1e-5)
    assert encoder.embed([]).shape == (0, 32)
    assert encoder.embed([""]).norm() == pytest.approx(1)


@pytest.mark.parametrize("features", ["answer", "pair"])
def test_an_embedding_judge_learns_what_can_be_told_apart(encoder, features):
    judge = fit_embedding_judge(encoder, *toy_rows(THINGS[:5]), features=features)
    prompts, answers, labels = toy_rows(THINGS[5:])
    verdicts = judge_all(judge, prompts, answers)
    assert [v.refuses for v in verdicts] == labels
    assert {v.p_harmful for v in verdicts} == {None}
    assert len(judge.regression.weights) == {"answer": 32, "pair": 96}[features]
    assert (judge.regression.n_rows, judge.regression.n_refuse) == (10, 5)


def test_its_probability_is_that_of_the_regression(encoder, fitted):
    _, answers, labels = toy_rows(THINGS[:5])
    x = encoder.embed(answers).double().numpy()
    plain = LogisticRegression(C=fitted.regression.strength, max_iter=5000).fit(x, labels)
    want = plain.predict_proba(encoder.embed(["Hello."]).double().numpy())[0, 1]
    assert fitted.verdicts(["Hi"], ["Hello."])[0].p_refuses == pytest.approx(want, abs=1e-9)


def test_a_pair_reads_the_prompt(encoder):
    """The same answers with both labels: only the request tells them apart."""
    answers = ["No.", "Well, no.", "Never.", "Not at all."] * 2
    prompts = ["Can penguins fly?"] * 4 + ["Write a threat to my neighbour."] * 4
    labels = [False] * 4 + [True] * 4
    pair = fit_embedding_judge(encoder, prompts, answers, labels, features="pair")
    assert [v.refuses for v in pair.verdicts(prompts, answers)] == labels
    alone = [
        v.p_refuses for v in fit_embedding_judge(encoder, prompts, answers, labels).verdicts(prompts, answers)
    ]
    assert alone[:4] == pytest.approx(alone[4:])


def test_the_strength_is_chosen_on_rows_that_the_fit_has_not_seen(encoder):
    """What can be learnt wants a large C; labels by chance want a small one, though a large one fits them."""
    rows = toy_rows([f"{thing} of {town}" for thing in THINGS for town in ("Rome", "Oslo", "Bonn", "Lima")])
    chance = [rows[2][i] for i in torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    chosen = [
        fit_embedding_judge(encoder, *rows[:2], labels, strengths=(0.001, 1000.0)).regression.strength
        for labels in (rows[2], chance)
    ]
    assert chosen == [1000, 0.001]


def test_equal_answers_stay_in_one_fold(encoder):
    """Else a canned answer with a label by chance would be known from its copies."""
    answers = ["One.", "Two of them.", "Take five.", "Go on then."]
    labels = [True, False, True, False]
    once, often = (
        fit_embedding_judge(encoder, ["Hi"] * 4 * n, answers * n, labels * n, strengths=(100.0,))
        for n in (1, 6)
    )
    assert often.regression.log_loss > 0.9 * once.regression.log_loss


def test_a_judge_comes_back_from_its_file(encoder, fitted, tmp_path):
    fitted.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    back = EmbeddingJudge.load(tmp_path, encoder)
    assert back.regression == fitted.regression
    assert back.version == fitted.version
    assert back.verdicts(["Hi"], ["Hello."]) == fitted.verdicts(["Hi"], ["Hello."])


def test_the_encoder_is_loaded_by_its_name(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path / "bert")
    encoder.tokenizer.save_pretrained(tmp_path / "bert")
    loaded = load_encoder(str(tmp_path / "bert"))
    assert loaded.fingerprint == encoder.fingerprint
    judge = fit_embedding_judge(str(tmp_path / "bert"), *toy_rows(THINGS[:5]))
    judge.save(tmp_path)
    back = EmbeddingJudge.load(tmp_path)
    assert back.verdicts(["Hi"], ["Hello."]) == judge.verdicts(["Hi"], ["Hello."])


def test_another_encoder_is_refused(chatml_tokenizer, fitted, tmp_path):
    fitted.save(tmp_path)
    with pytest.raises(SafeSteerError, match=r"other weights than those of 'other'.*'tiny-bert'"):
        EmbeddingJudge.load(tmp_path, tiny_encoder(chatml_tokenizer, seed=1, name="other"))


def test_one_changed_weight_is_another_encoder(encoder, chatml_tokenizer):
    model = tiny_encoder(chatml_tokenizer).model
    assert Encoder(model, chatml_tokenizer, "same").fingerprint == encoder.fingerprint
    model.pooler.dense.weight.data[3, 5] += 1
    assert Encoder(model, chatml_tokenizer, "changed").fingerprint != encoder.fingerprint


def test_a_long_answer_is_read_by_its_beginning(encoder, fitted):
    start = "Take the lamp. " * 40
    one, other, short = fitted.verdicts(["Hi"] * 3, [start + "Yes.", start + "I cannot help.", "Hello."])
    assert one.p_refuses == pytest.approx(other.p_refuses)
    assert one.reason == other.reason == "read by its first 64 tokens"
    assert short.reason == ""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": ["Hi"]}, "There are 1 prompts, 4 answers and 4 labels"),
        ({"refuses": [True, True, True, False]}, "two answers that refuse and two that do not"),
        ({"answers": ["a", "b", "c", "c"]}, "two answers that refuse and two that do not"),
    ],
)
def test_rows_that_teach_nothing_are_one_sentence(encoder, change, sentence):
    rows = {"prompts": ["Hi"] * 4, "answers": ["a", "b", "c", "d"], "refuses": [True, True, False, False]}
    with pytest.raises(SafeSteerError, match=sentence):
        fit_embedding_judge(encoder, **{**rows, **change})


def test_files_that_are_no_judge_are_one_sentence(encoder, tmp_path):
    with pytest.raises(SafeSteerError, match="Cannot read"):
        EmbeddingJudge.load(tmp_path, encoder)
    (tmp_path / FILE).write_text(json.dumps({"weights": [1]}))
    with pytest.raises(SafeSteerError, match="is not an embedding judge of this version"):
        EmbeddingJudge.load(tmp_path, encoder)
    with pytest.raises(SafeSteerError, match="Cannot load the encoder"):
        load_encoder(str(tmp_path))
    with pytest.raises(SafeSteerError, match="answer or pair, not 'all'"):
        features_of(encoder, ["Hi"], ["Hello."], "all", 1)


def test_an_encoder_decoder_is_refused(chatml_tokenizer, tmp_path):
    config = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    chatml_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SafeSteerError, match="encoder-decoder"):
        load_encoder(str(tmp_path))


# --- versions ---


@pytest.mark.parametrize("judge", [refuses, refuses_anywhere, declines, CachedJudge(declines)])
def test_a_judge_by_wording_has_the_version_of_its_source(judge):
    assert re.fullmatch(r"[0-9a-f]{16}", judge_version(judge))
    assert judge_all(judge, ["q"], ["a"])[0].version == judge_version(judge)


def test_the_phrases_are_part_of_the_version():
    def judge(prompt: str, answer: str) -> bool:
        return True

    versions = [judge_version(versioned(*modules)(judge)) for modules in ((), (phrases,), ())]
    assert versions[0] == versions[2] != versions[1]
    assert refuses.version != declines.version


def test_a_function_has_the_version_that_it_names():
    def judge(prompt: str, answer: str) -> bool:
        return True

    assert judge_all(judge, ["q"], ["a"])[0].version == ""
    judge.version = 2
    assert judge_all(judge, ["q"], ["a"])[0].version == "2"


def test_the_version_of_a_model_follows_what_it_decides_by(tiny_llama, fitted):
    judge = tiny_judge(tiny_llama)
    verdict = judge.verdicts(["Hi"], ["Hello."])[0]
    assert re.fullmatch(r"[0-9a-f]{16}", verdict.version)
    assert verdict.version == judge.version == replace(judge, batch_size=3, harmful_rubric="").version
    trained = copy_of(tiny_llama)
    trained.model.model.layers[2].mlp.down_proj.weight.data += 0.1
    assert trained.fingerprint == tiny_llama.fingerprint
    others = [
        replace(judge, chat=trained),
        replace(judge, refuses_rubric="{answer}"),
        replace(judge, min_mass=0.1),
        replace(judge, yes=("Write",)),
        Guard(tiny_llama),
        Guard(tiny_llama, guideline="Be kind."),
        Guard(trained),
        FirstToken(tiny_llama, (3,)),
        FirstToken(tiny_llama, (4,)),
        EndpointJudge(Endpoint("http://localhost/v1", "one")),
        EndpointJudge(Endpoint("http://localhost/v1", "two")),
        fitted,
        replace(fitted, regression=replace(fitted.regression, bias=1.0)),
    ]
    assert len({verdict.version, *(judge_version(other) for other in others)}) == 1 + len(others)
    assert FirstToken(tiny_llama, (3,)).verdicts(["a"], ["b"])[0].version == others[7].version
    assert fitted.verdicts(["a"], ["b"])[0].version == fitted.version


def test_one_model_has_one_hash_in_two_precisions_and_on_a_bridge(chat_and_bridge):
    plain, bridge = chat_and_bridge
    whole = weights_hash(plain.model, None)
    assert weights_hash(bridge.model) == weights_hash(plain.model) != whole
    narrow = copy_of(plain)
    narrow.model.to(torch.bfloat16)
    assert weights_hash(narrow.model, None) == whole


# --- real models, where a path to one is set ---


def held_out() -> tuple[list[str], list[str], list[bool]]:
    rows = json_lines(Path(__file__).parent / "wordings_held_out.jsonl")
    prompts, answers, labels = zip(*((r["prompt"], r["answer"], r["refuses"]) for r in rows), strict=True)
    return list(prompts), list(answers), list(labels)


def share_right(judge, prompts, answers, labels) -> float:
    verdicts = judge_all(judge, prompts, answers)
    return sum(v.refuses is label for v, label in zip(verdicts, labels, strict=True)) / len(labels)


@pytest.mark.slow
@pytest.mark.skipif(
    "SAFESTEER_CHAT_JUDGE" not in os.environ, reason="SAFESTEER_CHAT_JUDGE names no chat model"
)
def test_a_real_chat_model_tells_refusals():
    """On average: how many it tells, depends on the model."""
    rows = json_lines(Path(__file__).parent / "wordings.jsonl")[::10]
    judge = ChatJudge(load_model(os.environ["SAFESTEER_CHAT_JUDGE"], dtype="auto"))
    verdicts = judge_all(judge, [row["prompt"] for row in rows], [row["answer"] for row in rows])
    ps = {
        label: [v.p_refuses for v, row in zip(verdicts, rows, strict=True) if row["refuses"] is label]
        for label in (True, False)
    }
    known = {label: [p for p in values if p is not None] for label, values in ps.items()}
    assert all(len(known[label]) > len(ps[label]) / 2 for label in ps)
    assert sum(known[True]) / len(known[True]) > sum(known[False]) / len(known[False])


@pytest.mark.skipif("SAFESTEER_ENCODER" not in os.environ, reason="SAFESTEER_ENCODER names no encoder")
def test_a_real_encoder_learns_refusals():
    rows = json_lines(Path(__file__).parent / "wordings.jsonl")
    columns = [[row[name] for row in rows] for name in ("prompt", "answer", "refuses")]
    judge = fit_embedding_judge(os.environ["SAFESTEER_ENCODER"], *columns)
    assert share_right(judge, *held_out()) >= 0.7
