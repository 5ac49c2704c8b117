"""Progress of long work: a function that is told the share done, from 0 to 1, and a bar that shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

Progress: TypeAlias = Callable[[float], None]


def no_progress(share: float) -> None:
    """Ignore the share done."""


@contextmanager
def progress_bar(title: str, console: "Console | None" = None) -> Iterator[Progress]:
    """Show a bar with the time left inside the block; the yielded function takes the share done.

    Args:
        title: What stands before the bar.
        console: Where to show it; None: the terminal, or the notebook's cell if ipywidgets is there.

    Example:
        >>> from rich.console import Console
        >>> from safesteer.progress import progress_bar
        >>> with progress_bar("measuring", Console(quiet=True)) as progress:
        ...     progress(0.5)
    """
    from rich.console import Console  # slow to import
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = console or Console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # In a notebook rich draws bars with ipywidgets; without it, it would warn at every change.
    off = console.is_jupyter and find_spec("ipywidgets") is None
    with Bar(*columns, console=console, transient=True, disable=off) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.update(task, completed=share)
