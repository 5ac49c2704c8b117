"""Recipes: every choice of a run in one frozen value, with two presets.

`paper` is the published recipe to the letter (arXiv 2606.02530, sections 3 and 4). `quick` is the
small-machine one, found by measurement on SmolLM2-135M-Instruct (docs/experiments.md): it also
aligns a model that never refused.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from safesteer._errors import SafeSteerError
from safesteer._settings import AT_LEAST_1, FINITE, SHARE, check_settings
from safesteer.attribution.explanation import ExplainConfig
from safesteer.directions.sweeping import SweepConfig
from safesteer.distillation.state import DistillConfig
from safesteer.evaluation.scores import EvalConfig
from safesteer.tokens.token_set import TokenConfig

Extraction = Literal["auto", "instruction", "prefill", "system", "pca", "probe"]


@dataclass(frozen=True)
class Recipe:
    """Settings of all stages. `coeff=None` calibrates a prefill direction (1.0 for the paper's)."""

    preset: str = "quick"
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    extraction: Extraction = "auto"
    n_direction: int | None = None  # pairs of the train split that directions are read from
    coeff: float | None = None
    native_share: float = 0.25  # harmful prompts that must refuse natively for "instruction"
    pairs: Literal["all", "distil"] = "all"  # prompts distilled on; "all": those of train and val too
    check_every: int = 0  # steps after which early stopping looks at val; 0: never
    stop_refusal: float = 0.95  # share of its harmful prompts refused, and
    stop_kl: float = 0.1  # KL on its harmless ones, nats a token, at which training stops
    keep_adapter: bool = False  # with distill.lora_rank: write adapter/ beside the merged model
    sweep: SweepConfig = field(default_factory=SweepConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    explain: ExplainConfig = field(default_factory=ExplainConfig)

    def __post_init__(self) -> None:
        bounds = {"native_share": (0.0, math.inf), "stop_refusal": SHARE, "stop_kl": (0.0, math.inf)}
        check_settings(self, "", {**bounds, "coeff": FINITE, "n_direction": AT_LEAST_1})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the prompts that are distilled on."""
        return ("distil", "train", "val") if self.pairs == "all" else ("distil",)

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def quick(seed: int = 0) -> Recipe:
    """Under twenty minutes on two CPU cores, for models that refuse and models that do not."""
    return Recipe(
        preset="quick",
        seed=seed,
        n_direction=64,
        sweep=SweepConfig(n_prompts=8, n_controls=2, n_held_out=2),
        tokens=TokenConfig(min_steered_prob=1e-3, k_vote=30, n_samples=4, batch_size=32, seed=seed),
        distill=DistillConfig(seed=seed),
        evaluation=EvalConfig(),
    )


def paper(seed: int = 42) -> Recipe:
    """The published recipe: partial reverse KL, no anchor, 100 harmful prompts x 8 rollouts.

    Learning rate and minimum probability are those for Qwen; the paper uses lr 1e-6 for Llama.
    """
    return Recipe(
        preset="paper",
        seed=seed,
        extraction="instruction",
        coeff=1.0,
        pairs="distil",
        sweep=SweepConfig(rank_by="ablation", n_kl_tokens=1),
        tokens=TokenConfig(seed=seed),
        distill=DistillConfig(
            divergence="reverse",
            normalizer="partial",
            rollouts="student",
            decay=1.0,
            train="all",
            n_steps=25,
            harmful_per_step=4,
            harmless_per_step=0,
            n_rollouts=8,
            max_new_tokens=512,
            lr=1e-5,
            micro_batch=4,
            checkpoint_every=5,
            seed=seed,
        ),
        evaluation=EvalConfig(max_new_tokens=256),
    )


PRESETS = {"quick": quick, "paper": paper}


def recipe(preset: str = "quick", seed: int | str | None = None, **settings: Any) -> Recipe:
    """A preset with some settings replaced: recipe("quick", **{"distill.lr": 3e-5}).

    `seed` is that of everything random. Keys are field names of Recipe, or "stage.field". Strings are
    read as the field's type, so the command line can pass them through. Raises SafeSteerError for an
    unknown name or value.
    """
    if preset not in PRESETS:
        raise SafeSteerError(f"Unknown preset '{preset}': use one of {sorted(PRESETS)}.")
    found = PRESETS[preset]()
    if seed is not None:
        found = PRESETS[preset](_typed(found, "seed", seed, "seed"))
    for key, value in settings.items():
        stage, _, name = key.rpartition(".")
        if stage not in ("", "sweep", "tokens", "distill", "evaluation", "explain"):
            raise SafeSteerError(f"Unknown setting '{key}': there is no stage '{stage}'.")
        owner = getattr(found, stage) if stage else found
        known = [
            f.name for f in fields(owner) if f.name != "preset" and not is_dataclass(getattr(owner, f.name))
        ]
        if name not in known:
            raise SafeSteerError(f"Unknown setting '{key}': {stage or 'a recipe'} has {known}.")
        changed = replace(owner, **{name: _typed(owner, name, value, key)})
        found = replace(found, **{stage: changed}) if stage else changed
    return found


def _typed(owner: Any, name: str, value: Any, key: str) -> Any:
    """Read a command-line string as the field's type."""
    if not isinstance(value, str):
        return value
    hint = get_type_hints(type(owner))[name]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise SafeSteerError(f"The setting {key} must be one of {get_args(hint)}, not '{value}'.")
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise SafeSteerError(f"The setting {key} must be true or false, not '{value}'.")
        return value.lower() == "true"
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    kinds = [k for k in getattr(hint, "__args__", (hint,)) if k in (int, float)]
    if value.lower() == "none" and type(None) in getattr(hint, "__args__", ()):
        return None
    for kind in kinds:
        try:
            return kind(value)
        except ValueError:
            continue
    if kinds:
        raise SafeSteerError(f"The setting {key} must be a number, not '{value}'.")
    return value
