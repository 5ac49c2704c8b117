"""The live lens in a notebook: the same script and style, with messages in place of a server.

A message of the page has an id and a call; the answer goes back with that id. Answers of models are worked on
by one thread, which looks between two steps whether the page still wants them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any

from safesteer._errors import SafeSteerError
from safesteer.live.page import lens_page, lens_script, lens_style
from safesteer.live.reading import Subject, chosen_direction, read_prompt, stream_answers
from safesteer.live.wire import facts, prompt_of, prompt_reading, step, view_of
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.steering.direction import Direction
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.token_set import TokenSet

try:
    import anywidget
    import traitlets
except ModuleNotFoundError as error:
    raise SafeSteerError(f"The lens needs {error.name}: pip install 'safesteer[explore]'.") from error


class LensWidget(anywidget.AnyWidget):
    """The widget that `lens` returns. `direction` is the one that was kept last, or the one given."""

    _esm = lens_script("widget.js")
    _css = lens_style(".lens")
    ready = traitlets.Bool(False).tag(sync=True)

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.direction = subject.direction
        self._wanted = -1  # id of the answers that the page waits for
        self._lock = Lock()
        self._calls: Queue[tuple[int, str, Any]] = Queue()
        self.on_msg(self._heard)
        Thread(target=self._work, daemon=True).start()

    def __repr__(self) -> str:
        return f"LensWidget({self.subject.chat.name!r}, {self.direction!r})"

    def _heard(self, widget: Any, content: dict[str, Any], buffers: Any) -> None:
        """Put a call of the page in the queue; a new one for answers, or a stop, ends the old answers."""
        if content["call"] in ("answers", "stop"):
            self._wanted = content["id"]
        if content["call"] != "stop":
            self._calls.put((content["id"], content["call"], content.get("body")))

    def _work(self) -> None:
        while True:
            self.answer(*self._calls.get())

    def answer(self, number: int, call: str, body: Any) -> None:
        """Answer one call of the page."""
        try:
            if call == "answers":
                for event in self._events(number, body):
                    self.send({"id": number, "event": event})
            else:
                value = CALLS[call](self, body)
                if isinstance(value, bytes):
                    self.send({"id": number, "value": None}, [value])
                else:
                    self.send({"id": number, "value": value})
        except SafeSteerError as error:
            self.send({"id": number, "error": str(error)})
        except Exception as error:  # a thread has nobody to tell but the page
            self.send({"id": number, "error": f"{type(error).__name__}: {error}"})

    def _events(self, number: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        steps = stream_answers(self.subject, view_of(self.subject, body))
        while number == self._wanted:
            with self._lock:
                tokens = next(steps, None)
            if tokens is None:
                yield {"end": True}
                return
            yield step(tokens)


def _direction(widget: LensWidget, body: dict[str, Any]) -> bytes:
    """Keep the direction as it is chosen now, in the notebook too."""
    widget.direction = chosen_direction(widget.subject, view_of(widget.subject, body))
    with TemporaryDirectory() as folder:
        widget.direction.save(Path(folder) / "direction.safetensors")
        return (Path(folder) / "direction.safetensors").read_bytes()


def _prompt(widget: LensWidget, body: Any) -> dict[str, Any]:
    with widget._lock:
        return prompt_reading(read_prompt(widget.subject, prompt_of(body)))


CALLS: dict[str, Callable[[LensWidget, Any], Any]] = {
    "facts": lambda widget, _: facts(widget.subject),
    "prompt": _prompt,
    "direction": _direction,
    "page": lambda _, body: lens_page(body)[0].encode(),
}


def lens(
    chat: ModelLike,
    direction: Direction,
    tokens: TokenSet,
    student: ModelLike | None = None,
    *,
    reader: HarmfulnessReader | None = None,
) -> LensWidget:
    """Show the live lens in a notebook: type a prompt, move the direction, watch the tokens.

    Args:
        chat: The base.
        direction: The direction that steers it.
        tokens: The safety tokens S.
        student: The distilled model, if there is one.
        reader: A reader of harmfulness, for the intervention "gate".

    Returns:
        A widget; its `direction` is the one that was kept last.

    Raises:
        SafeSteerError: For safety tokens of another model.

    Example:
        >>> widget = ss.lens(chat, direction, tokens)  # doctest: +SKIP
    """
    base = as_chat(chat)
    tokens.check(base)
    return LensWidget(Subject(base, direction, tokens, None if student is None else as_chat(student), reader))
