"""What every ablation shares: one arm is a recipe with some settings replaced; its score is a row.

1. the direction, once per model (stage 1 of a run folder, cached);
2. for each arm and seed: select S, distil, and measure the student on prompts that are there for choosing
   (arm_scores.py): its refusals, and over-refusal where it is made to refuse as much as every other arm;
3. a csv, a Markdown table, and a figure of harmful against harmless refusals with 95 % intervals.

What a recipe gives with a seed is a file named after the recipe's hash: an interrupted study continues, and
studies with an arm in common train it once. `--quick` shrinks everything to minutes:
it shows that a script works and says nothing about its claim. `--model`, `--preset` and `--set` are those
of `safesteer align`; `--laptop` are settings with which the paper's preset fits a small model that refuses
and two cores. Results lie under the model's name by default, so those of two models never meet.

`analysis/results/*.csv` are earlier rows, of a home-made refusing model that nothing makes any more
(docs/log.md). There every arm stops after five steps, which suited one of them: they show places on one
curve, not which arm is better.
"""

import argparse
import html
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import arm_scores
import pandas as pd
import plotly.graph_objects as go
from rich.console import Console

import safesteer as ss
from safesteer._files import from_json, read_json, write_json, write_text
from safesteer._intervals import wilson
from safesteer.directions.refusal_tokens import RefusalTokens
from safesteer.directions.shifts import representation_shift
from safesteer.models.precision import cast_weights, weight_dtype
from safesteer.recipes import SECTIONS
from safesteer.report.figures import SEQUENCE, figure_of

RESULTS = Path(__file__).parent / "results"
LEDGER = RESULTS / "looks.csv"  # of every study of this folder
# The one key of an arm that is not a setting: how many harmful prompts are distilled on.
N_HARMFUL = "n_harmful"
PER_ROW = {"prompts", "lambada_rows"}  # of the scores: a line per prompt or row, in a csv of its own
# What fits a model of 0.5B that refuses, and two cores. Nothing passes the published selection there
# (docs/log.md): the direction is found as in the preset "two-sided". Selection and loss are as published.
LAPTOP = {
    "direction.extraction": "auto",
    "direction.coeff": 1.6,
    "direction.n_val": 16,
    "direction.n_controls": 0,
    "direction.max_kl": 0.5,
    "direction.max_layer_share": 0.7,
    "tokens.batch_size": 8,
    "distill.n_steps": 8,
    "distill.harmful_per_step": 16,  # 16 answers per step as 4 times 4, but 8 steps see all 100 prompts
    "distill.n_rollouts": 1,
    "distill.max_new_tokens": 24,
    "distill.micro_batch": 16,
}
TITLES = {
    "harmful": "harmful refused",
    "harmless": "harmless refused",
    "over_at_75": "over-refusal at 75 %",
    "auc": "AUC of the margin",
    "kl_harmless": "KL to base, harmless",
    "perplexity": "perplexity, own prose",
    "wikitext2_perplexity": "WikiText-2",
    "lambada": "LAMBADA, right",
    "kl_share_of_s": "S's share of KL",
}
NUMBERS = {
    "over_at_75": 2,
    "auc": 2,
    "kl_harmless": 3,
    "shift": 2,
    "perplexity": 2,
    "lambada": 2,
    "n_tokens": 0,
    "kl_share_of_s": 2,
}
QUICK = {
    "direction.n_train": 8,
    "direction.n_val": 2,
    "direction.n_controls": 1,
    "direction.n_held_out": 1,
    "direction.n_compare_prompts": 2,
    "direction.n_compared": 1,
    "tokens.n_samples": 1,
    "distill.n_steps": 2,
    "distill.harmful_per_step": 3,
    "distill.n_rollouts": 1,
    "distill.max_new_tokens": 4,
}


