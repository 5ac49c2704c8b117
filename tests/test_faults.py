"""The short, seeded part of the fault suite; `make faults` runs all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones_and_bad_inputs_in_one_sentence():
    script = Path(__file__).with_name("faults.py")
    command = [sys.executable, str(script), "--kills", "1", "--short"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9 inside a write, the file torn" in done.stdout
    assert "other exceptions 0" in done.stdout
