"""The model's own chat template: from a prompt to text and ids, and what can be learnt by rendering.

Nothing is looked up by the name of a format. Positions, the end of a turn and whether there is a system turn
are found by rendering a few messages; base models get a template that writes the text as it is ("raw").
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from safesteer._errors import SafeSteerError, first_line
from safesteer.prompts.conversation import PromptLike, messages_of

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
# Around what a user chose, and before a named template. "+" keeps a line break that follows.
_DEFAULTS, _END, _NAMED = "{#- defaults #}", "{#- end of defaults +#}", "{#- text after special tokens +#}"
_UNDATED = "{%- macro strftime_now(format) %}{{ format }}{% endmacro +%}"  # in place of the clock
_MARK = "Qz7"  # content that no template writes by itself
T = TypeVar("T")


def _once_per_template(
    find: Callable[[PreTrainedTokenizerBase], T],
) -> Callable[[PreTrainedTokenizerBase], T]:
    """Keep what is found by rendering, until the tokenizer's template or number of tokens changes."""
    results: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[str, int], T]] = WeakKeyDictionary()

    @wraps(find)
    def found_once(tokenizer: PreTrainedTokenizerBase) -> T:
        state = _source(tokenizer), len(tokenizer)
        if tokenizer not in results or results[tokenizer][0] != state:
            results[tokenizer] = state, find(tokenizer)
        return results[tokenizer][1]

    return found_once


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of rendered text: the template has written the special tokens already.

    What a named template writes after them is read as the tokenizer reads a text from its start on: some
    tokenizers put a space there, and none after a special token.
    """
    start = special_start(tokenizer) if _NAMED in _source(tokenizer) else []
    head = cast(str, tokenizer.decode(start)) if start else ""
    if not text.startswith(head):
        start, head = [], ""
    return [*start, *cast(list[int], tokenizer(text[len(head) :], add_special_tokens=False).input_ids)]


def special_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before plain text: most often BOS or nothing."""
    plain, whole = (cast(list[int], tokenizer("x", add_special_tokens=a).input_ids) for a in (False, True))
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
        tokenizer.chat_template = _NAMED + (f"{{{{ {start!r} }}}}" if start else "") + NAMED[template]
    elif template is not None:
        if not Path(template).is_file():
            raise SafeSteerError(f"'{template}' is no chat template: use one of {list(NAMED)}, or a file.")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if args:
        if not _source(tokenizer):
            raise SafeSteerError(f"{_no_template(tokenizer)} Until then its template has no arguments.")
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
    if not name.isidentifier():
        raise SafeSteerError(f"A template argument has a name without spaces and signs, not {name!r}.")
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SafeSteerError(f"The template argument {name} must be text, a number or a bool.") from error
    # Jinja reads Python's literals.
    return f"{{%- if {name} is not defined %}}{{%- set {name} = {plain!r} %}}{{%- endif %}}"


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja source of the template that chats use; empty where there is none."""
    template = tokenizer.chat_template
    return template.get("default", "") if isinstance(template, dict) else template or ""


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answering: bool, **extra: Any
) -> str:
    """Apply the template. Thinking is switched off, where a template can and no default says otherwise."""
    defaults = _source(tokenizer).rpartition(_END)[0] if _source(tokenizer).startswith(_DEFAULTS) else ""
    thinking: dict[str, Any] = {} if "set enable_thinking " in defaults else {"enable_thinking": False}
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answering, **(thinking | extra)
    )
    return cast(str, text)


def leaves_thinking_out(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether prompts are rendered without thinking here where the template alone would have it."""
    talk = [{"role": "user", "content": _MARK}]
    plain = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return plain != _apply(tokenizer, talk, True)


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: PromptLike, *, system: str | None = None, **extra: Any
) -> str:
    """Return the chat text up to where the answer starts.

    Args:
        tokenizer: The model's own, with a chat template.
        prompt: What the user says, or a conversation.
        system: A system prompt, in the place of the conversation's own. Where the template has no system
            turn, it stands before the user's first words.
        extra: Arguments of the template.

    Raises:
        SafeSteerError: Where the tokenizer has no chat template, or the template fails.
    """
    name = tokenizer.name_or_path
    if not _source(tokenizer):
        raise SafeSteerError(_no_template(tokenizer))
    messages = messages_of(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
    if messages[0]["role"] == "system" and not _has_system_turn(tokenizer):
        first, *messages = messages
        at = next(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[at] = {"role": "user", "content": f"{first['content']}\n\n{messages[at]['content']}"}
    try:
        return _apply(tokenizer, messages, True, **extra)
    except Exception as error:  # templates raise whatever they like
        raise SafeSteerError(f"The chat template of '{name}' failed: {first_line(error)}") from error


def _no_template(tokenizer: PreTrainedTokenizerBase) -> str:
    return (
        f"The tokenizer '{tokenizer.name_or_path}' has no chat template, and SafeSteer needs one to know"
        " where an answer starts: use a chat model, set tokenizer.chat_template, or for a base model call"
        " load_model(..., template='raw')."
    )


@_once_per_template
def _has_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template writes a system turn: some refuse it, some drop it without a word."""
    talk = [{"role": "system", "content": _MARK}, {"role": "user", "content": "Hello"}]
    try:
        return _MARK in _apply(tokenizer, talk, True)
    except Exception:  # templates raise whatever they like
        return False


@_once_per_template
def suffix_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the post-instruction positions that directions are read at.

    At least 1: where a template adds nothing, the position is the instruction's last token.
    """
    return max(1, n_after_instruction(tokenizer))


def n_after_instruction(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens that the template writes after the instruction."""
    a, b = (ids_of(tokenizer, render(tokenizer, text)) for text in ("Hello there", "Bonjour 7"))
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash how the tokenizer renders a prompt, as 16 hex digits: equal templates agree, on every day."""
    dated = "strftime_now" in _source(tokenizer)
    undated = {"chat_template": _UNDATED + _source(tokenizer)} if dated else {}
    rendered = render(tokenizer, "x", **undated)
    text = json.dumps([rendered, ids_of(tokenizer, rendered)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@_once_per_template
def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token with which the template ends an assistant's turn; None where there is none."""
    tail = ids_of(tokenizer, _answered(tokenizer).rpartition(_MARK)[2].lstrip())
    return tail[0] if tail and tail[0] in tokenizer.added_tokens_decoder else None


def _answered(tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a short conversation that ends with an answer; empty where the template cannot."""
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
    try:
        text = _apply(tokenizer, talk, False)
    except Exception:  # templates raise whatever they like
        return ""
    return text if _MARK in text else ""


def control_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of special tokens, and of added ones that are marks and not words.

    A mark is written by the template, or stands between brackets, or holds a bar: [INST], <start_of_turn>,
    <|user|>. Tokens of white space, which some code models add, are text.
    """
    ids, written = set(tokenizer.all_special_ids), set()
    if _source(tokenizer):
        written = {*ids_of(tokenizer, render(tokenizer, _MARK)), *ids_of(tokenizer, _answered(tokenizer))}
    for i, token in tokenizer.added_tokens_decoder.items():
        text = token.content.strip()
        bracketed = len(text) > 1 and text[0] + text[-1] in ("<>", "[]", "{}")
        if text and (token.special or bracketed or "|" in text or i in written):
            ids.add(i)
    return sorted(ids)
