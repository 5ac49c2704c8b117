"""What the live lens reads: a prompt layer by layer, and the answers of all models as they grow.

1. `read_prompt`: one pass of the base; per layer and position the projection of `resid_pre` on the direction,
   and per layer what the final norm and the head would make of the last position (the logit lens).
2. `stream_answers`: every model writes an answer of its own, greedily, and reads those of the others too. A
   step is one pass per model over one new column, with a cache; the base reads all rows twice, steered in the
   second half of its batch. Each new token is measured as in `attribution.tracing`, so the numbers are those
   of `ss.trace`.
Steering is on only while a pass runs: between two steps the model is as it was, so that several readers can
take turns with one model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from safesteer._errors import SafeSteerError
from safesteer._token_text import token_text
from safesteer.attribution.stories import TokenStory
from safesteer.attribution.tracing import TraceToken, trace_tokens
from safesteer.models.adapter import without_student
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden, prefill
from safesteer.models.head import output_head
from safesteer.models.logits import logits_of
from safesteer.models.parts import final_norm
from safesteer.models.passes import rows_differ
from safesteer.models.templates import ids_of, render
from safesteer.prompts.conversation import PromptLike
from safesteer.steering.direction import Direction, moves_of
from safesteer.steering.hooks import Edit, apply_hooks
from safesteer.steering.reader import HarmfulnessReader
from safesteer.tokens.token_set import TokenSet

Intervention = Literal["add", "ablate", "clamp", "gate"]
MAX_NEW_TOKENS = 512  # of an answer: a page is for looking, not for long texts


@dataclass(frozen=True, eq=False)
class Subject:
    """What the lens looks at: the base, its direction and S; student, reader, stories, if there are any."""

    chat: ChatModel
    direction: Direction
    tokens: TokenSet
    student: ChatModel | None = None
    reader: HarmfulnessReader | None = None
    stories: Mapping[int, TokenStory] = field(default_factory=dict)

    @property
    def authors(self) -> tuple[str, ...]:
        """Who answers, in the order of every tuple of the lens."""
        return ("base", "steered") if self.student is None else ("base", "steered", "student")


@dataclass(frozen=True)
class View:
    """What a user has chosen: the prompt, and how the base is steered.

    `coeff` multiplies the direction with "add" and "gate"; with "clamp" it is the projection that is set, in
    activation units. "gate" adds where the reader takes the prompt for harmful, and ablates where it takes it
    for clearly harmless.
    """

    prompt: PromptLike
    layer: int
    coeff: float
    intervention: Intervention = "add"
    max_new_tokens: int = 48

    def check(self, subject: Subject) -> None:
        """Refuse a view that the subject cannot show.

        Raises:
            SafeSteerError: For a layer outside the model, a strength that is not finite, a length outside 1
                to 512, or a gate without a reader.
        """
        n_layers = subject.chat.n_layers
        if not 0 <= self.layer < n_layers:
            raise SafeSteerError(f"Layer {self.layer} is not in the model: it has 0 to {n_layers - 1}.")
        if not abs(self.coeff) < 1e6:
            raise SafeSteerError(f"A strength of {self.coeff} is out of bounds: use less than a million.")
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise SafeSteerError(f"An answer has 1 to {MAX_NEW_TOKENS} tokens, not {self.max_new_tokens}.")
        if self.intervention == "gate" and subject.reader is None:
            raise SafeSteerError("The gate needs a reader: a run folder has one (reader.safetensors).")


def chosen_direction(subject: Subject, view: View) -> Direction:
    """Return the direction with the layer, strength and operation of a view; that of a gate adds."""
    operation = "add" if view.intervention == "gate" else view.intervention
    return replace(subject.direction, layer=view.layer, coeff=view.coeff, operation=operation)


def _steered_by(subject: Subject, view: View) -> Direction | None:
    """Return the direction as a view applies it to its prompt; None where a gate leaves the prompt alone."""
    chosen = chosen_direction(subject, view)
    if view.intervention != "gate" or subject.reader is None:
        return chosen
    with without_student(subject.chat, subject.student):
        score = float(subject.reader.scores(subject.chat, [view.prompt])[0])
    if score > subject.reader.threshold:
        return chosen
    return replace(chosen, operation="ablate") if score <= subject.reader.lower else None


@dataclass(frozen=True, eq=False)
class PromptReading:
    """A prompt as the base reads it.

    `projections` is the projection of `resid_pre` on the unit direction, in activation units. `mass_on_s`
    and `top` are what the logit lens says at the last position of each layer: the probability on S, and the
    likeliest token.
    """

    texts: tuple[str, ...]
    projections: Float[Tensor, "n_layers pos"]
    mass_on_s: Float[Tensor, " n_layers"]
    top: tuple[str, ...]
    score: float | None  # of the reader, log-odds in nats


@torch.no_grad()
def read_prompt(subject: Subject, prompt: PromptLike) -> PromptReading:
    """Read a prompt with the base, layer by layer.

    Example:
        >>> from safesteer.live.reading import Subject, read_prompt
        >>> reading = read_prompt(Subject(chat, direction, tokens), "Name a river.")
        >>> tuple(reading.projections.shape) == (chat.n_layers, len(reading.texts))
        True
    """
    chat = subject.chat
    ids = ids_of(chat.tokenizer, render(chat.tokenizer, prompt))
    batch = PromptBatch.from_ids([ids], [[]], device=chat.device, share=False)  # every column in one pass
    unit, norm, head = subject.direction.unit, final_norm(chat.model), output_head(chat.model)
    on_s = subject.tokens.ids.to(chat.device)
    along: dict[int, Tensor] = {}
    told: dict[int, tuple[float, str]] = {}

    def reading(layer: int) -> Edit:
        def look(h: Tensor) -> None:
            along[layer] = (h[0].float() @ unit.to(h.device).float()).cpu()
            probabilities = logits_of(norm(h[:, -1]), *head)[0].softmax(-1)
            top = token_text(chat.tokenizer, int(probabilities.argmax()))
            told[layer] = float(probabilities[on_s].sum()), top

        return look

    layers = range(chat.n_layers)
    with without_student(chat, subject.student):
        with apply_hooks(chat, {("resid_pre", layer): reading(layer) for layer in layers}):
            final_hidden(chat.model, batch)
        score = None if subject.reader is None else float(subject.reader.scores(chat, [prompt])[0])
    return PromptReading(
        tuple(token_text(chat.tokenizer, i) for i in ids),
        torch.stack([along[layer] for layer in layers]),
        torch.tensor([told[layer][0] for layer in layers]),
        tuple(told[layer][1] for layer in layers),
        score,
    )


def stream_answers(subject: Subject, view: View) -> Iterator[tuple[TraceToken | None, ...]]:
    """Let every model answer, and measure every new token under all of them.

    Yields:
        One token per author (`Subject.authors`), None where the answer has ended. The end-of-answer token
        is measured too. The pass that makes a step runs when the step is asked for.

    Raises:
        SafeSteerError: For a view that the subject cannot show.

    Example:
        >>> from safesteer.live.reading import Subject, View, stream_answers
        >>> view = View("Name a river.", layer=1, coeff=2.0, max_new_tokens=3)
        >>> steps = list(stream_answers(Subject(chat, direction, tokens), view))
        >>> len(steps) <= 3, len(steps[0])
        (True, 2)
    """
    view.check(subject)
    chat, n, eos = subject.chat, len(subject.authors), set(subject.chat.eos_ids)
    models = [chat, *([subject.student] if subject.student else [])]
    rows = (2, 1)  # per answer: the base reads it twice, as it is and steered
    prompts = [PromptBatch.of(chat.tokenizer, [view.prompt] * k, device=chat.device) for k in rows]
    caches: list[Cache | None] = [None] * len(models)
    moved = _steered_by(subject, view)
    going, answers = [True] * n, torch.empty((n, 0), dtype=torch.long, device=chat.device)
    for step in range(view.max_new_tokens):
        logps: list[Tensor] = []
        for i, model in enumerate(models):
            steering = _second_half_steered(chat, moved) if i == 0 and moved is not None else nullcontext()
            base = without_student(chat, subject.student) if i == 0 else nullcontext()
            with torch.no_grad(), base, steering:
                if step == 0:
                    caches[i] = prefill(model.model, prompts[i], prompts[i].prompt_ids.shape[1] - 1, n)
                batch = prompts[i].extended(answers.repeat(rows[i], 1))
                logps += _next_logps(model, batch, caches[i]).split(n)
        ids = [int(logp[i].argmax()) for i, logp in enumerate(logps)]
        measured = trace_tokens(chat, subject.tokens, ids, *logps)  # row i is of author i's answer
        yield tuple(token if g else None for token, g in zip(measured, going, strict=True))
        going = [g and i not in eos for g, i in zip(going, ids, strict=True)]
        if not any(going):
            return
        answers = torch.cat([answers, answers.new_tensor(ids)[:, None]], 1)


@contextmanager
def _second_half_steered(chat: ChatModel, direction: Direction) -> Iterator[None]:
    """Apply a direction in the second half of a batch's rows, inside the block."""

    def in_second_half(edit: Callable[[Tensor], Tensor]) -> Edit:
        return lambda h: torch.cat([h[: len(h) // 2], edit(h[len(h) // 2 :])])

    moves = {point: in_second_half(edit) for point, edit in moves_of(chat.model, direction).items()}
    with rows_differ(chat.model), apply_hooks(chat, moves):
        yield


def _next_logps(chat: ChatModel, batch: PromptBatch, cache: Cache | None) -> Float[Tensor, "rows d_vocab"]:
    """Return the log-probabilities of the next token of each row; the cache grows by what was read."""
    hidden = final_hidden(chat.model, batch, cache)[:, -1]
    return logits_of(hidden, *output_head(chat.model)).log_softmax(-1).float().cpu()
