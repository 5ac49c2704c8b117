"""SafeSteer: localized on-policy distillation for safety, interpretability first.

See the safety direction, see which output tokens it moves and why, teach the model on those tokens
alone, and take home a plain Hugging Face checkpoint.
"""

__version__ = "0.1.0"

from safesteer.directions import (
    Candidates,
    Direction,
    mean_difference,
    prefill_contrast,
    refusal_scores,
    refusal_token_ids,
    steer,
)
from safesteer.distill import DistillConfig, StepRecord, begin, distill
from safesteer.errors import SafeSteerError
from safesteer.evaluate import EvalConfig, Evaluation, Scores, evaluate, perplexity
from safesteer.export import check_reload, export
from safesteer.judges import refuses, refuses_anywhere
from safesteer.models import ChatModel, bridge, generate, load_model
from safesteer.pipeline import align
from safesteer.prompts import PromptSet, load_prompts
from safesteer.recipes import Recipe, recipe
from safesteer.steering import ablate, add
from safesteer.sweep import Sweep, SweepConfig, by_answers, calibrate, sweep
from safesteer.tokens import TokenConfig, TokenSet, select_tokens

__all__ = [
    "Candidates",
    "ChatModel",
    "Direction",
    "DistillConfig",
    "EvalConfig",
    "Evaluation",
    "PromptSet",
    "Recipe",
    "SafeSteerError",
    "Scores",
    "StepRecord",
    "Sweep",
    "SweepConfig",
    "TokenConfig",
    "TokenSet",
    "ablate",
    "add",
    "align",
    "begin",
    "bridge",
    "by_answers",
    "calibrate",
    "check_reload",
    "distill",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "load_prompts",
    "mean_difference",
    "perplexity",
    "prefill_contrast",
    "recipe",
    "refusal_scores",
    "refusal_token_ids",
    "refuses",
    "refuses_anywhere",
    "select_tokens",
    "steer",
    "sweep",
]
