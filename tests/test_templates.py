"""Prompts as people have them: conversations, templates of all kinds; answers that are the model's own."""

import copy
import hashlib
import json
from dataclasses import asdict

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from conftest import CHATML, PROMPTS, _bpe, copy_of
from safesteer._errors import SafeSteerError
from safesteer.attribution.coverage import read_answers
from safesteer.attribution.explanation import explain
from safesteer.attribution.tracing import trace
from safesteer.directions.calibration import choose_coeff
from safesteer.directions.finding import find_direction
from safesteer.directions.refusal_tokens import learn_refusal_tokens, refusal_scores
from safesteer.directions.shifts import representation_shift
from safesteer.evaluation.scores import Evaluation, evaluate
from safesteer.judges.classifiers import Guard
from safesteer.judges.judge import judge_all
from safesteer.judges.wording import refuses
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import last_logits
from safesteer.models.generation import generate, generate_ids, uniforms
from safesteer.models.loading import load_model
from safesteer.models.templates import (
    control_ids,
    end_of_turn,
    leaves_thinking_out,
    render,
    set_template,
    special_start,
    suffix_length,
    template_hash,
)
from safesteer.models.text_loss import perplexity
from safesteer.prompts.conversation import Conversation, as_prompts
from safesteer.prompts.prompt_set import Prompt, PromptSet
from safesteer.settings import DirectionConfig, EvaluateConfig, ExplainConfig, TokenConfig
from safesteer.tokens.sampling import sample_answers
from safesteer.tokens.selection import banned_ids
from safesteer.tokens.token_set import SafetyToken, TokenSet

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Explain how tides work."},
]
THINKING = (
    CHATML + "{% if add_generation_prompt and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}" + CHATML


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


# --- answers are the model's own ---


def test_nothing_of_a_checkpoints_generation_config_reaches_answers(tiny_llama):
    clean, odd = copy_of(tiny_llama), copy_of(tiny_llama)
    greedy = generate(clean, PROMPTS, max_new_tokens=6)
    (_, batch) = next(clean.batched(PROMPTS[:2], 2))
    drawn = torch.cat([uniforms((0, i), 1, 6) for i in range(2)])
    sampled = generate_ids(clean, batch, max_new_tokens=6, temperature=1.0, uniform=drawn)
    common = int(generate_ids(clean, batch, max_new_tokens=1)[0, 0])
    rules = {
        "suppress_tokens": [common],
        "begin_suppress_tokens": [common],
        "bad_words_ids": [[common]],
        "sequence_bias": [[[7], 50.0]],
        "min_new_tokens": 5,
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 3.0,
        "min_p": 0.5,
        "top_k": 1,
        "num_beams": 3,
        "do_sample": True,
        "forced_eos_token_id": 9,
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "stop_strings": ["e"],
        "max_length": 4,
    }
    eos = odd.model.generation_config.eos_token_id
    for name, value in rules.items():
        odd.model.generation_config = GenerationConfig(**{name: value}, eos_token_id=eos)
        assert generate(odd, PROMPTS, max_new_tokens=6) == greedy, name
        got = generate_ids(odd, batch, max_new_tokens=6, temperature=1.0, uniform=drawn)
        assert torch.equal(got, sampled), name
        assert getattr(odd.model.generation_config, name) == value


def chat_with(tiny_llama: ChatModel, special: list[str], template: str, eos: str) -> ChatModel:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bpe(special), eos_token=eos, chat_template=template)
    chat = ChatModel(copy_of(tiny_llama).model, tokenizer, "marked")
    chat.model.generation_config.eos_token_id = tokenizer.eos_token_id
    return chat


