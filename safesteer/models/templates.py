"""The model's own chat template: from a prompt to text and ids, and what can be learnt by rendering.

Nothing is looked up by the name of a format. Positions, the end of a turn and whether there is a system turn
are found by rendering a few messages; base models get a template that writes the text as it is ("raw").
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError, first_line
from safesteer.prompts.conversation import messages_of

# Templates for models that have none, by name; the special tokens that a tokenizer puts first come before.
NAMED = {
    "raw": (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
    ),
    "plain": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% else %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
_DEFAULTS, _END = "{#- defaults #}", "{#- end of defaults #}"  # around what a user chose
_UNDATED = "{%- macro strftime_now(format) %}{{ format }}{% endmacro %}"  # in place of the clock
_MARK = "Qz7"  # content that no template writes by itself


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of rendered text: the template has written the special tokens already."""
    return cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)


def special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before plain text: most often BOS or nothing."""
    plain, whole = ids_of(tokenizer, "x"), cast(list[int], tokenizer("x").input_ids)
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def set_template(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    args: Mapping[str, Any] | Sequence[str] | None = None,
) -> None:
    """Give a tokenizer a template, and defaults to its template's arguments.

    Args:
        tokenizer: Changed in place.
        template: "raw", "plain", "chatml", a Jinja file, or None: the tokenizer's own.
        args: Defaults of the template's arguments, such as {"enable_thinking": True}, or as recipe files
            write them, ["enable_thinking=true"]. An export keeps them.

    Raises:
        SafeSteerError: For a template that is neither a name nor a file, or an argument of another kind.
    """
    if template in NAMED:
        start = tokenizer.decode(special_start(tokenizer))
        tokenizer.chat_template = (f"{{{{ {json.dumps(start)} }}}}" if start else "") + NAMED[template]
    elif template is not None:
        if not Path(template).is_file():
            raise SafeSteerError(f"'{template}' is no chat template: use one of {list(NAMED)}, or a file.")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if args:
        items = args.items() if isinstance(args, Mapping) else map(_argument, args)
        defaults = "".join(_default(*item) for item in items)
        tokenizer.chat_template = _DEFAULTS + defaults + _END + _source(tokenizer)


def _argument(text: str) -> tuple[str, Any]:
    """Read name=value; the value as JSON where it is, else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SafeSteerError(f"A template argument is name=value, not '{text}'.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _default(name: str, value: object) -> str:
    try:
        literal = json.dumps(value)
    except TypeError as error:
        raise SafeSteerError(f"The template argument {name} must be text, a number or a bool.") from error
    return f"{{%- if {name} is not defined %}}{{%- set {name} = {literal} %}}{{%- endif %}}"


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja source of the template that chats use; empty where there is none."""
    template = tokenizer.chat_template
    return template.get("default", "") if isinstance(template, dict) else template or ""


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answering: bool, **extra: Any
) -> str:
    """Apply the template. Thinking is switched off, where a template can and no default says otherwise."""
    defaults = _source(tokenizer).partition(_END)[0] if _source(tokenizer).startswith(_DEFAULTS) else ""
    thinking = {} if "set enable_thinking " in defaults else {"enable_thinking": False}
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answering, **thinking, **extra
    )
    return cast(str, text)


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, system: str | None = None, **extra: Any
) -> str:
    """Return the chat text up to where the answer starts.

    Args:
        tokenizer: The model's own, with a chat template.
        prompt: What the user says, or a `Conversation`.
        system: A system prompt, in the place of the conversation's own. Where the template has no system
            turn, it stands before the user's first words.
        extra: Arguments of the template.

    Raises:
        SafeSteerError: Where the tokenizer has no chat template, or the template fails.
    """
    name = tokenizer.name_or_path
    if not _source(tokenizer):
        raise SafeSteerError(
            f"The tokenizer '{name}' has no chat template, and SafeSteer needs one to know where an answer"
            " starts: use a chat model, set tokenizer.chat_template, or for a base model call"
            " load_model(..., template='raw')."
        )
    messages = messages_of(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
    with_system = messages[0]["role"] == "system"
    try:
        text = _apply(tokenizer, messages, True, **extra)
        if not with_system or messages[0]["content"].strip() in text:
            return text
    except Exception as error:  # templates raise whatever they like
        if not with_system:
            raise SafeSteerError(f"The chat template of '{name}' failed: {first_line(error)}") from error
    first, user, *others = messages
    folded = {**user, "content": f"{first['content']}\n\n{user['content']}"}
    try:
        return _apply(tokenizer, [folded, *others], True, **extra)
    except Exception as error:
        raise SafeSteerError(f"The chat template of '{name}' failed: {first_line(error)}") from error


def suffix_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the template tokens after the instruction: the post-instruction positions.

    At least 1: where a template adds nothing, the position is the instruction's last token.
    """
    a, b = (ids_of(tokenizer, render(tokenizer, text)) for text in ("Hello there", "Bonjour 7"))
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return max(1, n)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash how the tokenizer renders a prompt, as 16 hex digits: equal templates agree, on every day."""
    dated = "strftime_now" in _source(tokenizer)
    undated = {"chat_template": _UNDATED + _source(tokenizer)} if dated else {}
    rendered = render(tokenizer, "x", **undated)
    text = json.dumps([rendered, ids_of(tokenizer, rendered)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token with which the template ends an assistant's turn; None where there is none."""
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
    try:
        text = _apply(tokenizer, talk, False)
    except Exception:  # templates raise whatever they like
        return None
    tail = ids_of(tokenizer, text.rpartition(_MARK)[2]) if _MARK in text else []
    return tail[0] if tail and tail[0] in tokenizer.added_tokens_decoder else None


def control_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of special tokens, and of added ones that are marks and not words.

    A mark stands in the template, or between brackets, or holds a bar: [INST], <start_of_turn>, <|user|>.
    Tokens of white space, which some code models add, are text.
    """
    ids, template = set(tokenizer.all_special_ids), _source(tokenizer)
    for i, token in tokenizer.added_tokens_decoder.items():
        text = token.content.strip()
        bracketed = len(text) > 1 and text[0] + text[-1] in ("<>", "[]", "{}")
        if text and (token.special or bracketed or "|" in text or text in template):
            ids.add(i)
    return sorted(ids)
