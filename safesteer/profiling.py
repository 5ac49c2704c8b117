"""Where the time of a run goes, and how near its matrix products come to bare ones.

1. While `profiled` is open, a clock (`_clock`) takes the seconds of every stage, part by part, and a hook
   that torch calls after every module counts the products: 2 x weights x rows, and in the backward pass as
   much for the inputs and again for the weights, where they have gradients. Attention adds 4 x width x keys.
2. Then bare products of the same shape and precision are timed on the same machine.
3. The share of the bare rate is the time that bare products would take, divided by the time that was taken.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from safesteer._clock import BACKWARD, OTHER, STUDENT, Clock, Kind, count_product, running
from safesteer._files import write_text
from safesteer.report.figures import Theme, figure_of
from safesteer.report.page import figure_page

PROFILE_FILE, PROFILE_PAGE = "profile.csv", "profile.html"
# Kinds of work with their colours: passes, training, what surrounds them.
PARTS = {
    "prompts": "#d97706",
    "decoding": "#a16207",
    "logits": "#e5b567",
    "teacher": "#8b5cf6",
    STUDENT: "#0d9488",
    "loss": "#6fc7bf",
    BACKWARD: "#3b82c4",
    "optimizer": "#6b8e23",
    "judging": "#c2556a",
    "loading": "#b4a7d6",
    "writing": "#a3b1bf",
    OTHER: "#7b8794",
}
COLUMNS = [
    "stage",
    "part",
    "seconds",
    "share",
    "passes",
    "tokens",
    "tera_ops",
    "tera_ops_per_s",
    "share_of_bare",
]
N_ROWS = 1024  # of a bare product
BARE_S = 0.5  # seconds for each kind of bare product; the best repeat counts
SHOWN = 0.005  # share of the run below which a part is not printed
NOTE = (
    "seconds add up to the run. tera_ops: operations of matrix products, from the shapes of weights and"
    " inputs. share_of_bare: time that bare products would take, divided by the time taken. Bare products on"
    " this machine: {rates}."
)


@dataclass(frozen=True)
class BareRate:
    """Operations per second of the bare product of N_ROWS rows with a weight of `shape`, [n_out, n_in]."""

    shape: tuple[int, ...]
    rate: float

    def __str__(self) -> str:
        n_out, n_in = self.shape
        shape = f"[{N_ROWS:,}, {n_in:,}] x [{n_in:,}, {n_out:,}]"
        return f"{self.rate / 1e12:.3g} tera-operations per second ({shape})"


@contextmanager
def profiled(run: str | Path, console: Console | None = None) -> Iterator[None]:
    """Measure what the block does, such as `align`; then write profile.csv and profile.html, and print them.

    Results are the same as without it. The block gets a little slower: at the borders of parts it waits for
    the device, and every module of a model calls a hook.

    Args:
        run: The folder for both files: that of the run. A profile that is there is replaced.
        console: Where to print; None: the terminal.

    Example:
        >>> from safesteer.profiling import profiled
        >>> with profiled(folder):
        ...     answers = ss.generate(chat, ["Hello"], max_new_tokens=4)  # doctest: +ELLIPSIS
        Where the time goes...
        >>> sorted(path.name for path in folder.iterdir())
        ['profile.csv', 'profile.html']
    """
    clock = Clock(torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None)
    hook = register_module_forward_hook(_count_products)
    try:
        with running(clock):
            yield
    finally:
        hook.remove()
    if not PartialState().is_main_process:
        return
    rates = {kind: _bare_rate(kind, clock) for kind in clock.shapes}
    table = profile_table(clock, rates)
    bare = "; ".join(f"{' '.join(kind)} {rate}" for kind, rate in rates.items())
    note = NOTE.format(rates=bare or "none were made")
    write_text(Path(run) / PROFILE_FILE, table.to_csv(index=False))
    figure = profile_figure(table)
    write_text(Path(run) / PROFILE_PAGE, figure_page(figure, table, "Where the time goes", note))
    _show(table, note, console or Console())


def _count_products(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Count the matrix products of one module: rows that meet a matrix, or one of a stack of experts."""
    if not module._parameters or not args or isinstance(module, nn.Embedding):
        return
    x, second = args[0], (*args, None)[1]
    if not isinstance(x, Tensor) or not x.dim():
        return
    for weight in module._parameters.values():
        if weight is None or weight.dim() < 2 or x.shape[-1] not in weight.shape[-2:]:
            continue
        n_rows = x.numel() // x.shape[-1]
        if weight.dim() == 3 and isinstance(second, Tensor) and not second.is_floating_point():
            n_rows = second.numel()  # the experts that the router chose, token by token
        made = output[0] if isinstance(output, tuple) else output
        with_gradient = int(weight.requires_grad) + int(x.requires_grad)
        n_backward = with_gradient if torch.is_grad_enabled() else 0
        count_product(n_rows, weight, made.dtype, made.device, n_backward)


