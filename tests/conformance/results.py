"""Measure one family: its class, what it has earned, and the outcome of every check."""

import logging
from dataclasses import dataclass

import torch
from transformers.utils import logging as hf_logging

from conformance.checks import CHECKS, Case
from conformance.families import build
from safesteer._errors import SafeSteerError, first_line


@dataclass(frozen=True)
class Outcome:
    """What a check gave: "right", "refused" with a sentence, "wrong" or "crash"."""

    check: str
    outcome: str
    reason: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether a number is wrong, or there is a traceback in place of a sentence."""
        return self.outcome in ("wrong", "crash")


@dataclass(frozen=True)
class Result:
    """The outcomes of one family, and the checks at load that it passed."""

    name: str
    kind: str = ""
    not_built: str = ""
    earned: tuple[tuple[str, bool, str], ...] = ()  # (check at load, passed, remark)
    outcomes: tuple[Outcome, ...] = ()


def measure(name: str) -> Result:
    """Build a family's tiny model and run every check on it."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        chat = build(name)
    except Exception as error:  # its config cannot be cut, or transformers cannot run it without a kernel
        return Result(name, not_built=f"{type(error).__name__}: {first_line(error, 160)}")
    kind = type(chat.model).__name__
    try:
        table, case = chat.check(), Case(chat)
    except SafeSteerError as error:
        refused = tuple(Outcome(check, "refused", str(error)) for check in CHECKS)
        return Result(name, kind, outcomes=refused)
    earned = tuple(zip(table.check, table.right, table.remark, strict=True))
    return Result(name, kind, earned=earned, outcomes=tuple(_outcome(case, check) for check in CHECKS))


def _outcome(case: Case, check: str) -> Outcome:
    try:
        CHECKS[check](case)
    except SafeSteerError as error:
        return Outcome(check, "refused", str(error))
    except AssertionError as error:
        return Outcome(check, "wrong", first_line(error))
    except TimeoutError:
        raise
    except Exception as error:  # what a user would see as a traceback
        return Outcome(check, "crash", f"{type(error).__name__}: {first_line(error, 200)}")
    return Outcome(check, "right")
