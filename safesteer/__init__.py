"""SafeSteer: localized on-policy distillation for safety, interpretability first.

See the safety direction, see which output tokens it moves and why, teach the model on those tokens
alone, and take home a plain Hugging Face checkpoint.
"""

__version__ = "0.1.0"

from safesteer.benchmarks import load_benchmark
from safesteer.calibration import by_answers, by_refusals, calibrate, grid
from safesteer.directions import Direction, steer
from safesteer.distill import StepRecord, distill
from safesteer.endpoint import Endpoint
from safesteer.errors import SafeSteerError
from safesteer.evaluate import EvalConfig, Evaluation, Scores, evaluate
from safesteer.export import check_reload, export
from safesteer.extraction import (
    Candidates,
    given,
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.generation import generate
from safesteer.guards import EndpointJudge, FirstToken, Guard, Verdict, agreement
from safesteer.judges import refuses, refuses_anywhere
from safesteer.models import ChatModel, bridge, load_model
from safesteer.perplexity import perplexity
from safesteer.pipeline import align
from safesteer.prompts import PromptSet, load_prompts
from safesteer.recipes import Recipe, recipe
from safesteer.refusal import RefusalTokens, learn_refusal_tokens, refusal_scores, refusal_token_ids
from safesteer.server import server_sampler
from safesteer.sharding import shard
from safesteer.steering import ablate, add, clamp, gate
from safesteer.student import DistillConfig, begin
from safesteer.suite import Suite, run_suite
from safesteer.sweep import Sweep, SweepConfig, sweep
from safesteer.tokens import TokenConfig, TokenSet, select_tokens

__all__ = [
    "Candidates",
    "ChatModel",
    "Direction",
    "DistillConfig",
    "Endpoint",
    "EndpointJudge",
    "EvalConfig",
    "Evaluation",
    "FirstToken",
    "Guard",
    "PromptSet",
    "Recipe",
    "RefusalTokens",
    "SafeSteerError",
    "Scores",
    "StepRecord",
    "Suite",
    "Sweep",
    "SweepConfig",
    "TokenConfig",
    "TokenSet",
    "Verdict",
    "ablate",
    "add",
    "agreement",
    "align",
    "begin",
    "bridge",
    "by_answers",
    "by_refusals",
    "calibrate",
    "check_reload",
    "clamp",
    "distill",
    "evaluate",
    "export",
    "gate",
    "generate",
    "given",
    "grid",
    "learn_refusal_tokens",
    "load_benchmark",
    "load_model",
    "load_prompts",
    "logistic_probe",
    "mean_difference",
    "pca_difference",
    "perplexity",
    "prefill_contrast",
    "recipe",
    "refusal_scores",
    "refusal_token_ids",
    "refuses",
    "refuses_anywhere",
    "run_suite",
    "select_tokens",
    "server_sampler",
    "shard",
    "steer",
    "sweep",
    "system_contrast",
]
