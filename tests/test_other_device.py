"""Nothing assumes a CPU: the whole path on a second device, whose tensors refuse to mix with the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from other_device import CAN_BE_EMULATED

from safesteer._errors import SafeSteerError
from safesteer.models.loading import best_device, load_model


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BE_EMULATED, reason="this version of torch cannot have a device in Python")
def test_nothing_assumes_a_cpu():
    """In a process of its own: torch keeps a device that it was told of."""
    checks = Path(__file__).with_name("on_other_device.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(
        command,
        cwd=checks.parents[1],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "failed" not in done.stdout


def test_no_model_goes_where_float64_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == "cpu"
    with pytest.raises(SafeSteerError, match="no float64"):
        load_model("any", device="mps:0")
