"""SafeSteer: localized on-policy distillation for safety, interpretability first.

See the safety direction, see which output tokens it moves and why, teach the model on those tokens
alone, and take home a plain Hugging Face checkpoint.
"""

__version__ = "0.1.0"

from safesteer._endpoint import Endpoint
from safesteer._errors import SafeSteerError
from safesteer.alignment import align
from safesteer.directions.calibration import calibrate_to_kl, choose_coeff, choose_direction, strength_table
from safesteer.directions.extraction import (
    Candidates,
    from_vector,
    logistic_probe,
    mean_difference,
    pca_difference,
    prefill_contrast,
    system_contrast,
)
from safesteer.directions.refusal_tokens import (
    RefusalTokens,
    learn_refusal_tokens,
    refusal_scores,
    refusal_token_ids,
)
from safesteer.directions.sweeping import Sweep, SweepConfig, sweep
from safesteer.distillation.loop import StepRecord, distill
from safesteer.distillation.state import DistillConfig, prepare_student
from safesteer.distillation.vllm import server_sampler
from safesteer.evaluation.scores import EvalConfig, Evaluation, Scores, evaluate
from safesteer.evaluation.suite import Suite, run_suite
from safesteer.exporting import check_reload, export
from safesteer.judges.classifiers import EndpointJudge, FirstToken, Guard
from safesteer.judges.judge import Verdict, agreement
from safesteer.judges.wording import refuses, refuses_anywhere
from safesteer.models.chat_model import ChatModel
from safesteer.models.generation import generate
from safesteer.models.loading import load_model, to_bridge
from safesteer.models.sharding import shard
from safesteer.models.text_loss import perplexity
from safesteer.prompts.benchmarks import load_benchmark
from safesteer.prompts.prompt_set import PromptSet, load_prompts
from safesteer.recipes import Recipe, recipe
from safesteer.steering.direction import Direction, steer
from safesteer.steering.interventions import ablate, add, clamp, gate
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenConfig, TokenSet

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
    "choose_direction",
    "choose_coeff",
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
