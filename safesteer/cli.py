"""The command line: thin. Parse, call the library, turn a SafeSteerError into one sentence.

safesteer align MODEL --out RUN [--preset quick|paper] [--set distill.lr=3e-5 ...]
safesteer sweep, tokens, distill     the same up to that stage
safesteer evaluate MODEL_OR_RUN      a suite of benchmarks: quick, small or paper
safesteer report RUN                 the page again, from a run folder
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from safesteer._errors import SafeSteerError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Steer a model with its own refusal direction, see which tokens it moves, and teach it on"
    " those tokens alone.",
)

Model = Annotated[str, typer.Argument(help="Hub id, local folder, or 'smollm2-135m'.")]
Out = Annotated[Path, typer.Option("--out", help="The run folder to write or to continue.")]
Preset = Annotated[str, typer.Option(help="'quick' (small machine) or 'paper' (as published).")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Your own prompts, JSON Lines (default: the project's pairs).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, e.g. distill.divergence=reverse. May be repeated."),
]
Track = Annotated[
    str | None, typer.Option(help="Follow the distillation in a tracker: tensorboard, wandb, ...")
]


def _run(model, out, preset, seed, prompts, settings, track, stages=None) -> None:
    from safesteer import alignment, recipes  # heavy imports, not for --help
    from safesteer.prompts.prompt_set import PromptSet

    pairs = [s.partition("=") for s in settings or []]
    for key, equals, _ in pairs:
        if not equals:
            raise SafeSteerError(f"--set takes NAME=VALUE, not '{key}'.")
    values = {"seed": seed} | {key: value for key, _, value in pairs}
    if "preset" in values:
        raise SafeSteerError("The preset is chosen with --preset, not with --set.")
    chosen = recipes.recipe(preset, **values)
    console = Console()
    path = alignment.align(
        model,
        out,
        chosen,
        prompts=PromptSet.from_jsonl(prompts) if prompts else None,
        stages=stages or alignment.STAGES,
        track=track,
        console=console,
    )
    if (path / "report.html").exists() and (stages is None or "report" in stages):
        console.print(f"Report: {path / 'report.html'}   Model: {path / 'model'}", highlight=False)


@app.command()
def align(
    model: Model = "smollm2-135m",
    out: Out = Path("run"),
    preset: Preset = "quick",
    seed: Seed = None,
    prompts: Prompts = None,
    settings: Settings = None,
    track: Track = None,
) -> None:
    """All stages: direction, tokens, distillation, export, evaluation, report."""
    _run(model, out, preset, seed, prompts, settings, track)


def _stage(name: str, stages: tuple[str, ...], help_text: str) -> None:
    def command(
        model: Model = "smollm2-135m",
        out: Out = Path("run"),
        preset: Preset = "quick",
        seed: Seed = None,
        prompts: Prompts = None,
        settings: Settings = None,
        track: Track = None,
    ) -> None:
        _run(model, out, preset, seed, prompts, settings, track, stages)

    app.command(name, help=help_text)(command)


_stage("sweep", ("direction",), "Stage 1 alone: score candidate directions and select one.")
_stage("tokens", ("direction", "tokens"), "Up to stage 2: select the safety tokens.")
_stage("distill", ("direction", "tokens", "distill", "export"), "Up to the exported model.")


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder (base and student), or a model.")],
    suite: Annotated[str, typer.Option(help="'quick', 'small' or 'paper'.")] = "quick",
    out: Annotated[Path | None, typer.Option(help="Folder to write or continue.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of local benchmark rows.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run what the model writes, confined (HumanEval).")
    ] = False,
) -> None:
    """Refusals, over-refusals, capability, drift and perplexity, as one table with intervals."""
    from safesteer.evaluation.suite import run_suite

    console = Console()
    table = run_suite(target, suite, out, data=data, allow_code=allow_code, console=console)
    console.print(table.to_string(index=False, float_format="{:.3f}".format), highlight=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Build report.html again from a run folder."""
    from safesteer.report.page import write_report

    if not (run / "manifest.json").is_file():
        raise SafeSteerError(f"{run} is not a run folder: it has no manifest.json.")
    typer.echo(f"Report: {write_report(run)}")


def _terminated(number, frame) -> None:
    """SIGTERM ends a run as Ctrl-C does: files stay whole and the lock goes."""
    raise KeyboardInterrupt


def _is_out_of_memory(error: Exception) -> bool:
    """torch's CPU allocator raises a plain RuntimeError, a library that finds no room an ImportError."""
    signs = ("out of memory", "allocate memory", "failed to map segment")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def _fail(text: str) -> None:
    Console(stderr=True).print(f"error: {text}", highlight=False, markup=False)
    sys.exit(1)


def main() -> None:
    """Entry point: errors a user can act on are one sentence on stderr and exit code 1."""
    # A spinning OpenMP team slows every other process on a small machine; set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except SafeSteerError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(
            "Out of memory. Lower distill.micro_batch, tokens.batch_size or sweep.tokens_per_pass, or train an"
            " adapter (distill.lora_rank); the same command continues from the last checkpoint."
        )
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        _fail(f"{named}{error.strerror or error}")


if __name__ == "__main__":
    main()
