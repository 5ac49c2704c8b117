"""Recipes: the settings of a whole run in one frozen value, with presets and a TOML file.

"paper-qwen" and "paper-llama" are what the authors of arXiv 2606.02530 ran on either family; "paper" is the
one of the two that fits the model (`for_family`). "quick" is for small machines, found by measurement on
SmolLM2-135M-Instruct (4-bit weights); it also aligns a model that never refused. "two-sided" is for one that
refuses by itself, found on Qwen2.5-Coder-0.5B-Instruct: the student learns to tell harmful from harmless.
A recipe file holds any of the settings, over those of the preset that it names:

    preset = "quick"
    seed = 3

    [distill]
    lr = 1e-4
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from rich.table import Table

from safesteer._errors import SafeSteerError
from safesteer._settings import (
    OrNone,
    TextOrNone,
    Words,
    describe,
    section,
    setting,
    setting_or_none,
    settings,
)
from safesteer.settings import (
    MODEL_SOURCE,
    DirectionConfig,
    DistillConfig,
    EvaluateConfig,
    ExplainConfig,
    ExportConfig,
    TokenConfig,
)

SECTIONS = {
    "direction": DirectionConfig,
    "tokens": TokenConfig,
    "distill": DistillConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "explain": ExplainConfig,
}


@settings("")
class Recipe:
    """Settings of a whole run: a few of its own, and those of each stage."""

    preset: str = setting("quick", "Preset that the other settings change.")
    seed: int = setting(0, "Seed of everything random; ss.recipe gives it to every stage.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "float32", "Precision of base and teacher; 'auto': bfloat16 where the processor has it, else float32."
    )
    quantize: Annotated[Literal["4bit"] | None, OrNone] = setting_or_none(
        None, "Quantize the frozen base to 4 bits (nf4), under an adapter (distill.lora_rank); none: do not."
    )
    revision: TextOrNone = setting_or_none(None, "Branch, tag or commit on the Hub; none: the main branch.")
    trust_remote_code: bool = setting(False, "Run the code that the model's repository ships.")
    template: TextOrNone = setting_or_none(
        None, "Chat template: raw, plain, chatml or a Jinja file, for base models; none: the model's own."
    )
    template_args: Annotated[tuple[str, ...], Words] = setting(
        (), "Defaults of the template's arguments, as name=value: enable_thinking=true."
    )
    device_map: TextOrNone = setting_or_none(
        None, "Where blocks lie: auto (GPUs, then CPU, then disk), disk, or JSON by name; none: one device."
    )
    prompts: Literal["pairs", "mixed", "all"] = setting(
        "pairs",
        "Our prompts, if none are given: pairs; other kinds to distil on too (mixed); wider pairs too (all).",
    )
    direction: DirectionConfig = section(DirectionConfig, "Stage 1: find the direction.")
    tokens: TokenConfig = section(TokenConfig, "Stage 2: select the safety tokens.")
    distill: DistillConfig = section(DistillConfig, "Stage 3: teach the student.")
    export: ExportConfig = section(ExportConfig, "Stage 4: write the trained model.")
    evaluate: EvaluateConfig = section(EvaluateConfig, "Stage 5: measure base, teacher and student.")
    explain: ExplainConfig = section(ExplainConfig, "Stage 6: say why these tokens.")

    @property
    def source(self) -> dict[str, Any]:
        """What `load_model` takes beside the model's name, device and precision."""
        return {name: getattr(self, name) for name in MODEL_SOURCE}

    @property
    def hash(self) -> str:
        """Content hash, 16 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def rows(self) -> Iterator[tuple[str, Any, str, str]]:
        """Yield (setting, value, unit, description), stage by stage."""
        for owner, prefix in [(self, ""), *((getattr(self, name), f"{name}.") for name in SECTIONS)]:
            for name, info in describe(type(owner)):
                if prefix or name not in SECTIONS:
                    extra = info.json_schema_extra
                    unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
                    yield prefix + name, getattr(owner, name), unit, info.description or ""

    def __rich__(self) -> Table:
        table = Table(title=f"Settings of the preset '{self.preset}'", show_lines=False)
        for column in ("setting", "value", "unit", "meaning"):
            table.add_column(column, overflow="fold")
        for name, value, unit, description in self.rows():
            table.add_row(name, _shown(value), unit, description)
        return table

    def _repr_html_(self) -> str:
        import pandas as pd  # slow to import, and only needed here

        rows = [(name, _shown(value), unit, text) for name, value, unit, text in self.rows()]
        return pd.DataFrame(rows, columns=["setting", "value", "unit", "meaning"]).to_html(index=False)

    def save(self, path: str | Path) -> None:
        """Write a recipe file: every setting, with its meaning as a comment."""
        from safesteer._files import write_text  # loads torch, which printing settings does not need

        write_text(Path(path), self.to_toml())

    def to_toml(self) -> str:
        """Return the text of a recipe file, all values, so "paper" is written as "paper-qwen"."""
        document: Any = tomlkit.document()
        for name, value, unit, description in for_family(self).rows():
            stage, _, key = name.rpartition(".")
            if key == "seed" and stage and value == self.seed:
                continue  # it follows the recipe's; beside that one, an edit of it would count for nothing
            if stage and stage not in document:
                document.add(tomlkit.nl())
                document.add(stage, tomlkit.table())
            table = document[stage] if stage else document
            table.add(tomlkit.comment(f"{description} [{unit}]" if unit else description))
            table.add(key, list(value) if isinstance(value, tuple) else "none" if value is None else value)
        return tomlkit.dumps(document)

    @classmethod
    def load(cls, path: str | Path, *, seed: int | None = None, **changes: Any) -> "Recipe":
        """Read a recipe file; settings that it leaves out are those of its preset.

        Args:
            path: The file.
            seed: A seed for every stage, in place of the file's.
            changes: Settings that replace the file's, as `recipe` takes them.

        Raises:
            SafeSteerError: If the file cannot be read, is not TOML, or holds an unknown or bad setting.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SafeSteerError(f"Cannot read the recipe {path}: {error.strerror}.") from error
        except ValueError as error:
            raise SafeSteerError(f"The recipe {path} is not TOML: {error}.") from error
        settings: dict[str, Any] = {
            f"{name}.{key}" if isinstance(value, dict) else name: inner
            for name, value in values.items()
            for key, inner in (value.items() if isinstance(value, dict) else [("", value)])
        }
        if seed is not None:
            settings = {k: v for k, v in settings.items() if k.rpartition(".")[2] != "seed"} | {"seed": seed}
        settings |= changes
        return recipe(str(settings.pop("preset", "quick")), settings.pop("seed", None), **settings)