def test_the_templates_end_of_turn_ends_answers(tiny_llama):
    chat = chat_with(tiny_llama, ["</s>", "<|im_start|>", "<|im_end|>"], CHATML, "</s>")
    turn = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(chat.tokenizer) == turn
    assert chat.eos_ids == sorted([chat.tokenizer.eos_token_id, turn])
    assert chat.decode_answer([*chat.encode("A river"), turn, *chat.encode(" and more")]) == "A river"
    (_, batch) = next(chat.batched(["Hi"], 1))
    assert turn not in generate_ids(chat, batch, max_new_tokens=8)[0].tolist()
    # The model now says end of turn, whatever it reads.
    chat.model.lm_head.register_forward_hook(
        lambda head, args, out: out.index_fill(-1, torch.tensor([turn]), 1e4)
    )
    ids = generate_ids(chat, batch, max_new_tokens=8)[0].tolist()
    assert ids[0] == turn
    assert set(ids[1:]) <= {chat.eos_ids[0]}


def test_a_template_without_an_end_of_turn_has_none(chatml_tokenizer):
    assert end_of_turn(with_template(chatml_tokenizer, "{{ messages[-1]['content'] }}")) is None


def test_control_tokens_are_never_safety_tokens(tiny_llama):
    inst = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    chat = chat_with(tiny_llama, ["</s>"], inst, "</s>")
    chat.tokenizer.add_tokens(["[INST]", "[/INST]", "<start_of_turn>", "<|call|>", "    ", "saffron"])
    marks = chat.tokenizer.convert_tokens_to_ids(["</s>", "[INST]", "[/INST]", "<start_of_turn>", "<|call|>"])
    assert control_ids(chat.tokenizer) == sorted(marks)
    inside = [i for i in marks if i < chat.d_vocab]
    assert bool(banned_ids(chat)[inside].all())
    assert not banned_ids(chat)[chat.tokenizer.convert_tokens_to_ids("a")]