@dataclass(frozen=True)
class Study:
    """The command line of an ablation, and what is loaded for it."""

    name: str
    out: Path
    model: str
    preset: str
    seeds: int
    quick: bool
    settings: Mapping[str, Any]
    console: Console
    data: Path | None = None

    @property
    def limit(self) -> int | None:
        """Prompts per set on which a model is measured; None: all."""
        return 6 if self.quick else None

    @property
    def folder(self) -> Path:
        return self.out / f"{self.name}{'-quick' if self.quick else ''}"

    def recipe(self, arm: Mapping[str, Any], seed: int) -> ss.Recipe:
        changes = dict(self.settings) | {k: v for k, v in arm.items() if k != N_HARMFUL}
        if self.quick:
            changes |= QUICK | ({"distill.harmless_per_step": 4} if self.preset == "quick" else {})
        return ss.recipe(self.preset, seed, **changes)

    def key(self, recipe: ss.Recipe, *stages: str) -> str:
        """Return the name of what the model gives under a recipe, of which these stages' settings count."""
        others = SECTIONS.keys() - set(stages)
        plain = replace(recipe, **{name: SECTIONS[name]() for name in others})
        return f"{Path(self.model).name}-{plain.hash}"

    @property
    def direction_run(self) -> Path:
        return self.out / "rows" / f"direction-{self.key(self.recipe({}, 0), 'direction')}"

    def direction(self, base: ss.ChatModel) -> ss.Direction:
        """Find the direction with seed 0, once for all studies that find it in the same way."""
        run = self.direction_run
        if not (run / "direction.safetensors").exists():
            ss.align(self.model, run, self.recipe({}, 0), stages=("direction",), console=self.console)
        return ss.Direction.load(run / "direction.safetensors", base)


def command_line(about: str) -> argparse.ArgumentParser:
    """Make the parser of what every study understands."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="Hub id, folder or the name of a known model")
    parser.add_argument("--preset", default="quick", choices=["quick", "paper-qwen", "paper-llama"])
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--laptop", action="store_true", help="settings of the paper's preset for two cores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of benchmark rows: public prompts, LAMBADA")
    parser.add_argument("--quick", action="store_true", help="minutes, one seed: does the script work?")
    parser.add_argument("--out", type=Path, help="default: analysis/results/MODEL")
    return parser


def study_of(name: str, options: argparse.Namespace) -> Study:
    # The committed rows of other models lie in the folder above, and would be taken for this one's.
    out = options.out or RESULTS / Path(options.model).name
    settings = (LAPTOP if options.laptop else {}) | dict(pair.split("=", 1) for pair in options.settings)
    seeds = 1 if options.quick else options.seeds
    quick, preset = options.quick, options.preset
    return Study(name, out, options.model, preset, seeds, quick, settings, Console(), options.data)


def read_command_line(name: str, about: str) -> Study:
    return study_of(name, command_line(about).parse_args())


def as_file_name(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-").replace(",", "")


def row(folder: Path, name: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return what the file of that name holds; on the first call it is made by `make(*args)`."""
    path = folder / f"{as_file_name(name)}.json"
    if not path.exists():
        write_json(path, make(*args))
    return read_json(path)


@dataclass(frozen=True, eq=False)
class Selected:
    """The teacher and S under an arm's settings."""

    study: Study
    base: ss.ChatModel
    direction: ss.Direction
    tokens: ss.TokenSet
    recipe: ss.Recipe


@dataclass(frozen=True, eq=False)
class Trained(Selected):
    """One arm's student, with what it came from."""

    student: ss.ChatModel


def selected(study: Study, base: ss.ChatModel, arm: Mapping[str, Any], seed: int) -> Selected:
    """Take the first two steps under the arm's settings."""
    recipe, direction = study.recipe(arm, seed), study.direction(base)
    texts = ss.load_prompts().split("val").texts(recipe.tokens.prompts)[: 4 if study.quick else None]

    def select() -> dict[str, Any]:
        return asdict(ss.select_tokens(base, direction, texts, recipe.tokens))

    raw = row(study.out / "rows" / "selected", study.key(recipe, "direction", "tokens"), select)
    return Selected(study, base, direction, from_json(ss.TokenSet, raw), recipe)


