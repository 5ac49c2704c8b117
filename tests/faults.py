"""Faults injected into `safesteer align` on a tiny model, and what became of them.

    python tests/faults.py [--kills 20] [--seed 0] [--short]      (make faults)

Each fault hits a process of its own; the same command then runs again, and must end with the files
of an uninterrupted run: direction, tokens, history (without times), weights and evaluation, byte for
byte. Bad inputs must end in one sentence (a SafeSteerError), never in another exception.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SETTINGS = {
    "direction.extraction": "prefill",
    "direction.n_train": 4,
    "direction.coeff": 1.5,
    "direction.n_val": 2,
    "tokens.k": 8,
    "tokens.n_samples": 2,
    "tokens.horizon": 3,
    "tokens.min_steered_prob": 1e-4,
    "distill.n_steps": 6,
    "distill.harmful_per_step": 2,
    "distill.harmless_per_step": 2,
    "distill.max_new_tokens": 3,
    "distill.checkpoint_every": 1,
    "distill.lr": 1e-3,
    "evaluate.n_prompts": 3,
    "evaluate.max_new_tokens": 4,
    "evaluate.n_set_prompts": 2,
    "evaluate.perplexity_tokens": 200,
    "explain.n_prompts": 3,
    "explain.n_harmful": 2,
    "explain.n_samples": 2,
    "explain.n_traces": 2,
    "explain.n_sets": 2,
    "explain.n_splits": 2,
}
SAME = ["direction.safetensors", "tokens.json", "evaluation.json", "answers.jsonl", "model/model.safetensors"]


def start(model: Path, out: Path, before: Callable[[], None] = lambda: None, log: Path | None = None) -> int:
    """Fork a process that runs the command; `before` runs in it first. Returns its pid.

    What it prints goes to `log`, by default beside `out`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        handle = os.open(log or f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        import torch

        from safesteer import cli

        torch.set_num_threads(1)
        sys.argv = ["safesteer", "align", str(model), "--out", str(out)]
        sys.argv += [word for k, v in SETTINGS.items() for word in ("--set", f"{k}={v}")]
        before()
        cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_limited(model: Path, out: Path, size: int) -> int:
    """Run to its end under a limit on file sizes, which a pipe does not know; returns the exit code."""
    reads, writes = os.pipe()
    code = wait(start(model, out, limit_file(size), log=Path(f"/proc/self/fd/{writes}")))
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        Path(f"{out}.log").write_bytes(pipe.read())
    return code


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text(errors="replace")


def result(out: Path) -> dict[str, str]:
    """What a finished run must have in common with an uninterrupted one."""
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in SAME}
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return found | {
        "history": str(
            [{k: v for k, v in r.items() if not k.endswith("_s") or k == "kl_off_s"} for r in rows]
        )
    }