def test_words_that_stand_in_a_templates_code_are_no_marks(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.add_tokens(["content", "messages"])
    assert control_ids(tokenizer) == sorted(tokenizer.all_special_ids)


def test_control_tokens_start_no_refusal(tiny_llama):
    """The likeliest first token is a mark that the template writes: no candidate all the same."""
    chat = chat_with(tiny_llama, ["</s>", "[INST]"], CHATML.replace("<|im_start|>", "[INST]"), "</s>")
    mark = chat.tokenizer.convert_tokens_to_ids("[INST]")
    chat.tokenizer.extra_special_tokens = []
    assert mark in control_ids(chat.tokenizer)
    head = chat.model.lm_head.weight.detach().clone()
    (_, batch) = next(chat.batched(["Hi"], 1))
    with torch.no_grad():
        head[mark] = 10 * chat.model.model(batch.prompt_ids).last_hidden_state[0, -1]
        chat.model.lm_head.weight = torch.nn.Parameter(head)
    assert int(last_logits(chat, batch).argmax()) == mark
    table = learn_refusal_tokens(chat, ["Hi"], ["Hi"], lambda prompt, answer: False, n_candidates=2).table
    assert mark not in table.token_id.tolist()


def test_a_mark_after_a_space_ends_a_turn_and_white_space_does_not(chatml_tokenizer):
    spaced = with_template(chatml_tokenizer, CHATML.replace("<|im_end|>", " <|im_end|>"))
    assert end_of_turn(spaced) == spaced.convert_tokens_to_ids("<|im_end|>")
    lines = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    blank = with_template(chatml_tokenizer, lines)
    blank.add_tokens(["\n\n"])
    assert end_of_turn(blank) is None
    blank.chat_template = CHATML  # what was found for one template is not kept for another
    assert end_of_turn(blank) == blank.convert_tokens_to_ids("<|im_end|>")


def test_rules_in_a_models_config_reach_no_answer_either(tiny_llama):
    """transformers refuses to generate with them unless it is told how."""
    odd = copy_of(tiny_llama)
    odd.model.config.num_beams, odd.model.config.do_sample = 3, True
    assert generate(odd, PROMPTS, max_new_tokens=4) == generate(tiny_llama, PROMPTS, max_new_tokens=4)


# --- templates ---


def test_the_hash_is_what_it_was_for_templates_without_a_date(chatml_tokenizer):
    text = render(chatml_tokenizer, "x")
    ids = chatml_tokenizer(text, add_special_tokens=False).input_ids
    assert (
        template_hash(chatml_tokenizer) == hashlib.sha256(json.dumps([text, ids]).encode()).hexdigest()[:16]
    )


def test_the_hash_of_a_dated_template_is_the_same_tomorrow(chatml_tokenizer, monkeypatch):
    dated = with_template(chatml_tokenizer, DATED)
    texts, hashes = set(), set()
    for day in (1, 2):

        class Clock(chat_template_utils.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2026, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        texts.add(render(dated, "x"))
        hashes.add(template_hash(dated))
    assert len(texts) == 2
    assert len(hashes) == 1
    assert hashes != {template_hash(with_template(chatml_tokenizer, DATED.replace("Today", "Now")))}


def test_arguments_of_a_template_are_defaults(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, THINKING)
    off = render(tokenizer, "x")
    assert off.endswith("<think></think>")
    assert leaves_thinking_out(tokenizer)
    assert not leaves_thinking_out(chatml_tokenizer)
    set_template(tokenizer, None, {"enable_thinking": True})
    assert render(tokenizer, "x") == off.removesuffix("<think></think>")
    assert not leaves_thinking_out(tokenizer)  # chosen: an export renders the same
    assert template_hash(tokenizer) != template_hash(with_template(chatml_tokenizer, THINKING))
    talk = [{"role": "user", "content": "x"}]
    asked = tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert asked == off
    again = with_template(chatml_tokenizer, THINKING)
    set_template(again, None, ["enable_thinking=true", "name=Sam"])
    assert render(again, "x") == render(tokenizer, "x")
    with pytest.raises(SafeSteerError, match="name=value, not 'thinking'"):
        set_template(again, None, ["thinking"])
    with pytest.raises(SafeSteerError, match="template argument tools"):
        set_template(tokenizer, None, {"tools": object()})
    with pytest.raises(SafeSteerError, match="name without spaces"):
        set_template(tokenizer, None, {"enable thinking": True})


@pytest.mark.parametrize("value", ["a \U0001f600 \"'{{%}", None, [True, None, {"a": False}], 2.5])
def test_arguments_reach_the_template_as_transformers_passes_them(chatml_tokenizer, value):
    template = "\n{{ x }}{{ x is none }}" + CHATML  # a first line break is the template's own
    tokenizer = with_template(chatml_tokenizer, template)
    talk = [{"role": "user", "content": "Hi"}]
    want = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, x=value)
    set_template(tokenizer, None, {"x": value})
    assert render(tokenizer, "Hi") == want


def test_arguments_of_an_exported_template_stay_when_others_are_added(chatml_tokenizer):
    tokenizer = with_template(chatml_tokenizer, "{{ x }}" + THINKING)
    set_template(tokenizer, None, {"enable_thinking": True})
    set_template(tokenizer, None, {"x": "mine "})
    text = render(tokenizer, "Hi")
    assert text.startswith("mine ")
    assert "<think>" not in text


@pytest.mark.parametrize("template", ["raw", "plain", "chatml"])
def test_base_models_take_a_named_template(tiny_llama, tmp_path, template, llama3_tokenizer):
    llama3 = with_template(llama3_tokenizer, None)
    tiny_llama.model.save_pretrained(tmp_path)
    llama3.save_pretrained(tmp_path)
    with pytest.raises(SafeSteerError, match="template='raw'"):
        load_model(str(tmp_path), device="cpu")
    chat = load_model(str(tmp_path), device="cpu", template=template)
    text = render(chat.tokenizer, "Name a river.")
    assert text.startswith("<|begin_of_text|>")  # as this tokenizer puts it first
    assert text.count("Name a river.") == 1
    if template == "raw":
        assert text == "<|begin_of_text|>Name a river."
        ids = next(chat.batched(["Name a river."], 1))[1].prompt_ids[0].tolist()
        assert ids == chat.tokenizer("Name a river.").input_ids
        assert suffix_length(chat.tokenizer) == 1
    assert len(generate(chat, PROMPTS, max_new_tokens=3)) == len(PROMPTS)


def test_a_jinja_file_is_a_template(tiny_llama, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'Q: ' + messages[-1]['content'] + ' A:' }}")
    chat = copy_of(tiny_llama)
    tokenizer = copy.deepcopy(chat.tokenizer)
    set_template(tokenizer, str(file))
    assert render(tokenizer, "Why?") == "Q: Why? A:"
    with pytest.raises(SafeSteerError, match="is no chat template"):
        set_template(tokenizer, "alpaka")


