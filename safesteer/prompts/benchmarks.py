"""Safety and over-refusal benchmarks by name: each a list of prompts, from the Hub or from a file.

Where each lies on the Hub is a fact with four parts (repository, config, split, column) and, for some,
which rows count. A local file is JSON Lines or CSV in the benchmark's own columns, or with a column
`prompt`; `data` is a folder of such files under known names, for machines without a network. Nothing is
shipped with the project: licences differ. Prompts that a benchmark repeats are kept once.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pandas as pd

from safesteer._errors import SafeSteerError, first_line
from safesteer._files import json_lines

Kind = Literal["harmful", "over-refusal"]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's prompts lie. `where` keeps the rows whose column has the given value.

    `file` and `file_where` are the same for a local copy. `gated`: its page asks to accept terms.
    `hub_file` is the JSON file to read in a repository that has a loading script, which `datasets` no
    longer runs.
    """

    name: str
    kind: Kind
    repo: str
    column: str
    split: str = "train"
    config: str | None = None
    where: tuple[str, str] | None = None
    gated: bool = False
    hub_file: str | None = None
    file: str | None = None
    file_where: tuple[str, str] | None = None


BENCHMARKS = (
    Benchmark("advbench", "harmful", "walledai/AdvBench", "prompt", gated=True),
    Benchmark("pku-saferlhf", "harmful", "PKU-Alignment/PKU-SafeRLHF", "prompt", "test", "default"),
    Benchmark(
        "harmbench",
        "harmful",
        "walledai/HarmBench",
        "prompt",
        config="standard",
        gated=True,
        file="harmbench_val.jsonl",
        file_where=("functional_category", "standard"),
    ),
    Benchmark("jailbreakbench", "harmful", "JailbreakBench/JBB-Behaviors", "Goal", "harmful", "behaviors"),
    Benchmark(
        "sorry-bench",
        "harmful",
        "sorry-bench/sorry-bench-202503",
        "turns",
        where=("prompt_style", "base"),
        gated=True,
    ),
    Benchmark("harmfulqa", "harmful", "declare-lab/HarmfulQA", "question", file="harmfulqa.jsonl"),
    Benchmark("alert", "harmful", "Babelscape/ALERT", "prompt", "test", "alert"),
    Benchmark("strongreject", "harmful", "walledai/StrongREJECT", "prompt", gated=True),
    Benchmark("do-not-answer", "harmful", "LibrAI/do-not-answer", "question", file="do_not_answer.jsonl"),
    Benchmark(
        "xstest-unsafe",
        "harmful",
        "Paul/XSTest",
        "prompt",
        where=("label", "unsafe"),
        file="xstest.jsonl",
        file_where=("label", "unsafe"),
    ),
    Benchmark(
        "xstest",
        "over-refusal",
        "Paul/XSTest",
        "prompt",
        where=("label", "safe"),
        file="xstest.jsonl",
        file_where=("label", "safe"),
    ),
    Benchmark("or-bench", "over-refusal", "bench-llm/or-bench", "prompt", config="or-bench-hard-1k"),
    Benchmark(
        "jailbreakbench-benign",
        "over-refusal",
        "JailbreakBench/JBB-Behaviors",
        "Goal",
        "benign",
        "behaviors",
    ),
    Benchmark(
        "everyday",
        "over-refusal",
        "tatsu-lab/alpaca",
        "instruction",
        where=("input", ""),
        file="harmless_val.jsonl",
    ),
    # Everyday instructions. A win rate needs a judge of helpfulness: here only refusals are counted.
    Benchmark(
        "alpaca-eval", "over-refusal", "tatsu-lab/alpaca_eval", "instruction", hub_file="alpaca_eval.json"
    ),
)
KNOWN = {b.name: b for b in BENCHMARKS}


def benchmark_named(name: str) -> Benchmark:
    """Return the benchmark; raises SafeSteerError with the names there are for another one."""
    if name not in KNOWN:
        raise SafeSteerError(f"Unknown benchmark '{name}': use one of {', '.join(KNOWN)}.")
    return KNOWN[name]