def trained(study: Study, base: ss.ChatModel, arm: Mapping[str, Any], seed: int) -> Trained:
    """Take the paper's three steps under the arm's settings, and distil on the paper's split alone."""
    first, pairs = selected(study, base, arm, seed), ss.load_prompts().split("distill")
    harmful = set(pairs.harmful[: arm.get(N_HARMFUL)])
    prompts = ss.PromptSet(tuple(p for p in pairs.prompts if p.label == "harmless" or p.text in harmful))
    config = replace(first.recipe.distill, splits=("distill",))
    student = ss.distill(base, first.direction, first.tokens, prompts, config)
    cast_weights(student.model, weight_dtype(base.model))  # or rounding would count as drift
    return Trained(study, base, first.direction, first.tokens, first.recipe, student)


def measured(chat: ss.ChatModel, base: ss.ChatModel, study: Study) -> dict[str, Any]:
    """Measure a model on prompts that are there for choosing (arm_scores.py)."""
    opens = RefusalTokens.load(study.direction_run / "refusal_tokens.csv").ids
    return arm_scores.measured(chat, base, opens, study.data, study.limit)


def scored(arm: Trained) -> dict[str, Any]:
    """Measure the student, and how far its representations moved; name S and its size."""
    general = ss.load_prompts().split("val").first(arm.study.limit).harmless
    points = representation_shift({"base": arm.base, "student": arm.student}, general)
    return {
        **measured(arm.student, arm.base, arm.study),
        "shift": float(points[points.model == "student"]["shift"].iloc[0]),
        "n_tokens": len(arm.tokens),
        "kl_share_of_s": arm.tokens.coverage["kl_share"],
        "tokens": " ".join(repr(t.text) for t in arm.tokens.tokens[:12]),
    }


Untrained = Callable[[ss.ChatModel, ss.Direction], AbstractContextManager[ss.ChatModel]]


def as_it_is(base: ss.ChatModel, direction: ss.Direction) -> AbstractContextManager[ss.ChatModel]:
    return nullcontext(base)


def run(
    study: Study,
    arms: Mapping[str, Mapping[str, Any]],
    score: Callable[..., dict[str, Any]] = scored,
    make: Callable[..., Selected] = trained,
    untrained: Mapping[str, Untrained] = MappingProxyType({"base": as_it_is}),
) -> pd.DataFrame:
    """Score what `make` makes of every arm with every seed; return and write the table.

    Rows lie in a folder of the name of `score`, so two ways of scoring need two names. Beside students stand
    models without training, as contexts that yield them.
    """
    base = ss.load_model(study.model, dtype=study.recipe({}, 0).dtype)
    rows, n_pairs = [], len(ss.load_prompts().split("distill").harmful)
    jobs: list[tuple[str, int]] = [(arm, seed) for seed in range(study.seeds) for arm in arms]

    def made(arm: str, seed: int) -> dict[str, Any]:
        return score(make(study, base, arms[arm], seed))

    def beside(model: Untrained) -> dict[str, Any]:
        with model(base, study.direction(base)) as chat:
            return measured(chat, base, study)

    key = study.key(study.recipe({}, 0), "direction")
    for name, model in untrained.items() if score is scored else ():
        rows.append(
            {"arm": name, "seed": 0, **row(study.out / "rows" / as_file_name(name), key, beside, model)}
        )
    for arm, seed in jobs:
        n = min(arms[arm].get(N_HARMFUL, n_pairs), n_pairs)
        key = f"{study.key(study.recipe(arms[arm], seed), *SECTIONS)}-{n}"
        scores = row(study.out / "rows" / score.__name__, key, made, arm, seed)
        rows.append({"arm": arm, "seed": seed, **scores})
        study.console.print({k: v for k, v in rows[-1].items() if k not in PER_ROW}, highlight=False)
    table = pd.DataFrame(rows)
    for name in PER_ROW.intersection(table):
        single = pd.concat(pd.DataFrame(r[name]).assign(arm=r["arm"], seed=r["seed"]) for r in rows)
        write_text(study.folder.with_suffix(f".{name}.csv"), single.to_csv(index=False))
    table = table.drop(columns=PER_ROW, errors="ignore")
    write_text(study.folder.with_suffix(".csv"), table.to_csv(index=False))
    if {"harmful", "harmless"} <= set(table):
        numbers = {name: digits for name, digits in NUMBERS.items() if name in table}
        write_text(study.folder.with_suffix(".md"), summary(table, "arm", numbers))
        page = trade_off(table, n_x="n_harmless").to_html(include_plotlyjs=True)
        write_text(study.folder.with_suffix(".html"), page)
    return table