class _Counter:
    """Counts fsyncs; at the n-th, halves the file that is being written and kills the process."""

    def __init__(self, n: int) -> None:
        self.n, self.seen, self.real = n, 0, os.fsync

    def __call__(self, handle: int) -> None:
        self.seen += 1
        if self.seen == self.n:
            name = os.readlink(f"/proc/self/fd/{handle}")
            if os.path.isfile(name):
                os.truncate(name, os.path.getsize(name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.real(handle)


def die_in_write(n: int) -> Callable[[], None]:
    def before() -> None:
        os.fsync = _Counter(n)

    return before


def limit_file(size: int) -> Callable[[], None]:
    """No file may outgrow `size`: the error of a full disk, at a chosen place."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return before


def limit_memory(extra_mb: int) -> Callable[[], None]:
    def before() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return before


def unclear(kind: str, code: int, allowed: tuple[int, ...], out: Path) -> bool:
    """True, and printed, where a process ended otherwise than it may, or showed a traceback."""
    shown = code not in allowed or "Traceback" in log_of(out)
    if shown:
        print(f"{kind}: code {code}\n{log_of(out)[-1500:]}", flush=True)
    return shown


class Table:
    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def add(self, kind: str, survived: bool, wrong: bool = False, traceback: bool = False) -> None:
        row = self.rows.setdefault(kind, [0, 0, 0, 0])
        for i, value in enumerate((True, survived, wrong, traceback)):
            row[i] += value

    def __str__(self) -> str:
        head = ["fault", "injected", "survived", "wrong results", "tracebacks"]
        rows = [head, *([k, *map(str, v)] for k, v in self.rows.items())]
        rows.append(["all", *(str(sum(v[i] for v in self.rows.values())) for i in range(4))])
        return "\n".join(f"{r[0]:44}" + "".join(f"{c:>15}" for c in r[1:]) for r in rows)

    @property
    def clean(self) -> bool:
        return all(n == ok and not wrong and not shown for n, ok, wrong, shown in self.rows.values())


def recovers(table: Table, kind: str, model: Path, out: Path, want: dict, shown: bool = False) -> None:
    """Run the command again; the fault is survived if that ends with the uninterrupted run's files."""
    code = wait(start(model, out))
    same = code == 0 and result(out) == want
    if code or not same:
        print(f"{kind}: code {code}\n{log_of(out)[-1500:]}", flush=True)
    table.add(kind, code == 0 and same, code == 0 and not same, shown or "Traceback" in log_of(out))
    shutil.rmtree(out, ignore_errors=True)


def tiny_model(folder: Path) -> Path:
    """The tests' tiny Llama, as a folder."""
    import conftest

    tokenizer = conftest.chatml_tokenizer.__wrapped__()
    chat = conftest.tiny_llama.__wrapped__(tokenizer)
    chat.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def inject(model: Path, work: Path, kills: int, seed: int, short: bool) -> Table:
    """All faults on runs of `model` in `work`; `kills` of each kind of kill. `short`: kills alone."""
    table, draw = Table(), random.Random(seed)
    started = time.monotonic()
    counted = work / "writes"

    def count() -> None:
        real = os.fsync
        os.fsync = lambda handle: (counted.open("a").write("."), real(handle))

    assert wait(start(model, work / "whole", count)) == 0, log_of(work / "whole")
    seconds, want = time.monotonic() - started, result(work / "whole")
    n_writes = len(counted.read_text())
    print(f"an uninterrupted run: {seconds:.1f} s, {n_writes} synced writes", flush=True)

    for i in range(kills):
        out, at = work / f"kill{i}", draw.uniform(0.0, seconds)
        pid = start(model, out)
        time.sleep(at)
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        recovers(table, "kill -9 at a random moment", model, out, want)
    for i in range(kills):
        out = work / f"write{i}"
        wait(start(model, out, die_in_write(draw.randint(1, n_writes))))
        recovers(table, "kill -9 inside a write, the file torn", model, out, want)
    if short:
        return table
    for i in range(max(1, kills // 5)):
        out = work / f"term{i}"
        pid = start(model, out)
        time.sleep(draw.uniform(0.3, 0.9) * seconds)
        os.kill(pid, signal.SIGTERM)
        shown = unclear("SIGTERM", wait(pid), (0, 130), out)
        recovers(table, "SIGTERM", model, out, want, shown)
    for i, size in enumerate([0, 30_000, 100, 1_000, 4_096, 12_000, 60_000, 120_000][: max(2, kills // 2)]):
        out = work / f"full{i}"
        shown = unclear(f"full at {size} bytes", start_limited(model, out, size), (1,), out)
        shown = shown or not log_of(out).strip()  # it must say why
        recovers(table, "disk full", model, out, want, shown)
    for i, extra in enumerate([1, 100, 300][: max(1, kills // 6)]):
        out = work / f"memory{i}"
        shown = unclear(f"{extra} MB more", wait(start(model, out, limit_memory(extra))), (0, 1), out)
        recovers(table, "memory limit", model, out, want, shown)
    for name in ("tokens.json", "model/model.safetensors", "sweep.csv")[: max(1, kills // 6)]:
        out = work / "torn"
        shutil.copytree(work / "whole", out)
        os.truncate(out / name, (out / name).stat().st_size // 2)
        recovers(table, "a finished file torn", model, out, want)
    out = work / "two"
    first = start(model, out)
    while not (out / ".lock").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    second = wait(start(model, out))  # its log replaces the first's
    refused = second == 1
    wait(first)
    recovers(table, "two runs on one folder", model, out, want, not refused)
    blocked = work / "file"
    blocked.write_text("not a folder")
    code = wait(start(model, blocked / "run", log=work / "blocked.log"))
    table.add("a folder that cannot be written", code == 1, False, "Traceback" in log_of(work / "blocked"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="kills and bad inputs only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pid = os.fork()  # making the model starts threads, which a fork of this process must not have
        if not pid:
            tiny_model(work / "model")
            os._exit(0)
        assert wait(pid) == 0
        from bad_inputs import try_all

        import safesteer.alignment  # noqa: F401  (once, here, for all the forks)

        table = inject(work / "model", work, options.kills, options.seed, options.short)
        print(table)
        tried = try_all(work / "bad", work / "whole", options.seed)
    print(
        f"bad inputs tried {tried['tried']}, one clear sentence {tried['clear']}, accepted"
        f" {tried['accepted']}, other exceptions {tried['other']}"
    )
    for line in tried["examples"]:
        print("  ", line)
    sys.exit(0 if table.clean and not tried["other"] else 1)


if __name__ == "__main__":
    main()
