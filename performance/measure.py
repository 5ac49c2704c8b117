"""Memory of this process above a starting point (Linux), and runs in processes of their own."""

import ctypes
import gc
import json
import platform
import subprocess
import sys
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
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
