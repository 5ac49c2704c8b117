"""Memory of this process (Linux) or its GPU above a start, times of repeats, processes of their own."""

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def start_memory() -> float:
    """Return resident MB now.

    Freed memory goes back to the system first and the peak is forgotten, so that nothing before this line can
    hide what comes after.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def extra_mb(before: float) -> float:
    """Return peak resident MB since `start_memory`, above its value."""
    return _status_mb("VmHWM") - before


def in_process(script: str, *arguments: object) -> dict:
    """Run `script` by itself and return the JSON of its last line; raises SystemExit with its error."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1] if done.stderr else f"{command} failed")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """Describe what the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "threads": torch.get_num_threads(),
        "processor": names[0] if names else platform.processor(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def timed(call: Callable[[], object], device: torch.device, repeats: int = 5) -> dict:
    """Run `call` twice to warm up, its code and its memory, then `repeats` times by the clock.

    `peak_mb` is above what is held before: on CUDA of its allocator, elsewhere resident memory.
    """
    call()
    before, seconds = start_peak(device), []
    call()
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {**spread(seconds), "peak_mb": peak_mb(device, before)}


def by_clock(steps: Iterable[dict], device: torch.device) -> dict:
    """Take steps, of which the first warms up; add the median of each number that the others give."""
    before, ends, parts = start_peak(device), [], []
    for part in steps:
        synchronize(device)
        ends.append(time.perf_counter())
        parts.append(part)
    named = {name: statistics.median(part[name] for part in parts[1:]) for name in parts[0]}
    return {**between(ends), "peak_mb": peak_mb(device, before), **named}


def between(ends: Sequence[float]) -> dict:
    """Return the spread of the times between the ends of steps."""
    return spread([later - earlier for earlier, later in pairwise(ends)])


def spread(seconds: Sequence[float]) -> dict:
    """Return the median of repeats, and their range."""
    ends = {"min_s": min(seconds), "max_s": max(seconds)}
    return {"median_s": statistics.median(seconds), **ends, "repeats": len(seconds)}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> float:
    """Forget the peak of memory so far; return what is held now, in MB."""
    if device.type != "cuda":
        return start_memory()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**20


def peak_mb(device: torch.device, before: float = 0.0) -> int:
    """Return the peak of memory since `start_peak`, in MB above `before`."""
    if device.type != "cuda":
        return round(extra_mb(before))
    return round(torch.cuda.max_memory_allocated(device) / 2**20 - before)