def test_a_template_that_drops_the_system_turn_gets_it_in_the_users(chatml_tokenizer):
    deaf = with_template(
        chatml_tokenizer,
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + '|' }}{% endif %}{% endfor %}",
    )
    assert render(deaf, "Hello", system="Be kind.") == "Be kind.\n\nHello|"
    assert render(deaf, "Be kind. Hello", system="Be kind.") == "Be kind.\n\nBe kind. Hello|"


def test_a_system_prompt_stands_before_the_users_first_words(chatml_tokenizer):
    strict = with_template(
        chatml_tokenizer,
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['role'][0] + ':' + m['content'] + '|' }}{% endfor %}",
    )
    talk = [{"role": "assistant", "content": "Welcome."}, *TALK[1:]]
    text = render(strict, talk, system="Be kind.")
    assert text == "a:Welcome.|u:Be kind.\n\nHi|a:Hello!|u:Explain how tides work.|"


def test_a_direction_is_found_where_a_template_refuses_the_system_role(tiny_llama, pairs):
    tokenizer = with_template(
        tiny_llama.tokenizer,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML.replace("{% if loop.first", "{% if false and loop.first"),
    )
    chat = ChatModel(tiny_llama.model, tokenizer, "no-system")
    config = DirectionConfig(n_train=4, n_val=2, n_compare_prompts=2, n_held_out=0, controls=())
    assert find_direction(chat, pairs, config).vector.norm() > 0


