"""What the lens sends to a page or a widget, as plain JSON values.

Probabilities and nats are numbers as measured (nothing is rounded: a page rounds what it shows); tokens are
text. Everything is data: a page puts it into text nodes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from safesteer._errors import SafeSteerError
from safesteer.attribution.stories import TokenStory
from safesteer.attribution.tracing import Alternative, TraceToken
from safesteer.live.reading import Intervention, PromptReading, Subject, View
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.tokens.token_set import SafetyToken


def facts(subject: Subject) -> dict[str, Any]:
    """Return what there is to choose from, and S."""
    chat, direction = subject.chat, subject.direction
    return {
        "model": chat.name,
        "authors": list(subject.authors),
        "n_layers": chat.n_layers,
        "layer": direction.layer,
        "coeff": direction.coeff,
        "norm": float(direction.vector.norm()),
        "operation": direction.operation,
        "interventions": ["add", "ablate", "clamp", *(["gate"] if subject.reader is not None else [])],
        "threshold": None if subject.reader is None else subject.reader.threshold,
        "lower": None if subject.reader is None else subject.reader.lower,
        "tokens": [_safety_token(token, subject.stories.get(token.id)) for token in subject.tokens.tokens],
    }


def _safety_token(token: SafetyToken, story: TokenStory | None) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "votes": token.votes,
        "votes_by_position": list(token.votes_by_position),
        "p_base": token.p_base,
        "p_steered": token.p_steered,
        "direct": None if story is None else story.direct,
        "change": None if story is None else story.change,
        "contexts": [asdict(context) for context in token.contexts],
    }


def prompt_of(value: Any) -> PromptLike:
    """Return a prompt, text or messages, as it was sent.

    Raises:
        SafeSteerError: For an empty prompt, or messages that are no conversation.
    """
    (prompt,) = as_prompts([value])
    if isinstance(prompt, str) and not prompt.strip():
        raise SafeSteerError("The prompt is empty: type a request.")
    return prompt


def view_of(subject: Subject, values: dict[str, Any]) -> View:
    """Return a view as it was sent.

    Raises:
        SafeSteerError: For a prompt, or a view, that cannot be shown.
    """
    known = get_args(Intervention)
    if values.get("intervention", "add") not in known:
        raise SafeSteerError(
            f"Unknown intervention '{values['intervention']}': use one of {', '.join(known)}."
        )
    if not isinstance(values["layer"], int):
        raise SafeSteerError(f"A layer is a whole number, not {values['layer']}.")
    numbers = {"prompt": prompt_of(values["prompt"]), "coeff": float(values["coeff"])}
    view = View(**{**values, **numbers})
    view.check(subject)
    return view


def prompt_reading(reading: PromptReading) -> dict[str, Any]:
    """Return a prompt as the base reads it."""
    return {
        "texts": list(reading.texts),
        "projections": reading.projections.tolist(),
        "mass_on_s": reading.mass_on_s.tolist(),
        "top": list(reading.top),
        "score": reading.score,
    }


def step(tokens: Sequence[TraceToken | None]) -> dict[str, Any]:
    """Return one new token per author; None where an answer has ended."""
    return {"tokens": [None if token is None else _token(token) for token in tokens]}


def _token(token: TraceToken) -> dict[str, Any]:
    def read(name: str) -> dict[str, Any] | None:
        p = getattr(token, f"p_{name}")
        if p is None:
            return None
        tops: tuple[Alternative, ...] = getattr(token, f"top_{name}")
        return {
            "p": p,
            "rank": getattr(token, f"rank_{name}"),
            "top": [{"id": t.id, "text": t.text, "p": t.p} for t in tops],
        }

    return {
        "id": token.id,
        "text": token.text,
        "lift": token.lift,
        "kl": token.kl,
        "kl_share": token.kl_share,
        "in_s": token.in_s,
        "read": {name: read(name) for name in ("base", "steered", "student")},
    }
