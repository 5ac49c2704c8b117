"""A small grid of answers, so that a page can move the direction without a model behind it.

1. Layers: that of the direction and one to each side; strengths: from none to twice that of the direction.
2. Base and student answer each prompt once, the steered base at every layer and strength, all greedily.
3. Base, steered base and student read each answer of a cell (`tracing`), so numbers are those of `ss.trace`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from safesteer._errors import SafeSteerError
from safesteer._files import read_value, write_json
from safesteer.attribution.tracing import Trace, answer_logps, trace_tokens
from safesteer.models.adapter import without_student
from safesteer.models.batch import cut_at_eos
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.generation import generate_ids, greedy_ids
from safesteer.models.passes import rows_differ
from safesteer.progress import Progress, no_progress
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.steering.direction import Direction, steer
from safesteer.steering.interventions import add
from safesteer.tokens.token_set import TokenSet

GRID_FILE = "lens.json"
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)  # times that of the direction
LAYER_STEP = 6  # neighbours are a sixth of the model away
MAX_NEW_TOKENS = 24  # the page holds every number of every cell
N_ALTERNATIVES = 3
SHARE_OF_ANSWERS = 0.3  # of the time; reading them takes the remaining part
AUTHORS = ("base", "teacher", "student")

Ids = list[int]


@dataclass(frozen=True)
class GridCell:
    """The answers to one prompt at one layer and strength, by base, teacher and student (if there is one)."""

    prompt: int  # its place in `AnswerGrid.prompts`
    layer: int
    coeff: float
    traces: tuple[Trace, ...]


@dataclass(frozen=True, repr=False)
class AnswerGrid:
    """Answers as the direction moves: cells by prompt, layer and strength, in this order. One JSON file."""

    prompts: tuple[str, ...]
    layers: tuple[int, ...]
    coeffs: tuple[float, ...]
    layer: int  # of the direction
    coeff: float
    n_layers: int
    cells: tuple[GridCell, ...]

    def __post_init__(self) -> None:
        expected = list(product(range(len(self.prompts)), self.layers, self.coeffs))
        if not expected or [(cell.prompt, cell.layer, cell.coeff) for cell in self.cells] != expected:
            raise ValueError("a cell is missing")

    def __repr__(self) -> str:
        return f"AnswerGrid({len(self.prompts)} prompts, layers {self.layers}, strengths {self.coeffs})"

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        write_json(Path(path), asdict(self), indent=None)

    @classmethod
    def load(cls, path: str | Path) -> "AnswerGrid":
        """Read what `save` wrote; raises SafeSteerError for anything else."""
        return read_value(cls, path, "a grid of answers")


def answer_grid(
    chat: ModelLike,
    direction: Direction,
    tokens: TokenSet,
    student: ModelLike | None = None,
    *,
    prompts: Sequence[PromptLike],
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = no_progress,
) -> AnswerGrid:
    """Answer a few prompts at a few layers and strengths, and read every answer with all models.

    Args:
        chat: The base model.
        direction: The direction that is added; its layer and strength are the middle of the grid.
        tokens: The safety tokens S.
        student: The distilled model, if there is one.
        prompts: The requests.
        max_new_tokens: Length limit of an answer.
        progress: Receives the share of the work that is done.

    Raises:
        SafeSteerError: For safety tokens of another model, a direction that is not added, or no prompt.

    Example:
        >>> from safesteer.attribution.grid import answer_grid
        >>> grid = answer_grid(chat, direction, tokens, prompts=["Name a river."], max_new_tokens=2)
        >>> grid
        AnswerGrid(1 prompts, layers (0, 1, 2), strengths (0.0, 0.5, 1.0, 1.5, 2.0))
        >>> [trace.author for trace in grid.cells[0].traces]
        ['base', 'teacher']
    """
    chat, student = as_chat(chat), None if student is None else as_chat(student)
    tokens.check(chat)
    if direction.operation != "add":
        raise SafeSteerError(
            f"The grid adds the direction at several strengths, and this one is of operation"
            f" '{direction.operation}': give one of operation 'add'."
        )
    prompts = as_prompts(prompts)
    if not prompts:
        raise SafeSteerError("The grid needs a prompt.")
    layers = layers_around(direction.layer, chat.n_layers)
    coeffs = tuple(direction.coeff * strength for strength in STRENGTHS)
    places = product(layers, coeffs)
    moved = [replace(direction, layer=layer, coeff=c, operation="add") for layer, c in places]
    texts: list[list[Ids]] = []  # answers to each prompt: by the base steered each way, by base and student
    with without_student(chat, student):
        for layer in layers:
            at_layer = [at for at in moved if at.layer == layer]
            texts += _steered_answers(chat, prompts, at_layer, max_new_tokens)
            progress(SHARE_OF_ANSWERS * len(texts) / len(moved))
        texts.append(greedy_ids(chat, prompts, max_new_tokens, len(prompts), keep_eos=True))
    if student is not None:
        texts.append(greedy_ids(student, prompts, max_new_tokens, len(prompts), keep_eos=True))
    cells: list[GridCell] = []
    for p, prompt in enumerate(prompts):
        read = _read(chat, student, tokens, prompt, moved, [answers[p] for answers in texts])
        for at, traces in zip(moved, read, strict=True):
            cells.append(GridCell(p, at.layer, at.coeff, traces))
            share = len(cells) / (len(prompts) * len(moved))
            progress(SHARE_OF_ANSWERS + (1 - SHARE_OF_ANSWERS) * share)
    requests = tuple(map(str, prompts))
    return AnswerGrid(requests, layers, coeffs, direction.layer, direction.coeff, chat.n_layers, tuple(cells))


def layers_around(layer: int, n_layers: int) -> tuple[int, ...]:
    """Return a layer and its neighbours a sixth of the model away, inside the model."""
    step = max(1, n_layers // LAYER_STEP)
    return tuple(i for i in (layer - step, layer, layer + step) if 0 <= i < n_layers)


def _steered_answers(
    chat: ChatModel, prompts: Sequence[PromptLike], moved: Sequence[Direction], max_new_tokens: int
) -> list[list[Ids]]:
    """Answer greedily at one layer, at every strength in one batch: per strength an answer per prompt."""
    texts = [prompt for _ in moved for prompt in prompts]
    vectors = torch.stack([at.coeff * at.vector for at in moved for _ in prompts]).to(chat.device)
    answers: dict[int, Ids] = {}
    for rows, batch in chat.batched(texts, len(texts)):
        with rows_differ(chat.model), add(chat, vectors[rows], moved[0].layer):
            ids = generate_ids(chat, batch, max_new_tokens=max_new_tokens).tolist()
            for i, row in zip(rows, ids, strict=True):
                answers[i] = cut_at_eos(row, chat.eos_ids, keep_eos=True)
    n = len(prompts)
    return [[answers[i * n + p] for p in range(n)] for i in range(len(moved))]


def _read(
    chat: ChatModel,
    student: ChatModel | None,
    tokens: TokenSet,
    prompt: PromptLike,
    moved: Sequence[Direction],
    texts: list[Ids],
) -> Iterator[tuple[Trace, ...]]:
    """Read the answers to a prompt (step 3).

    Args:
        chat: The base.
        student: The student, if there is one.
        tokens: The safety tokens S.
        prompt: The request.
        moved: The direction at each layer and strength.
        texts: The answers of the base steered so, then those of base and student.

    Yields:
        Per layer and strength the traces of base, teacher and student.
    """
    with without_student(chat, student):
        by_base = answer_logps(chat, prompt, texts)
    by_student = [None] * len(texts) if student is None else answer_logps(student, prompt, texts)
    for i, at in enumerate(moved):
        shown = [len(moved), i, *range(len(moved) + 1, len(texts))]  # in the order of AUTHORS
        by_steered = [by_base[j] for j in shown]
        if at.coeff != 0:
            with without_student(chat, student), steer(chat, at):
                by_steered = answer_logps(chat, prompt, [texts[j] for j in shown])
        measured = (
            trace_tokens(chat, tokens, texts[j], by_base[j], logps, by_student[j], n_top=N_ALTERNATIVES)
            for j, logps in zip(shown, by_steered, strict=True)
        )
        yield tuple(Trace(str(prompt), "", author, t) for author, t in zip(AUTHORS, measured, strict=False))