def _bare_rate(kind: Kind, clock: Clock) -> BareRate:
    """Time bare products of the shape that most operations had; return the best repeat's rate."""
    shape, dtype = clock.shapes[kind].most_common(1)[0][0], getattr(torch, kind[1])
    weight = torch.randn(shape, dtype=dtype, device=kind[0])
    rows = torch.randn((N_ROWS, shape[1]), dtype=dtype, device=kind[0])
    best, repeats, end = 0.0, 1, time.perf_counter() + BARE_S
    while time.perf_counter() < end:
        seconds = _seconds(lambda n=repeats: _multiply(rows, weight, n), clock.wait)
        best = max(best, repeats * 2 * N_ROWS * weight.numel() / seconds)
        repeats *= 2 if seconds < BARE_S / 20 else 1
    return BareRate(shape, best)


def _multiply(rows: Tensor, weight: Tensor, n: int) -> None:
    for _ in range(n):
        nn.functional.linear(rows, weight)


def _seconds(work: Callable[[], None], wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def profile_table(clock: Clock, rates: Mapping[Kind, BareRate]) -> pd.DataFrame:
    """Return one row per stage and kind of work, in the order of the run.

    Columns: stage, part, seconds, share (of the run), passes (of a model), tokens (positions that they read),
    tera_ops (of matrix products), tera_ops_per_s, share_of_bare.

    Args:
        clock: What was measured.
        rates: Of bare products, by device and precision.
    """
    stages, parts = list(dict.fromkeys(stage for stage, _ in clock.work)), list(PARTS)
    total, rows = sum(work.seconds for work in clock.work.values()), []
    places = sorted(clock.work, key=lambda place: (stages.index(place[0]), parts.index(place[1])))
    for stage, part in places:
        work = clock.work[stage, part]
        operations = sum(work.operations.values())
        row = {
            "stage": stage,
            "part": part,
            "seconds": round(work.seconds, 4),
            "share": round(work.seconds / total, 4),
            "passes": work.passes,
            "tokens": work.tokens,
        }
        if operations and work.seconds:
            bare_s = sum(n / rates[kind].rate for kind, n in work.operations.items() if kind in rates)
            row["tera_ops"] = float(f"{operations / 1e12:.6g}")
            row["tera_ops_per_s"] = float(f"{operations / 1e12 / work.seconds:.6g}")
            row["share_of_bare"] = round(bare_s / work.seconds, 4)
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def profile_figure(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Draw the seconds of each stage, stacked by kind of work.

    Args:
        table: Of `profile_table`.
        theme: "light" or "dark".
    """
    bars = []
    for part, colour in PARTS.items():
        rows = table[table.part == part]
        if rows.empty:
            continue
        hints = ["" if pd.isna(x) else f"<br>{x:.0%} of the bare product rate" for x in rows.share_of_bare]
        bars.append(
            go.Bar(
                y=rows.stage,
                x=rows.seconds,
                name=part,
                orientation="h",
                marker={"color": colour},
                text=hints,
                textposition="none",
                hovertemplate=f"%{{y}}, {part}: %{{x:.1f}} s%{{text}}<extra></extra>",
            )
        )
    n_stages = table.stage.nunique()
    figure = figure_of(bars, "seconds", "", theme, height=150 + 32 * n_stages, barmode="stack")
    stages = list(dict.fromkeys(table.stage))
    figure.update_layout(legend={"traceorder": "normal"})
    return figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=stages)


def _show(table: pd.DataFrame, note: str, console: Console) -> None:
    """Print each stage with its total, and the parts that took a share worth a line."""
    shown = Table("stage", "part", title="Where the time goes", title_justify="left")
    for name in ("seconds", "of the run", "passes", "tokens", "of bare rate"):
        shown.add_column(name, justify="right")
    for stage, rows in table.groupby("stage", sort=False):
        bare_s = (rows.share_of_bare * rows.seconds).sum()
        total = {"seconds": rows.seconds.sum(), "share": rows.share.sum(), "passes": rows.passes.sum()}
        total |= {"tokens": rows.tokens.sum(), "share_of_bare": bare_s / max(rows.seconds.sum(), 1e-9)}
        shown.add_row(str(stage), "", *_cells(total), style="bold")
        for row in rows[rows.share >= SHOWN].to_dict("records"):
            shown.add_row("", row["part"], *_cells(row))
    console.print(shown)
    console.print(note, highlight=False)


def _cells(row: Mapping[str, Any]) -> list[str]:
    counts = [f"{row[name]:,}" if row[name] else "" for name in ("passes", "tokens")]
    bare = row["share_of_bare"]
    near = "" if pd.isna(bare) or not bare else f"{bare:.0%}"
    return [f"{row['seconds']:.1f}", f"{row['share']:.1%}", *counts, near]
