"""Prompts of several turns. A prompt is a string, what the user says; a `Conversation` has turns before it.

A conversation is still a string, the user's last words, so that tables and figures show it as any prompt.
Two are equal where all their turns are. `as_prompts` reads what people have: strings and lists of messages.
Files hold a conversation as its messages beside the last words (`to_row`, `from_row`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from safesteer._errors import SafeSteerError

PromptLike: TypeAlias = str | Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant")


class Conversation(str):
    """The user's last words, with the messages before them.

    Example:
        >>> from safesteer.prompts.conversation import Conversation
        >>> talk = Conversation([
        ...     {"role": "user", "content": "Hi"},
        ...     {"role": "assistant", "content": "Hello!"},
        ...     {"role": "user", "content": "Name a river."},
        ... ])
        >>> print(talk, len(talk.messages))
        Name a river. 3
    """

    turns: tuple[tuple[str, str], ...]  # (role, content), the user's last words included

    def __new__(cls, messages: Sequence[Mapping[str, Any]]) -> "Conversation":
        """Check the messages and keep them.

        Raises:
            SafeSteerError: For an unknown role, content that is empty or not text, a system turn that is not
                the first, or a last turn that is not the user's.
        """
        turns = tuple(_turn(message, i) for i, message in enumerate(messages))
        if not turns or turns[-1][0] != "user":
            raise SafeSteerError("A list of messages must end with what the user says: that is answered.")
        conversation = super().__new__(cls, turns[-1][1])
        conversation.turns = turns
        return conversation

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.turns]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Conversation) and self.turns == other.turns

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.turns)

    def __reduce__(self) -> tuple:
        return Conversation, (self.messages,)


def _turn(message: object, at: int) -> tuple[str, str]:
    """Return (role, content) of one message."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise SafeSteerError(f"Message {at + 1} needs the keys 'role' and 'content'.")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise SafeSteerError(f"The role of message {at + 1} must be one of {list(ROLES)}, not {role!r}.")
    if role == "system" and at > 0:
        raise SafeSteerError("A system message must be the first one.")
    if not isinstance(content, str) or not content.strip():
        raise SafeSteerError(f"Message {at + 1} has no text; content in parts is not read.")
    if not is_readable(content):
        raise SafeSteerError(f"Message {at + 1} holds a NUL or a lone surrogate character.")
    return role, content


def is_readable(text: str) -> bool:
    """Return whether tokenizers can read it: there is no NUL and no half of a surrogate pair."""
    return not any(0xD800 <= ord(c) <= 0xDFFF or c == "\0" for c in text)


def as_prompt(value: PromptLike) -> str:
    """Return a string as it is, and a list of messages as a `Conversation`; one message is plain text.

    Raises:
        SafeSteerError: For anything else.
    """
    if isinstance(value, Conversation):
        return value if len(value.turns) > 1 else str(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return as_prompt(Conversation(value))
    raise SafeSteerError(f"A prompt is text or a list of messages, not a {type(value).__name__}.")


def as_prompts(values: Any) -> list[str]:
    """Return prompts, each a string or a `Conversation`.

    Raises:
        SafeSteerError: For a single string, or a single list of messages, where a list of prompts belongs.
    """
    if hasattr(values, "harmful") and hasattr(values, "harmless"):  # a PromptSet, which builds on this
        raise SafeSteerError(
            "Prompts come as a list, and a PromptSet was given: pass its .harmful or .harmless."
        )
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        kind = "one prompt" if isinstance(values, str) else f"a {type(values).__name__}"
        raise SafeSteerError(f"Prompts come as a list, and {kind} was given: write [prompt].")
    prompts = list(values)
    if prompts and isinstance(prompts[0], Mapping):
        raise SafeSteerError("Prompts come as a list, and one list of messages was given: write [messages].")
    return [as_prompt(value) for value in prompts]


def messages_of(prompt: PromptLike) -> list[dict[str, str]]:
    """Return the turns of a prompt; a plain string is one turn of the user."""
    prompt = as_prompt(prompt)
    return prompt.messages if isinstance(prompt, Conversation) else [{"role": "user", "content": prompt}]


def transcript(prompt: str) -> str:
    """Return a conversation as text for a reader: a line per turn. A plain string stays as it is."""
    if not isinstance(prompt, Conversation):
        return prompt
    return "\n".join(f"{role.capitalize()}: {content}" for role, content in prompt.turns)


def to_row(prompt: str) -> dict[str, Any]:
    """Return what a file holds of a prompt: the user's last words, and all messages of a conversation."""
    turns = {"messages": prompt.messages} if isinstance(prompt, Conversation) else {}
    return {"prompt": str(prompt), **turns}


def from_row(row: Mapping[str, Any]) -> str:
    """Return the prompt that `to_row` wrote."""
    return as_prompt(row.get("messages") or row["prompt"])