def summary(table: pd.DataFrame, by: str, numbers: Mapping[str, int]) -> str:
    """Write a Markdown table: means of seeds, then 95 % over the prompts of one seed, then the seeds' range.

    `numbers` are the columns beside the two refusal rates, with their digits.
    """
    titles = [by, "seeds", *(TITLES.get(name, name) for name in ("harmful", "harmless", *numbers))]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    n = {"harmful": "n", "harmless": "n_harmless" if "n_harmless" in table else "n"}
    for name, rows in table.groupby(by, sort=False):
        cells = [_rate(rows[column], int(rows[n[column]].iloc[0])) for column in n]
        cells += [_number(rows[column], digits) for column, digits in numbers.items()]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rate(values: pd.Series, n: int) -> str:
    low, high = wilson(round(values.mean() * n), n)
    seeds = f"; {values.min():.0%} to {values.max():.0%}" if len(values) > 1 else ""
    return f"{values.mean():.0%} ({low:.0%} to {high:.0%}{seeds})"


def _number(values: pd.Series, digits: int) -> str:
    if values.isna().any():
        return ""
    seeds = f" ({values.min():.{digits}f} to {values.max():.{digits}f})" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{seeds}"


def trade_off(
    table: pd.DataFrame,
    by: str = "arm",
    x: str = "harmless",
    x_title: str = "harmless prompts refused",
    n_x: str = "n",
) -> go.Figure:
    """Draw harmful refusals (wanted) over column `x`: a point per seed, means with 95 % intervals.

    Intervals are Wilson's over the prompts of all seeds together, and over the `n_x` rows behind x.
    """
    traces = []
    for i, (arm, rows) in enumerate(table.groupby(by, sort=False)):
        colour, label = SEQUENCE[i % len(SEQUENCE)], html.escape(str(arm), quote=False)
        means, errors = [], []
        for column, n in ((x, n_x), ("harmful", "n")):
            mean, total = rows[column].mean(), int(rows[n].sum())
            low, high = wilson(round(mean * total), total)
            means.append(mean)
            errors.append({"array": [high - mean], "arrayminus": [mean - low], "thickness": 1, "width": 3})
        traces.append(
            go.Scatter(
                x=[means[0]],
                y=[means[1]],
                error_x=errors[0],
                error_y=errors[1],
                name=label,
                mode="markers",
                marker={"color": colour, "size": 11},
                hovertemplate=f"{label}<br>harmful %{{y:.0%}}, {x_title} %{{x:.0%}}<extra></extra>",
            )
        )
        small = {"color": colour, "size": 5, "opacity": 0.5}
        traces.append(
            go.Scatter(x=rows[x], y=rows.harmful, mode="markers", marker=small, showlegend=False, name=label)
        )
    figure = figure_of(traces, x_title, "harmful prompts refused", "light", height=440)
    return figure.update_xaxes(tickformat=".0%").update_yaxes(tickformat=".0%")
