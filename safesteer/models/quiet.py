"""Keep transformers, the Hub's client and bitsandbytes quiet: SafeSteer shows progress and errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off loading bars and advice: our own progress display is the only one, and our own errors."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    others = [(log, log.level) for log in map(logging.getLogger, ("huggingface_hub", "bitsandbytes"))]
    for log, _ in others:
        log.setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        for log, before in others:
            log.setLevel(before)
        if bars:
            hf_logging.enable_progress_bar()
