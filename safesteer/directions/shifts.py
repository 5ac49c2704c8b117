"""Where a model has moved: its residual stream beside its base's.

    representation_shift   final hidden states of base, teacher and student in one plane (paper, Figure 3)
    shift_along            the mean shift of each layer's residual stream, projected on the steering
                           direction: how far a student follows its teacher there

A student that is taught on few tokens can still learn all of the steering: teacher and student share their
weights, so every token's logit carries the teacher's shift of the residual stream.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from safesteer._errors import SafeSteerError
from safesteer.directions.activations import last_resid_pre
from safesteer.models.adapter import without_student
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.forward import final_hidden
from safesteer.prompts.conversation import PromptLike, as_prompts
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.steering.direction import Direction, steer

SHIFT_FILE = "shift.csv"  # of a run folder: `shift_along` of its student


def representation_shift(
    models: Mapping[str, ModelLike], prompts: Sequence[PromptLike], *, batch_size: int = 32
) -> pd.DataFrame:
    """Place final hidden states in the first model's principal plane (Figure 3).

    Args:
        models: Models by name, the base first. One that is steered is read with its steering.
        prompts: Read at their last position.
        batch_size: Prompts per forward pass.

    Returns:
        Columns: model, text, pc1, pc2, explained (share of the first model's variance in the plane) and
        shift: the distance of a model's mean from the first model's, in units of the first model's spread
        (root mean squared distance from its mean).

    Raises:
        SafeSteerError: For fewer than two prompts, which have no spread.
    """
    prompts, rows, reference = as_prompts(prompts), [], None
    if len(prompts) < 2:
        raise SafeSteerError("A shift is measured in units of the spread over prompts: give at least two.")
    for name, model in models.items():
        chat = as_chat(model)
        states = torch.zeros((len(prompts), chat.d_model), dtype=torch.float64)
        for at, batch in chat.batched(prompts, batch_size):
            states[at] = final_hidden(chat.model, batch)[:, -1].double().cpu()
        if reference is None:
            centre = states.mean(0)
            _, sizes, axes = torch.linalg.svd(states - centre, full_matrices=False)
            spread = (states - centre).pow(2).sum(-1).mean().sqrt().clamp(min=1e-30)
            explained = float((sizes[:2] ** 2).sum() / (sizes**2).sum().clamp(min=1e-30))
            reference = centre, axes[:2], spread, explained
        centre, plane, spread, explained = reference
        shift = float((states.mean(0) - centre).norm() / spread)
        points = ((states - centre) @ plane.T).tolist()
        rows += [(name, t, x, y, explained, shift) for t, (x, y) in zip(prompts, points, strict=True)]
    return pd.DataFrame(rows, columns=["model", "text", "pc1", "pc2", "explained", "shift"])


def shift_along(
    base: ModelLike,
    direction: Direction,
    prompts: PromptSet,
    student: ModelLike | None = None,
    *,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Project the shift of teacher and student from the base on the direction, layer by layer.

    The shift is the mean, over prompts, of the difference of `resid_pre` at the last prompt position.

    Args:
        base: A ChatModel, a TransformerBridge, or (model, tokenizer).
        direction: Steers the base into the teacher; its vector is what shifts are projected on.
        prompts: Harmful and harmless prompts.
        student: The trained model, in the base's precision; None: the teacher alone.
        batch_size: Prompts per forward pass.

    Returns:
        A row per model ("teacher", "student"), kind of prompts and layer: along (the projection on the unit
        direction) and norm (the length of the shift), both in units of the residual stream, and cosine
        (their ratio; 0 where nothing moved).

    Raises:
        SafeSteerError: Where prompts of a kind are missing, or activations are not finite.

    Example:
        >>> from safesteer.directions.shifts import shift_along
        >>> table = shift_along(chat, direction, ss.load_prompts().split("val").first(2))
        >>> above = table[(table.prompts == "harmful") & (table.layer == direction.layer)]
        >>> round(float(above.cosine.iloc[0]), 3)
        1.0
    """
    prompts.require_kinds()
    base, student, tables = as_chat(base), None if student is None else as_chat(student), []
    unit = direction.unit.double().cpu()
    for label in LABELS:
        texts = prompts.texts(label)
        with without_student(base, student):
            before = last_resid_pre(base, texts, batch_size).mean(0)
            with steer(base, direction):
                moved = {"teacher": last_resid_pre(base, texts, batch_size).mean(0)}
        if student is not None:
            moved["student"] = last_resid_pre(student, texts, batch_size).mean(0)
        for model, states in moved.items():
            shift = states - before
            along, norm = shift @ unit, shift.norm(dim=-1)
            columns = {
                "model": model,
                "prompts": label,
                "layer": range(len(shift)),
                "along": along,
                "norm": norm,
            }
            tables.append(pd.DataFrame({**columns, "cosine": along / norm.clamp(min=1e-30)}))
    return pd.concat(tables, ignore_index=True)
