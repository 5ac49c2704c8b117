"""Prompts as people have them: conversations, templates of all kinds; answers that are the model's own."""

import copy
import hashlib
import json

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from conftest import CHATML, PROMPTS, _bpe, copy_of
from safesteer._errors import SafeSteerError
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate, generate_ids, uniforms
from safesteer.models.loading import load_model
from safesteer.models.templates import (
    control_ids,
    end_of_turn,
    render,
    set_template,
    special_start,
    suffix_length,
    template_hash,
)
from safesteer.models.text_loss import perplexity
from safesteer.prompts.conversation import Conversation, as_prompts
from safesteer.prompts.prompt_set import PromptSet
from safesteer.tokens.selection import banned_ids

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
    with torch.no_grad():  # the model now says end of turn, whatever it reads
        chat.model.lm_head.weight = torch.nn.Parameter(chat.model.lm_head.weight.clone())
        chat.model.lm_head.weight[turn] = 100 * chat.model.model.norm.weight.new_ones(chat.d_model)
    ids = generate_ids(chat, next(chat.batched(["Hi"], 1))[1], max_new_tokens=8)[0].tolist()
    assert turn not in ids or set(ids[ids.index(turn) + 1 :]) <= {chat.eos_ids[0]}


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
    set_template(tokenizer, None, {"enable_thinking": True})
    assert render(tokenizer, "x") == off.removesuffix("<think></think>")
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
    with pytest.raises(SafeSteerError, match="Prompts come as a list"):
        PromptSet.from_texts("Harm.", ["Help."])


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
