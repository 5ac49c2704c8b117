"""How careful should the student be? What it does at strengths between the base and beyond.

The weights on the line from base to student (`models.mixing`) are measured on pairs that no preset trains on:
harmful requests refused, harmless twins refused, drift. The table is a curve from which a user chooses; the
model that is chosen is written by `exporting.export_strength`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from safesteer._errors import SafeSteerError
from safesteer._files import locked, write_text
from safesteer._intervals import bootstrap, wilson
from safesteer.evaluation.ledger import log_look
from safesteer.evaluation.measuring import ANSWER_TOKENS, Measured, drift_answers, measure
from safesteer.evaluation.targets import load_target, require_run
from safesteer.judges.judge import Judge, judge_identity
from safesteer.judges.sentences import declines
from safesteer.models.adapter import as_base
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.hashing import weights_hash
from safesteer.models.mixing import between
from safesteer.progress import Progress, no_progress
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.report.dial_figure import DIAL_FILE
from safesteer.report.page import write_report
from safesteer.settings import EvaluateConfig

Row = dict[str, float | int | str]
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def measure_strengths(
    base: ModelLike,
    student: ModelLike,
    prompts: PromptSet | None = None,
    strengths: Sequence[float] = STRENGTHS,
    config: EvaluateConfig | None = None,
    *,
    judge: Judge = declines,
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Measure the models between base and student, and beyond.

    Args:
        base: The model that was trained.
        student: What it became; it is itself again when this returns.
        prompts: Harmful prompts and harmless ones; None: the val split of the project's wider pairs, on which
            no preset trains. Choose by prompts that the student was not trained on.
        strengths: Where on the line: 0 is the base, 1 the student.
        config: Length of answers, batches; None: the defaults.
        judge: Says which answers refuse.
        progress: Called with the share done.

    Returns:
        A row per strength: strength, harmful and over_refusal (shares in 0..1), kl (nats per token, from the
        base on harmless prompts), each with `_low` and `_high` (95 %), n (prompts of each kind) and counts
        (what the shares count).

    Example:
        >>> from safesteer.evaluation.dial import measure_strengths
        >>> prompts, config = ss.load_prompts().split("val").first(2), ss.EvaluateConfig(max_new_tokens=3)
        >>> table = measure_strengths(chat, chat.copy(), prompts, (0.0, 1.0), config)
        >>> table[["strength", "kl", "n"]].values.tolist()
        [[0.0, 0.0, 2.0], [1.0, 0.0, 2.0]]
    """
    prompts, config, rows = prompts or dial_prompts(), config or EvaluateConfig(), []
    for row in _rows(as_chat(base), as_chat(student), prompts, strengths, config, judge):
        rows.append(row)
        progress(len(rows) / len(strengths))
    return pd.DataFrame(rows)


def _rows(
    base: ChatModel,
    student: ChatModel,
    prompts: PromptSet,
    strengths: Sequence[float],
    config: EvaluateConfig,
    judge: Judge,
    run: Path | None = None,
) -> Iterator[Row]:
    """Yield the row of each strength; the looks are in the ledger of the run, where there is one."""
    if not strengths:
        return
    with as_base(base, student):
        origin = measure(base, base, prompts, config, judge)
        along = drift_answers(base, prompts, config)
    for strength in strengths:
        with between(base, student, strength) as chat:
            measured = measure(chat, base, prompts, config, judge, along) if strength else origin
            if run is not None:
                log_look(run, chat, prompts.name, len(prompts.harmful), f"dial: strength {strength:g}")
        yield _row(strength, measured)


def dial_prompts() -> PromptSet:
    """Load the pairs that the dial is measured on: the val split of the wider ones."""
    return load_prompts("wide").split("val")


def dial_run(
    run: str | Path,
    strengths: Sequence[float] = STRENGTHS,
    *,
    judge: Judge = declines,
    config: EvaluateConfig | None = None,
    console: Console | None = None,
) -> pd.DataFrame:
    """Measure base and student of a run at some strengths; write dial.csv and the report with its curve.

    Each strength is saved when it is measured, so an interrupted call continues.

    Args:
        run: A run folder with an exported model.
        strengths: Where on the line.
        judge: Says which answers refuse.
        config: Length of answers, batches; None: the defaults.
        console: Where to print; None: the terminal.

    Returns:
        The table of `measure_strengths`, with what was measured: weights, prompts (hashes) and judge.

    Raises:
        SafeSteerError: For a folder that is no run, or has no exported model.
    """
    run, console, config = require_run(run), console or Console(), config or EvaluateConfig()
    models, prompts = load_target(run, run), dial_prompts()
    base, student = models["base"], models["student"]
    length = f"{min(ANSWER_TOKENS, config.max_new_tokens)} tokens, KL over {config.n_kl_tokens}"
    judged = f"{judge_identity(judge)}, {length}"
    stamp = {"weights": weights_hash(student.model), "prompts": prompts.hash, "judge": judged}
    with locked(run):
        table = _measured_before(run / DIAL_FILE, stamp)
        left = [strength for strength in strengths if strength not in table.strength.tolist()]
        for row in _rows(base, student, prompts, left, config, judge, run):
            table = pd.DataFrame([*table.to_dict("records"), row | stamp]).sort_values("strength")
            write_text(run / DIAL_FILE, table.to_csv(index=False))
            rates = (
                f"{row['counts']} {row['harmful']:.0%} of harmful and {row['over_refusal']:.0%} of harmless"
            )
            console.print(
                f"strength {row['strength']:g}: {rates} prompts, KL {row['kl']:.3f}", highlight=False
            )
        write_report(run)
    return table


def keep_rows_of(run: Path, student: ChatModel) -> None:
    """Drop what the dial measured on another student, when a run has exported a new one.

    Args:
        run: A run folder.
        student: The student that it holds now.
    """
    if (run / DIAL_FILE).is_file():
        table = pd.read_csv(run / DIAL_FILE, dtype={"weights": str})
        same = table[table.weights == weights_hash(student.model)]
        if same.empty:
            (run / DIAL_FILE).unlink()
        elif len(same) < len(table):
            write_text(run / DIAL_FILE, same.to_csv(index=False))


def _measured_before(path: Path, stamp: dict[str, str]) -> pd.DataFrame:
    """Read the rows of this student on these prompts, by this judge."""
    if not path.is_file():
        return pd.DataFrame({"strength": []})
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(stamp, str))
        rows = [row for row in table.to_dict("records") if all(row[k] == v for k, v in stamp.items())]
        return pd.DataFrame(rows, columns=table.columns)
    except (ValueError, KeyError) as error:
        raise SafeSteerError(f"{path} is not a table of the dial: delete it to measure again.") from error


def _row(strength: float, measured: Measured) -> Row:
    """Return the row of one strength."""
    row: Row = {"strength": float(strength)}
    shares = (("harmful", measured.harmful), ("over_refusal", measured.harmless))
    for name, refused in shares:
        low, high = wilson(sum(refused), len(refused))
        row |= {name: float(np.mean(refused)), f"{name}_low": low, f"{name}_high": high}
    low, high = bootstrap(measured.kls)
    row |= {"kl": float(np.mean(measured.kls)), "kl_low": low, "kl_high": high}
    return row | {"n": len(measured.harmful), "counts": measured.counts}
