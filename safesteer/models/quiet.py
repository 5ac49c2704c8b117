"""Keep transformers, the Hub's client and bitsandbytes quiet: SafeSteer shows progress and errors."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off loading bars and advice: our own progress display is the only one, and our own errors."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    loud = ("huggingface_hub", "bitsandbytes", "accelerate.big_modeling")
    others = [(log, log.level) for log in map(logging.getLogger, loud)]
    for log, _ in others:
        log.setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            yield
    finally:
        hf_logging.set_verbosity(level)
        for log, before in others:
            log.setLevel(before)
        if bars:
            hf_logging.enable_progress_bar()
