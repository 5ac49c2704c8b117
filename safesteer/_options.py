"""The options of the command line, by command: name in Python, what it is, default.

Commands that take many options share them, so they are tables here; `cli` makes signatures of them.
"""

from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(help="Hub id, local folder, GGUF file, 'smollm2-135m' or 'qwen2.5-coder-0.5b'."),
]
Out = Annotated[Path, typer.Option("--out", help="The run folder to write or to continue.")]
Preset = Annotated[
    str,
    typer.Option(
        help="'quick' (small machine), 'two-sided' (a model that refuses) or 'paper' (as published)."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe file (TOML), such as a run folder's recipe.toml.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Your own prompts, JSON Lines (default: the project's pairs).")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, e.g. distill.divergence=reverse. May be repeated."),
]
Track = Annotated[
    str | None, typer.Option(help="Follow the distillation in a tracker: tensorboard, wandb, ...")
]
Profile = Annotated[
    bool, typer.Option("--profile", help="Measure where the time goes: profile.csv and profile.html.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model (default: its main branch).")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's repository ships.")
]
Template = Annotated[
    str | None, typer.Option(help="For a base model: raw, plain, chatml or a Jinja file (default: its own).")
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option("--template-arg", help="Of the chat template, e.g. enable_thinking=true. May be repeated."),
]
Quantize = Annotated[
    str | None, typer.Option(help="4bit: the frozen base in 4 bits, under an adapter (distill.lora_rank).")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="For a model that does not fit one device: auto (GPUs, then CPU, then disk), disk, or JSON.",
    ),
]
# Where a model comes from:
SOURCE: dict[str, tuple[Any, Any]] = {
    "revision": (Revision, None),
    "trust_remote_code": (TrustRemoteCode, False),
    "template": (Template, None),
    "template_args": (TemplateArgs, None),
    "quantize": (Quantize, None),
    "device_map": (DeviceMap, None),
}
# Of every command that runs stages:
OPTIONS: dict[str, tuple[Any, Any]] = {
    "model": (Model, "smollm2-135m"),
    "out": (Out, Path("run")),
    "preset": (Preset, "quick"),
    "recipe": (RecipeFile, None),
    "seed": (Seed, None),
    **SOURCE,
    "prompts": (Prompts, None),
    "changes": (Changes, None),
    "track": (Track, None),
    "profile": (Profile, False),
}
# Of the export, which takes a finished run instead of a model where a strength is named:
EXPORT: dict[str, tuple[Any, Any]] = {
    **OPTIONS,
    "out": (Annotated[Path | None, typer.Option("--out", help="The run folder, or the model's.")], None),
    "strength": (
        Annotated[
            float | None,
            typer.Option(
                help="Of a finished RUN in MODEL's place: 0 is the base, 1 the student, 0.7 between."
            ),
        ],
        None,
    ),
}
# Of the search:
SEARCH: dict[str, tuple[Any, Any]] = {
    **{name: option for name, option in OPTIONS.items() if name not in ("track", "profile")},
    "out": (Annotated[Path, typer.Option("--out", help="The folder to write or continue.")], Path("search")),
    "trials": (Annotated[int, typer.Option(help="Trials in all.")], 30),
    "pick": (
        Annotated[int | None, typer.Option(help="Choose this trial of a search that is there; run none.")],
        None,
    ),
}
# Of the benchmarks:
EVALUATE: dict[str, tuple[Any, Any]] = {
    "target": (
        Annotated[str, typer.Argument(help="A run folder (base and student), or a model.")],
        Parameter.empty,
    ),
    "suite": (Annotated[str, typer.Option(help="'quick', 'small', 'paper' or 'robust'.")], "quick"),
    "out": (Annotated[Path | None, typer.Option(help="Folder to write or continue.")], None),
    "data": (Annotated[Path | None, typer.Option(help="Folder of local benchmark rows.")], None),
    "dial": (
        Annotated[bool, typer.Option("--dial", help="Strengths between base and student of a run instead.")],
        False,
    ),
    "allow_code": (
        Annotated[
            bool, typer.Option("--allow-code", help="Run what the model writes, confined (HumanEval).")
        ],
        False,
    ),
    **SOURCE,
}
