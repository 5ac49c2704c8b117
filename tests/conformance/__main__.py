"""Run every check on every family and write docs/models.md: `make conformance`, or name families to see them.

python -m conformance                  all families, two processes, the page is written
python -m conformance mistral mpt      these families, each result on the screen
"""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import track

from conformance.families import family_names
from conformance.page import write_page
from conformance.results import Result, measure

DOCS = Path(__file__).parents[2] / "docs"


def _shown(result: Result, everything: bool) -> list[str]:
    """Return the lines about a family that are worth reading."""
    if result.not_built:
        return [f"not built: {result.not_built}"]
    return [f"{o.check}: {o.outcome} {o.reason}" for o in result.outcomes if everything or o.is_wrong]


def main(names: list[str]) -> int:
    """Measure families and return how many results are wrong."""
    console, start = Console(soft_wrap=True), time.perf_counter()
    chosen, results = names or family_names(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for result in track(pool.map(measure, chosen), "Families", len(chosen), console=console):
            results.append(result)
            for line in _shown(result, bool(names)):
                console.print(f"{result.name}: {line}", markup=False, highlight=False)
    n_wrong = sum(outcome.is_wrong for result in results for outcome in result.outcomes)
    n_results = sum(len(result.outcomes) for result in results)
    seconds = time.perf_counter() - start
    console.print(f"{len(results)} families, {n_results} results, {n_wrong} wrong, {seconds:.0f} s")
    if not names:
        write_page(DOCS / "models.md", results, version("transformers"), max(1, round(seconds / 60)))
    return n_wrong


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
