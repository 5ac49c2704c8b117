"""What a model does with a few prompts, prompt by prompt: refusals of either kind, and drift.

Greedy answers to harmful prompts and their harmless twins, judged; and KL(base || model) along the base's
own answers to the harmless ones, in nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from safesteer._errors import SafeSteerError
from safesteer.judges.judge import Judge, judge_all, outcomes
from safesteer.models.adapter import as_base
from safesteer.models.chat_model import ChatModel
from safesteer.models.drift import kl_on_answers
from safesteer.models.generation import generate, greedy_ids
from safesteer.models.precision import in_precision_of
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.settings import EvaluateConfig

ANSWER_TOKENS = 64  # of an answer at most: its sentences are judged, and many models answer


@dataclass(frozen=True)
class Measured:
    """Refused or not by prompt, KL by harmless prompt, and the answers, in the order of the prompts."""

    harmful: tuple[bool, ...]
    harmless: tuple[bool, ...]
    kls: tuple[float, ...]
    harmful_answers: tuple[str, ...] = field(repr=False)
    harmless_answers: tuple[str, ...] = field(repr=False)
    counts: str = "refused"  # or "safe", by a judge that only says what is harmful

    @property
    def objectives(self) -> tuple[float, float, float]:
        """Share of harmful prompts refused, share of harmless ones refused, mean KL."""
        return (float(np.mean(self.harmful)), float(np.mean(self.harmless)), float(np.mean(self.kls)))

    @property
    def losses(self) -> tuple[float, float, float]:
        """The same with less to be wished of each."""
        harmful, over_refusal, kl = self.objectives
        return 1 - harmful, over_refusal, kl


def drift_answers(base: ChatModel, prompts: PromptSet, config: EvaluateConfig) -> list[list[int]]:
    """Return the ids along which drift is measured: the base's first greedy tokens on harmless prompts."""
    return greedy_ids(base, prompts.harmless, config.n_kl_tokens, config.batch_size)


def measure(
    chat: ChatModel,
    base: ChatModel,
    prompts: PromptSet,
    config: EvaluateConfig,
    judge: Judge,
    base_answers: Sequence[Sequence[int]] | None = None,
) -> Measured:
    """Measure a model on some prompts, in the precision of the base.

    Args:
        chat: The model; the base itself has no drift.
        base: The base, which may carry the adapter of `chat`.
        prompts: Harmful and harmless prompts.
        config: Batches, and the largest length of answers where that is below ANSWER_TOKENS.
        judge: Says which answers refuse; an answer that it cannot judge counts as not refused.
        base_answers: What `drift_answers` returns; None: the base is asked.
    """
    n_tokens = min(ANSWER_TOKENS, config.max_new_tokens)
    greedy = partial(generate, max_new_tokens=n_tokens, batch_size=config.batch_size)
    with in_precision_of(base, chat):
        answers = [greedy(chat, prompts.texts(label)) for label in LABELS]
        kls = [0.0] * len(prompts.harmless)
        if chat is not base:
            n_kl, size = config.n_kl_tokens, config.batch_size
            if base_answers is None:
                with as_base(base, chat):
                    base_answers = drift_answers(base, prompts, config)
            kls = kl_on_answers(base, chat, prompts.harmless, base_answers, n_tokens=n_kl, batch_size=size)
    if not np.isfinite(kls).all():
        raise SafeSteerError("The student's drift from the base is not finite: neither are its logits.")
    by_label = zip(LABELS, answers, strict=True)
    verdicts = [outcomes(judge_all(judge, prompts.texts(label), texts)) for label, texts in by_label]
    harmful, harmless = (tuple(value is True for value in values) for _, values in verdicts)
    return Measured(
        harmful, harmless, tuple(kls), tuple(answers[0]), tuple(answers[1]), counts=verdicts[0][0]
    )