def is_local(name: str, data: str | Path) -> bool:
    """Return whether a folder of rows holds a benchmark, so that loading it needs no network."""
    file = benchmark_named(name).file
    return file is not None and (Path(data) / file).is_file()


def load_benchmark(
    name: str,
    *,
    path: str | Path | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[str]:
    r"""Load the prompts of a benchmark: from a file, from a folder that holds it, or from the Hub.

    Args:
        name: One of `prompts.benchmarks.KNOWN`, such as "xstest" or "harmbench".
        path: A JSON Lines or CSV file with the benchmark's own columns, or with a column "prompt".
        data: A folder of such files under known names; what it does not hold comes from the Hub.
        limit: Draw this many prompts; None takes all.
        seed: Of the draw.

    Returns:
        The prompts in the benchmark's order, each once.

    Raises:
        SafeSteerError: For an unknown name, and for a file or data set that cannot be read; for a gated
            one the sentence says how to get access.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "rows.csv"
        ...     _ = file.write_text("prompt,label\nHow do I kill a process?,safe\n")
        ...     ss.load_benchmark("xstest", path=file)
        ['How do I kill a process?']
    """
    benchmark = benchmark_named(name)
    if path is not None:
        rows, where = _from_file(Path(path)), benchmark.where
    elif data is not None and is_local(name, data):
        rows, where = _from_file(Path(data) / str(benchmark.file)), benchmark.file_where
    else:
        rows, where = _from_hub(benchmark), benchmark.where
    source = str(path or benchmark.repo)
    if where is not None and where[0] in rows:
        rows = rows[rows[where[0]].astype(str) == where[1]]
    column = next((c for c in (benchmark.column, "prompt") if c in rows), None)
    if column is None:
        raise SafeSteerError(f"{source} has no column '{benchmark.column}'; it has {list(rows.columns)}.")
    texts = list(dict.fromkeys(t for t in map(_prompt, rows[column]) if t))
    if not texts:
        raise SafeSteerError(f"{source} holds no prompt of the benchmark '{name}'.")
    if limit is not None and limit < len(texts):
        texts = random.Random(seed).sample(texts, limit)
    return texts


def _prompt(value: object) -> str:
    """Return one turn of text: the first of several, without ALERT's instruction frame."""
    if isinstance(value, list | tuple | np.ndarray):
        value = value[0] if len(value) else ""
    if not isinstance(value, str):
        return ""
    framed = re.fullmatch(r"\s*### Instruction:\s*(.*?)\s*### Response:\s*", value, re.S)
    return (framed[1] if framed else value).strip()


def _from_file(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        return pd.DataFrame(json_lines(path))
    except OSError as error:
        raise SafeSteerError(f"Cannot read the benchmark file {path}: {error.strerror}.") from error
    except (ValueError, AttributeError) as error:
        raise SafeSteerError(f"{path} is neither JSON Lines nor CSV: {error}") from error


def _from_hub(benchmark: Benchmark) -> pd.DataFrame:
    from datasets import load_dataset  # heavy, and only needed here

    try:
        if benchmark.hub_file:
            file = f"hf://datasets/{benchmark.repo}/{benchmark.hub_file}"
            rows = load_dataset("json", data_files=file, split=benchmark.split)
        else:
            rows = load_dataset(benchmark.repo, benchmark.config, split=benchmark.split)
        return cast(pd.DataFrame, rows.to_pandas())
    except Exception as error:  # the Hub raises whatever it likes
        help_ = " Without a network, give a local file or a folder of data."
        if benchmark.gated:
            page = f"https://huggingface.co/datasets/{benchmark.repo}"
            help_ = f" It is gated: accept its terms at {page} and log in with `hf auth login`."
        raise SafeSteerError(
            f"Cannot load '{benchmark.name}' from {benchmark.repo}: {first_line(error)}{help_}"
        ) from error
