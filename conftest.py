"""Notebooks run with fewer prompts when they are tests."""

import os

os.environ.setdefault("SAFESTEER_QUICK", "1")
