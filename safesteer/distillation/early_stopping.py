"""Early stopping: enough harmful val prompts refused, at little drift on harmless ones."""

from dataclasses import dataclass

import numpy as np

from safesteer.directions.calibration import refusal_rate
from safesteer.distillation.watching import LOOK_TOKENS
from safesteer.judges.judge import Judge
from safesteer.judges.wording import refuses
from safesteer.models.adapter import as_base
from safesteer.models.chat_model import ChatModel
from safesteer.models.drift import kl_on_answers
from safesteer.models.generation import greedy_ids
from safesteer.models.precision import in_precision_of
from safesteer.prompts.prompt_set import PromptSet
from safesteer.settings import DistillConfig


@dataclass(frozen=True)
class Look:
    """One look at val: share of harmful prompts refused, KL to the base on harmless ones (nats per token)."""

    refused: float
    kl: float

    def suffices(self, config: DistillConfig) -> bool:
        """Say whether training may stop."""
        return self.refused >= config.stop_refusal and self.kl <= config.stop_kl


def look_at(student: ChatModel, base: ChatModel, prompts: PromptSet, judge: Judge = refuses) -> Look:
    """Measure the student on held-out prompts, in the base's precision. The base may carry its adapter."""
    with in_precision_of(base, student):
        share = refusal_rate(student, prompts.harmful, judge, LOOK_TOKENS)
        with as_base(base, student):
            base_answers = greedy_ids(base, prompts.harmless, LOOK_TOKENS)
        kls = kl_on_answers(base, student, prompts.harmless, base_answers, n_tokens=LOOK_TOKENS)
    return Look(share, float(np.mean(kls)))
