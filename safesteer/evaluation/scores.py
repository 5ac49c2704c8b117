"""What changed and what did not: refusals on harmful and harmless prompts, drift, perplexity.

Every number comes with a 95 % interval: Wilson for rates, bootstrap over prompts for means. Greedy
answers, judged by any callable (prompt, answer) -> bool; `judges.refuses` by default.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from safesteer._errors import SafeSteerError
from safesteer._files import read_json, write_json
from safesteer._intervals import bootstrap, wilson
from safesteer._settings import AT_LEAST_1, LARGEST, check_settings
from safesteer.judges.judge import Judge, judge_all
from safesteer.judges.wording import refuses
from safesteer.models.adapter import as_base
from safesteer.models.batch import PromptBatch, batches
from safesteer.models.chat_model import ChatModel, output_head
from safesteer.models.forward import final_hidden
from safesteer.models.generation import generate
from safesteer.models.logits import kl_divergence, logits_of
from safesteer.models.text_loss import general_text, perplexity
from safesteer.prompts.prompt_set import PromptSet


@dataclass(frozen=True)
class EvalConfig:
    """How much is measured. `perplexity_tokens` bounds the text read, in tokens."""

    n_prompts: int | None = None  # pairs of the test split; None takes all
    max_new_tokens: int = 32
    n_kl_tokens: int = 16
    perplexity_tokens: int = 4096
    perplexity_width: int = 512
    batch_size: int = 50

    def __post_init__(self) -> None:
        sizes = ("n_prompts", "max_new_tokens", "n_kl_tokens", "batch_size")
        two = (2, LARGEST)  # perplexity needs a token to predict and one before it
        bounds = {"perplexity_tokens": two, "perplexity_width": two}
        check_settings(self, "evaluation", {**dict.fromkeys(sizes, AT_LEAST_1), **bounds})


@dataclass(frozen=True)
class Scores:
    """One model's numbers. Rates in 0..1, KL in nats a token, n prompts of each kind."""

    refusal_rate_harmful: float
    refusal_rate_harmful_ci: tuple[float, float]
    refusal_rate_harmless: float
    refusal_rate_harmless_ci: tuple[float, float]
    kl_harmless: float
    kl_harmless_ci: tuple[float, float]
    perplexity: float
    n: int


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Scores by model: "base", "teacher", "student"."""

    scores: dict[str, Scores]

    def to_frame(self) -> pd.DataFrame:
        return pd.DataFrame({name: asdict(s) for name, s in self.scores.items()}).T

    def __repr__(self) -> str:
        rows = [
            f"{name}: harmful {s.refusal_rate_harmful:.0%}, harmless {s.refusal_rate_harmless:.0%},"
            f" KL {s.kl_harmless:.3f}, perplexity {s.perplexity:.2f}"
            for name, s in self.scores.items()
        ]
        return "Evaluation(" + "; ".join(rows) + ")"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(escape=True)

    def save(self, path: str | Path) -> None:
        write_json(Path(path), {name: asdict(s) for name, s in self.scores.items()})

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        try:
            return cls({name: Scores(**_tuples(raw)) for name, raw in read_json(Path(path)).items()})
        except (TypeError, AttributeError) as error:
            raise SafeSteerError(f"{path} is not an evaluation file of this version.") from error


def _tuples(raw: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


@torch.no_grad()
def kl_on_answers(
    base: ChatModel,
    chat: ChatModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    config: EvalConfig,
) -> list[float]:
    """KL(base || chat) in nats a token over the first tokens of the base's own answers, per prompt."""
    tokenizer, found = chat.tokenizer, [0.0] * len(prompts)
    tails = [tokenizer(a, add_special_tokens=False).input_ids[: config.n_kl_tokens] for a in answers]  # type: ignore[operator]
    for rows in batches(tokenizer, prompts, config.batch_size):
        batch = PromptBatch.of(
            tokenizer, [prompts[i] for i in rows], [tails[i] for i in rows], device=chat.device
        )
        with as_base(base, chat):
            h_base = final_hidden(base.model, batch)
        h_chat = final_hidden(chat.model, batch)
        for row, i in enumerate(rows):
            steps = slice(-len(tails[i]) - 1, None)  # the prompt's last position predicts the first
            at_base = logits_of(h_base[row, steps], *output_head(base.model))
            at_chat = logits_of(h_chat[row, steps], *output_head(chat.model))
            found[i] = float(kl_divergence(at_base, at_chat).mean())
    return found


def evaluate(
    chat: ChatModel,
    base: ChatModel,
    prompts: PromptSet,
    config: EvalConfig | None = None,
    *,
    judge: Judge = refuses,
    text: str | None = None,
    base_answers: Sequence[str] | None = None,
) -> tuple[Scores, dict[str, list[str]]]:
    """Scores of `chat` (possibly inside `steer(...)`) and its greedy answers by label.

    `base_answers` are the base's greedy answers to the harmless prompts, along which drift is measured;
    without them the base is asked, and a model that is itself the base has no drift.
    """
    config = config or EvalConfig()
    prompts = prompts.first(config.n_prompts)
    harmful, harmless = prompts.harmful, prompts.harmless
    answers = {
        label: generate(chat, texts, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size)
        for label, texts in (("harmful", harmful), ("harmless", harmless))
    }
    n_harmful = sum(judge_all(judge, harmful, answers["harmful"]))
    n_harmless = sum(judge_all(judge, harmless, answers["harmless"]))
    kls = [0.0] * len(harmless)
    if base_answers is None and chat is not base:
        with as_base(base, chat):
            base_answers = generate(
                base, harmless, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size
            )
    if base_answers is not None:
        kls = kl_on_answers(base, chat, harmless, base_answers, config)
    scores = Scores(
        refusal_rate_harmful=n_harmful / len(harmful),
        refusal_rate_harmful_ci=wilson(n_harmful, len(harmful)),
        refusal_rate_harmless=n_harmless / len(harmless),
        refusal_rate_harmless_ci=wilson(n_harmless, len(harmless)),
        kl_harmless=float(np.mean(kls)),
        kl_harmless_ci=bootstrap(kls),
        perplexity=perplexity(
            chat,
            general_text() if text is None else text,
            max_tokens=config.perplexity_tokens,
            width=config.perplexity_width,
        ),
        n=len(harmful),
    )
    return scores, answers


def held_out_check(
    student: ChatModel, base: ChatModel, prompts: PromptSet, judge: Judge = refuses, *, n_tokens: int = 16
) -> tuple[float, float]:
    """(refusal rate on harmful prompts, KL to the base on harmless ones, nats a token): the two
    numbers that early stopping looks at. The base may carry the student's adapter.
    """
    config = EvalConfig(n_kl_tokens=n_tokens)
    answers = generate(student, prompts.harmful, max_new_tokens=n_tokens)
    with as_base(base, student):
        said = generate(base, prompts.harmless, max_new_tokens=n_tokens)
    drift = kl_on_answers(base, student, prompts.harmless, said, config)
    refused = sum(judge_all(judge, prompts.harmful, answers))
    return refused / len(prompts.harmful), float(np.mean(drift))