def test_plain_text_is_read_as_the_tokenizer_reads_it():
    """A tokenizer that puts a space before a text, and none after a special token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["Name a river. User: Assistant:"] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for template in ("raw", "plain"):
        set_template(tokenizer, template)
        text = render(tokenizer, "Name a river.")
        ids = PromptBatch.of(tokenizer, ["Name a river."]).prompt_ids[0].tolist()
        assert ids == tokenizer(text.removeprefix("<s>")).input_ids
    assert ids != tokenizer(text, add_special_tokens=False).input_ids


# --- conversations ---


def test_a_conversation_is_rendered_as_transformers_renders_it(tiny_llama):
    want = tiny_llama.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    (talk,) = as_prompts([TALK])
    assert render(tiny_llama.tokenizer, talk) == want
    ids = torch.tensor([tiny_llama.encode(want)])
    out = tiny_llama.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    assert generate(tiny_llama, [TALK, "Hi"], max_new_tokens=5)[0] == tiny_llama.decode_answer(out)


def test_a_conversation_is_a_string_with_its_turns():
    talk, other = Conversation(TALK), Conversation(TALK[-1:])
    assert str.__eq__(talk, "Explain how tides work.")
    assert talk != other
    assert talk != "Explain how tides work."
    assert len({talk, other, Conversation(TALK)}) == 2
    assert copy.deepcopy(talk) == talk
    assert talk.messages == TALK


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (TALK[:3], "must end with what the user says"),
        ([], "must end with what the user says"),
        ([{"role": "tool", "content": "x"}], "role of message 1"),
        ([{"role": "user", "content": " "}], "Message 1 has no text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content in parts"),
        ([{"role": "user", "content": "x"}, TALK[0], TALK[1]], "system message must be the first"),
        ([{"content": "x"}], "needs the keys"),
        ([{**TALK[1], "content": "\ud800"}, *TALK[2:]], "Message 1 holds a NUL or a lone surrogate"),
    ],
)
def test_messages_that_are_no_conversation_are_named(messages, sentence):
    with pytest.raises(SafeSteerError, match=sentence):
        Conversation(messages)


def test_one_prompt_where_a_list_belongs_is_an_error(tiny_llama):
    with pytest.raises(SafeSteerError, match="Prompts come as a list"):
        generate(tiny_llama, "Hello")
    with pytest.raises(SafeSteerError, match="one list of messages"):
        as_prompts(TALK)
    with pytest.raises(SafeSteerError, match="a dict was given"):
        as_prompts(TALK[0])
    assert as_prompts(text for text in ("Hi", TALK[1:2])) == ["Hi", "Hi"]
    with pytest.raises(SafeSteerError, match="Prompts come as a list"):
        PromptSet.from_texts("Harm.", ["Help."])


CALLS = {
    "batch": lambda chat, direction, prompts: PromptBatch.of(chat.tokenizer, prompts),
    "sample": lambda chat, direction, prompts: sample_answers(chat, direction, prompts, TokenConfig()),
    "scores": lambda chat, direction, prompts: refusal_scores(chat, prompts, torch.tensor([5])),
    "refusal tokens": lambda chat, direction, prompts: learn_refusal_tokens(chat, prompts, ["Hi"], refuses),
    "coefficient": lambda chat, direction, prompts: choose_coeff(chat, [direction], prompts, refuses),
    "trace": lambda chat, direction, prompts: trace(
        chat, direction, NO_TOKENS, prompts, ["a"] * len(prompts)
    ),
    "coverage": lambda chat, direction, prompts: read_answers(chat, direction, prompts, ["a"] * len(prompts)),
    "shift": lambda chat, direction, prompts: representation_shift({"base": chat}, prompts),
    "judge": lambda chat, direction, prompts: judge_all(refuses, prompts, ["a"] * len(prompts)),
}
NO_TOKENS = TokenSet((), {}, {}, 0)


@pytest.mark.parametrize("call", CALLS)
def test_one_string_is_no_list_of_prompts(tiny_llama, direction, call):
    with pytest.raises(SafeSteerError, match="Prompts come as a list"):
        CALLS[call](tiny_llama, direction, "Hello")


def test_messages_are_never_rendered_as_python(chatml_tokenizer):
    loose = with_template(chatml_tokenizer, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert render(loose, TALK) == "[Be kind.][Hi][Hello!][Explain how tides work.]"
    batch = PromptBatch.of(loose, [TALK, "Hi"])
    assert loose.decode(batch.prompt_ids[0]) == render(loose, TALK)


def test_one_message_is_the_prompt_that_its_text_is():
    assert as_prompts([TALK[1:2], Conversation(TALK[1:2])]) == ["Hi", "Hi"]
    assert PromptSet.from_texts([TALK[1:2]], ["a"]).hash == PromptSet.from_texts(["Hi"], ["a"]).hash
    with pytest.raises(SafeSteerError, match="repeats 'Hi'"):
        PromptSet.from_texts([TALK[1:2], "x"], ["Hi", "y"])


def test_answers_in_files_keep_their_conversations(tiny_llama, direction, tmp_path):
    prompts = PromptSet((Prompt(Conversation(TALK), "harmful", "test"), Prompt("Hi", "harmless", "test")))
    config = EvaluateConfig(max_new_tokens=4, perplexity_tokens=20)
    evaluate(tiny_llama, None, direction, prompts, config).save(tmp_path)
    answers = Evaluation.load(tmp_path).answers
    assert [row["prompt"] for row in answers] == ["Explain how tides work.", "Hi"]
    config = ExplainConfig(
        n_prompts=2, n_harmful=1, n_samples=1, n_traces=1, max_tokens=4, n_sets=1, n_splits=1
    )
    tokens = TokenSet((SafetyToken(40, "", 1, (1,), 0.0, 0.0, 0.0),), SAMPLING, {}, 1)
    (traced, *_) = explain(
        tiny_llama, direction, tokens, prompts=prompts, answers=answers, config=config
    ).traces
    after = tiny_llama.encode(answers[0]["teacher"])
    text = tiny_llama.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([[*tiny_llama.encode(text), *after]])
    with torch.no_grad():
        p = tiny_llama.model(ids).logits[0, -len(after) - 1 : -1].softmax(-1)
    want = p[torch.arange(len(after)), after].tolist()
    assert [t.p_base for t in traced.tokens] == pytest.approx(want, rel=1e-4)


SAMPLING = asdict(TokenConfig(k=1, horizon=2, n_samples=1, min_steered_prob=0.0))


def test_guards_read_the_whole_conversation(tiny_llama):
    talk = as_prompts([TALK])
    guard = Guard(tiny_llama, max_new_tokens=1)
    turns = [*TALK[1:], {"role": "assistant", "content": "Gladly."}]
    want = tiny_llama.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tiny_llama.decode(guard._question_ids(talk[0], "Gladly.")) == want
    framed = Guard(tiny_llama, "wildguard", frame="{prompt} -> {response}")
    text = tiny_llama.decode(framed._question_ids(talk[0], "Gladly."))
    assert text == ("System: Be kind.\nUser: Hi\nAssistant: Hello!\nUser: Explain how tides work. -> Gladly.")


def test_prompt_files_hold_conversations(tmp_path, tiny_llama):
    rows = [
        {"harmful": TALK, "harmless": "Name a river.", "split": "train"},
        {"prompt": "Hide a body.", "label": "harmful", "system": "Be kind.", "split": "test"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = PromptSet.from_jsonl(file)
    talk, short = prompts.harmful
    assert (talk.messages, short.messages[0]) == (TALK, TALK[0])
    assert list(prompts.to_frame().text) == ["Explain how tides work.", "Name a river.", "Hide a body."]
    assert "Hello!" in render(tiny_llama.tokenizer, talk)
    rows[0]["harmful"] = TALK[-1:]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert PromptSet.from_jsonl(file).hash != prompts.hash
    file.write_text(json.dumps({**rows[1], "prompt": TALK}) + "\n")
    with pytest.raises(SafeSteerError, match="system prompt twice"):
        PromptSet.from_jsonl(file)
    file.write_text(json.dumps({**rows[1], "prompt": TALK[:1]}) + "\n")
    with pytest.raises(SafeSteerError, match="line 1: A list of messages must end"):
        PromptSet.from_jsonl(file)
    file.write_text(json.dumps({**rows[1], "system": 7}) + "\n")
    with pytest.raises(SafeSteerError, match="line 1: the key 'system'"):
        PromptSet.from_jsonl(file)


# --- BOS ---


def test_perplexity_windows_start_as_the_tokenizer_starts_texts(tiny_qwen2):
    text, width = "The tide comes in twice a day, and goes out as often.", 9
    bos = [tiny_qwen2.tokenizer.bos_token_id]
    assert special_start(tiny_qwen2.tokenizer) == bos
    ids, losses = tiny_qwen2.encode(text), []
    for start in range(0, len(ids), width - 1):
        window = [*bos, *ids[start : start + width - 1]]
        with torch.no_grad():
            logps = tiny_qwen2.model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
        losses += (-logps.gather(1, torch.tensor(window[1:])[:, None])[:, 0]).tolist()
    assert len(losses) == len(ids)
    assert perplexity(tiny_qwen2, text, width=width) == pytest.approx(
        float(torch.tensor(losses).mean().exp()), rel=1e-5
    )
