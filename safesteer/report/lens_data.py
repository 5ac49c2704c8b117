"""A grid of answers as the page holds it: every model's reading of an answer once, every text once.

Base and student read their own answers alike in every cell of a prompt, and a strength of 0 is the base: what
is equal is written once, and cells refer to it by its number. `report_lens.js` is the way back.
"""

import json
from typing import Any

from safesteer.attribution.grid import AnswerGrid
from safesteer.attribution.tracing import Trace

MODELS = ("base", "steered", "student")  # in the order of a cell's traces


def pack_grid(grid: AnswerGrid) -> dict[str, Any]:
    """Return the grid as JSON values: `vocabulary` by id, `readings` and `cells`.

    A reading has [probability, rank, id, probability, id, probability ...] per token: its own, then those of
    alternatives. A cell has per author the tokens, [id, lift, kl, kl_share, in S], and each model's reading.
    """
    vocabulary: dict[str, str] = {}
    readings: dict[str, int] = {}

    def reading(trace: Trace, model: str) -> int:
        rows = []
        for token in trace.tokens:
            top = getattr(token, f"top_{model}")
            vocabulary.update({str(t.id): t.text for t in (token, *top)})
            of_token = _short(getattr(token, f"p_{model}")), getattr(token, f"rank_{model}")
            rows.append([*of_token, *(x for t in top for x in (t.id, _short(t.p)))])
        return readings.setdefault(json.dumps(rows), len(readings))

    models = MODELS[: len(grid.cells[0].traces)]
    cells = [
        [
            {
                "tokens": [
                    [t.id, _short(t.lift), _short(t.kl), _short(t.kl_share), int(t.in_s)]
                    for t in trace.tokens
                ],
                "read": [reading(trace, model) for model in models],
            }
            for trace in cell.traces
        ]
        for cell in grid.cells
    ]
    return {
        "models": list(models),
        "prompts": list(grid.prompts),
        "layers": list(grid.layers),
        "coeffs": list(grid.coeffs),
        "layer": grid.layer,
        "coeff": grid.coeff,
        "n_layers": grid.n_layers,
        "vocabulary": vocabulary,
        "readings": [json.loads(rows) for rows in readings],
        "cells": cells,
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")
