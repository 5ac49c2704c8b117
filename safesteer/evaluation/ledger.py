"""The ledger of looks: who scored which model on which test prompts, when and why.

A test split that is read often is no test any more. Everything that scores one appends a row to `looks.csv`,
in its run folder or its suite's folder; the studies of this project share one in `analysis/results`. Rows are
never changed or deleted. `commit` is the checkout that the code ran from, "+" where it had changes that were
not committed, and empty for an installed package.
"""

import csv
import io
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pandas as pd

from safesteer._files import append_text
from safesteer._version import __version__
from safesteer.models.chat_model import ModelLike, as_chat
from safesteer.models.hashing import weights_hash

LOOKS = "looks.csv"
COLUMNS = ("date", "version", "commit", "model", "weights", "split", "n", "why")


@cache
def code_commit() -> str:
    """Return the commit of the checkout that this package lies in, "" where it lies in none."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def log_look(path: str | Path, chat: ModelLike, split: str, n: int, why: str) -> None:
    """Append a look at a test split to a ledger.

    Args:
        path: The ledger, or the folder that holds it.
        chat: The model that is scored.
        split: What is read: "test", "xstest" ...
        n: How many prompts of it.
        why: For what.

    Example:
        >>> from safesteer.evaluation.ledger import log_look, looks
        >>> log_look(folder, chat, "test", 100, "to show how")
        >>> looks(folder).split.tolist()
        ['test']
    """
    chat, file = as_chat(chat), _file(path)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not file.exists():
        writer.writerow(COLUMNS)
    writer.writerow((now, __version__, code_commit(), chat.name, weights_hash(chat.model), split, n, why))
    append_text(file, text.getvalue())


def looks(path: str | Path) -> pd.DataFrame:
    """Read a ledger; an empty table where nobody has looked."""
    file = _file(path)
    return pd.read_csv(file, dtype={"weights": str}) if file.exists() else pd.DataFrame(columns=list(COLUMNS))


def _file(path: str | Path) -> Path:
    """Return the ledger's file: what is no .csv is a folder."""
    return Path(path) if Path(path).suffix == ".csv" else Path(path) / LOOKS
