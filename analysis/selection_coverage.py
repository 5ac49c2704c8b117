"""What S covers before anything is trained: horizon, size, ranking and source of the samples.

Fresh answers of the steered teacher to 32 harmful and 32 harmless prompts that selection never saw:
`kl_share_harmful` and `kl_share_harmless` are the shares of KL(teacher || base) over them that lie on S.
These are the paper's claims about selection, one step before their effect on training. Refuted if S from
the base's samples or by the mean covers as much as the paper's way, if the share stops growing before
K = 50, or if the kinds of words (columns of groups, shares of S) do not change with the horizon.
"""

from collections import Counter
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from ablation import Selected, Study, read_command_line, run, selected
from torch import Tensor

import safesteer as ss
from safesteer._files import write_text
from safesteer.attribution.coverage import sum_by_step
from safesteer.attribution.word_groups import WORD_GROUPS, by_word
from safesteer.report.figures import SEQUENCE, figure_of
from safesteer.tokens.sampling import sample_answers

ARMS = {
    "K = 50": {},
    "K = 10": {"tokens.k": 10},
    "K = 25": {"tokens.k": 25},
    "K = 100": {"tokens.k": 100},
    "K = 200": {"tokens.k": 200},
    "K = 500": {"tokens.k": 500},
    "H = 1": {"tokens.horizon": 1},
    "H = 3": {"tokens.horizon": 3},
    "H = 5": {"tokens.horizon": 5},
    "by the mean": {"tokens.method": "mean"},
    "base's samples": {"tokens.rollouts": "base"},
    "harmful prompts": {"tokens.prompts": "harmful"},
    "of tokens that occur": {"tokens.min_steered_prob": 1e-3},
}
N_PROMPTS, HELD_OUT_SEED = 32, 1000


def held_out(arm: Selected) -> dict[str, Tensor]:
    """Measure the KL of every token along fresh samples: the same for all arms, which share a direction."""
    config = ss.TokenConfig(n_samples=2, horizon=7, seed=HELD_OUT_SEED)
    prompts = ss.load_prompts().split("distill").first(N_PROMPTS)
    return {
        label: sum_by_step(arm.base, sample_answers(arm.base, arm.direction, texts, config)).kl.sum(0)
        for label, texts in (("harmful", prompts.harmful), ("harmless", prompts.harmless))
    }


def covered(arm: Selected, kl: dict[str, Tensor]) -> dict[str, Any]:
    """Return shares of KL on S along fresh samples, and the kinds of words in S."""
    ids, tokens = arm.tokens.ids, arm.tokens.tokens
    row = {f"kl_share_{label}": float(parts[ids].sum() / parts.sum()) for label, parts in kl.items()}
    groups = Counter(named[0] for t in tokens if (named := by_word(t.text)))
    shares = {group: groups[group] / len(tokens) for group in WORD_GROUPS}
    return {
        **row,
        "n_tokens": len(tokens),
        **shares,
        "tokens": " ".join(repr(t.text) for t in tokens[:12]),
    }


def bars(table: pd.DataFrame) -> go.Figure:
    """Draw means over seeds, and the range of the seeds."""
    traces = []
    for colour, label in zip(SEQUENCE, ("harmful", "harmless"), strict=False):
        rows = table.groupby("arm", sort=False)[f"kl_share_{label}"]
        error = {"array": rows.max() - rows.mean(), "arrayminus": rows.mean() - rows.min()}
        traces.append(
            go.Bar(x=list(rows.groups), y=rows.mean(), error_y=error, name=label, marker={"color": colour})
        )
    figure = figure_of(traces, "", "share of KL(teacher || base) on S", "light", height=380, barmode="group")
    return figure.update_yaxes(tickformat=".0%")


def main(study: Study) -> pd.DataFrame:
    """Score every arm, without training."""
    kl: dict[str, Tensor] = {}

    def coverage(arm: Selected) -> dict[str, Any]:
        if not kl:
            kl.update(held_out(arm))
        return covered(arm, kl)

    table = run(study, ARMS, coverage, selected)
    write_text(study.folder.with_suffix(".html"), bars(table).to_html(include_plotlyjs=True))
    return table


if __name__ == "__main__":
    print(main(read_command_line("selection_coverage", __doc__)).to_string())