def _shown(value: Any) -> str:
    """Show a value as the command line and recipe files spell it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def quick() -> Recipe:
    """Build the preset for small machines: it aligns models that refuse and models that do not."""
    evaluate = EvaluateConfig(n_prompts=50)  # half of the pairs, and of the minutes
    return Recipe(dtype="auto", distill=DistillConfig(precision="auto"), evaluate=evaluate)


def paper_qwen() -> Recipe:
    """Build the published recipe for Qwen: partial reverse KL, no anchor, 100 harmful prompts x 8 answers.

    The values are those of the authors' scripts. They train weights in bfloat16, where most steps of this
    size round to nothing; here the frozen base and the passes have bfloat16, and what trains has float32.
    """
    return Recipe(
        preset="paper-qwen",
        seed=42,
        dtype="bfloat16",
        direction=DirectionConfig(
            extraction="instruction",
            coeff=1.0,
            rank_by="ablation",
            n_kl_tokens=1,
            n_train=None,
            n_val=None,
            n_val_first=None,
            n_controls=None,
            n_held_out=5,
        ),
        tokens=TokenConfig(k_vote=200, n_samples=8, min_steered_prob=1e-8, early_ends=False, batch_size=2),
        distill=DistillConfig(
            divergence="reverse",
            normalizer="partial",
            rollouts="student",
            splits=("distill",),
            decay=1.0,
            train_layers="all",
            n_steps=25,
            harmful_per_step=4,
            harmless_per_step=0,
            n_rollouts=8,
            max_new_tokens=512,
            precision="bfloat16",
            lr=1e-5,
            micro_batch=4,
            checkpoint_every=5,
        ),
        evaluate=EvaluateConfig(max_new_tokens=256, n_set_prompts=None),
    )


def paper_llama() -> Recipe:
    """Build the published recipe for Llama."""
    qwen = paper_qwen()
    tokens = replace(qwen.tokens, horizon=5, min_steered_prob=1e-7)
    # Steps of this rate are smaller than bfloat16's: an export in it would round most of them away.
    distill, exported = replace(qwen.distill, lr=1e-6), ExportConfig(dtype="float32")
    return replace(qwen, preset="paper-llama", tokens=tokens, distill=distill, export=exported)


def two_sided() -> Recipe:
    """Build the preset for models that refuse by themselves: steer harmful answers, ablate on harmless ones.

    A student of a teacher that only adds the direction refuses more of everything. Here harmless answers
    are compared with a base that has lost the direction, and both kinds on S alone.
    """
    return Recipe(
        preset="two-sided",
        dtype="auto",
        prompts="mixed",
        direction=DirectionConfig(
            coeff=1.6, n_train=None, n_val=16, n_kl_tokens=1, max_kl=0.5, max_layer_share=0.7
        ),
        tokens=TokenConfig(k_vote=200, n_samples=8, batch_size=8),
        distill=DistillConfig(
            harmless_teacher="ablated",
            anchor_support="same",
            splits=("distill", "train"),
            train_layers="all",
            n_steps=24,
            harmful_per_step=12,
            harmless_per_step=12,
            anchor_weight=1.5,
            late_anchor_weight=1.5,
            decay=0.7,
            lr=1e-5,
            precision="auto",
            micro_batch=24,
        ),
    )


PRESETS = {
    "quick": quick,
    "two-sided": two_sided,
    "paper": lambda: replace(paper_qwen(), preset="paper"),  # until `for_family` knows the model
    "paper-qwen": paper_qwen,
    "paper-llama": paper_llama,
}
BY_FAMILY = ("tokens.horizon", "tokens.min_steered_prob", "distill.lr", "export.dtype")  # where they differ


def for_family(chosen: Recipe, model_type: str = "") -> Recipe:
    """Replace the preset "paper" by that of the model's family; settings that were changed stay.

    Args:
        chosen: Any recipe; one of another preset is returned as it is.
        model_type: That of the model's configuration, such as "qwen3" or "llama". A model that is neither
            gets the values for Qwen.

    Example:
        >>> from safesteer.recipes import for_family
        >>> for_family(ss.recipe("paper"), "llama").tokens.horizon
        5
    """
    if chosen.preset != "paper":
        return chosen
    published = _values(recipe("paper", chosen.seed))
    changed = {name: value for name, value in _values(chosen).items() if value != published[name]}
    family = "paper-llama" if model_type.startswith("llama") else "paper-qwen"
    return recipe(family, chosen.seed, **changed)


def _values(chosen: Recipe) -> dict[str, Any]:
    return {name: value for name, value, *_ in chosen.rows()}


def recipe(preset: str = "quick", seed: int | str | None = None, **changes: Any) -> Recipe:
    """Build a recipe: a preset with some settings changed, and one seed for everything random.

    Args:
        preset: "quick", "two-sided", "paper-qwen", "paper-llama", or "paper": `align` takes the one of the
            last two that fits the model, and until then it has the values for Qwen.
        seed: Seed of every stage; None keeps the preset's.
        changes: Settings by name, such as `**{"distill.lr": 3e-5}`. Strings are read as the command line
            reads them.

    Raises:
        SafeSteerError: For an unknown preset or setting, a value outside its bounds, or a value of Qwen over
            the preset "paper", which a Llama would have to replace.

    Example:
        >>> ss.recipe("quick", seed=3, **{"distill.n_steps": 5}).tokens.seed
        3
    """
    if preset not in PRESETS:
        raise SafeSteerError(f"Unknown preset '{preset}': use one of {sorted(PRESETS)}.")
    base = PRESETS[preset]()
    values: dict[str, Any] = asdict(base) | ({} if seed is None else {"seed": seed})
    for key, value in changes.items():
        stage, _, name = key.rpartition(".")
        if key == "preset" or key in SECTIONS or (stage and stage not in SECTIONS):
            raise SafeSteerError(f"Unknown setting '{key}': `safesteer settings` lists what there is.")
        (values[stage] if stage else values)[name] = value
    result = Recipe(**values)
    for key in changes if preset == "paper" else ():
        if key in BY_FAMILY and _values(result)[key] == _values(base)[key]:
            raise SafeSteerError(
                f"{key}={changes[key]} is the value for Qwen, which the preset 'paper' replaces for a Llama:"
                " use the preset 'paper-qwen' or 'paper-llama'."
            )
    seeds = {
        name: replace(getattr(result, name), seed=result.seed)
        for name in SECTIONS
        if hasattr(getattr(result, name), "seed") and f"{name}.seed" not in changes
    }
    return replace(result, **seeds)
