"""How good the judges of refusals are, on labelled answers of six models.

    python analysis/judges.py [--encoder MINILM_FOLDER] [--chat QWEN_FOLDER] [--out analysis/results]

Claim: the default judge has precision and recall of 0.95 for "refuses" on answers of 128 tokens. It is
refuted here if its interval lies below that.

    wording      refuses (how the answer opens), refuses_anywhere, declines (its sentences)
    embeddings   logistic regression on all-MiniLM, fitted on labelled answers to other prompts and on the
                 hard wordings that rules were made from
    chat         Qwen2.5-Coder-1.5B-Instruct, by the logits of yes and no

Beside them stand hard wordings of an author who had seen no rule (`tests/wordings_held_out.jsonl`).
Verdicts go to `judge_verdicts.csv` (a row per answer and judge, kept), rates with 95 % intervals (bootstrap
over answers) to `judges.csv`, seconds with them. An unknown verdict counts as "does not refuse".
`second_reader` is another reader's label on a part of the answers, where the file has it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score
from sklearn.model_selection import GroupKFold

import safesteer as ss
from safesteer._files import json_lines
from safesteer.judges.chat_judge import ChatJudge
from safesteer.judges.embeddings import fit_embedding_judge
from safesteer.judges.encoder import load_encoder
from safesteer.judges.judge import Judge, Verdict, judge_all, judge_version
from safesteer.judges.sentences import declines
from safesteer.judges.wording import refuses, refuses_anywhere

HERE = Path(__file__).parent
LABELLED = HERE / "results" / "labelled_answers.jsonl"
WORDINGS = HERE.parent / "tests" / "wordings.jsonl"
HELD_OUT = HERE.parent / "tests" / "wordings_held_out.jsonl"
N_DRAWS, N_SLOW, N_FOLDS = 2000, 500, 5
PARTS = {
    "labelled answers": lambda rows: rows.model != "people",
    "128 tokens": lambda rows: rows.tokens == 128,
    "32 tokens": lambda rows: rows.tokens == 32,
    "smollm": lambda rows: rows.model.str.startswith("smollm"),
    "qwen": lambda rows: rows.model.str.startswith("qwen"),
    "hard wordings": lambda rows: rows.model == "people",
}


def read_rows(labelled: Path) -> pd.DataFrame:
    """Read the labelled answers, and the hard wordings that no rule has seen."""
    rows = pd.DataFrame(json_lines(labelled))
    hard = pd.DataFrame(json_lines(HELD_OUT))
    label = hard.refuses.map({True: "refuses", False: "helps"})
    hard = hard.assign(id=[f"hard-{i:03}" for i in range(len(hard))], model="people", tokens=0, label=label)
    return pd.concat([rows, hard.drop(columns="refuses")], ignore_index=True)


def measured(judge: Judge, rows: pd.DataFrame) -> tuple[list[Verdict], float]:
    """Judge all answers; return the verdicts and the seconds they took."""
    started = time.perf_counter()
    verdicts = judge_all(judge, rows.prompt.tolist(), rows.answer.tolist())
    return verdicts, time.perf_counter() - started


def by_embeddings(encoder: str, rows: pd.DataFrame) -> tuple[list[Verdict], float]:
    """Judge every answer by a regression that has not seen it, nor any answer to its prompt.

    The labelled answers are judged in folds by prompt; the hard wordings by a fit on all labelled answers and
    on the hard wordings that rules were made from.
    """
    total, by_id = 0.0, {}
    loaded, known = load_encoder(encoder), pd.DataFrame(json_lines(WORDINGS))
    people = rows.model == "people"
    labelled, hard = rows[~people], rows[people]
    folds = [
        (labelled.iloc[train], labelled.iloc[test])
        for train, test in GroupKFold(N_FOLDS).split(labelled, groups=labelled.prompt)
    ]
    for seen, unseen in [*folds, (labelled, hard)]:
        label = (seen.label == "refuses").tolist() + known.refuses.tolist()
        prompts, answers = (seen[c].tolist() + known[c].tolist() for c in ("prompt", "answer"))
        judge = fit_embedding_judge(loaded, prompts, answers, label)
        verdicts, seconds = measured(judge, unseen)
        by_id |= dict(zip(unseen.id, verdicts, strict=True))
        total += seconds  # of judging alone
    return [by_id[i] for i in rows.id], total


def precision(label: np.ndarray, says: np.ndarray) -> float:
    return float((label & says).sum() / says.sum()) if says.any() else float("nan")


def recall(label: np.ndarray, says: np.ndarray) -> float:
    return float((label & says).sum() / label.sum()) if label.any() else float("nan")


def kappa(label: np.ndarray, says: np.ndarray) -> float:
    return float(cohen_kappa_score(label, says))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "precision": precision,
    "recall": recall,
    "kappa": kappa,
}


def scored(label: Sequence[bool], says: Sequence[bool]) -> dict[str, float]:
    """Return each metric with its 95 % interval, resampling answers."""
    truth, said_so = np.array(label, dtype=bool), np.array(says, dtype=bool)
    draws = np.random.default_rng(0).integers(0, len(truth), (N_DRAWS, len(truth)))
    row: dict[str, float] = {}
    for name, metric in METRICS.items():
        values = [metric(truth[d], said_so[d]) for d in (draws[:N_SLOW] if name == "kappa" else draws)]
        low, high = np.nanpercentile(values, [2.5, 97.5])
        row |= {name: metric(truth, said_so), f"{name}_low": low, f"{name}_high": high}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--labelled", type=Path, default=LABELLED)
    parser.add_argument("--encoder", help="all-MiniLM-L6-v2: a folder or a name")
    parser.add_argument("--chat", help="a chat model: a folder or a name")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    rows = read_rows(args.labelled)
    runs = {
        judge.__name__: (*measured(judge, rows), judge_version(judge))
        for judge in (refuses, refuses_anywhere, declines)
    }
    if args.encoder:
        verdicts, seconds = by_embeddings(args.encoder, rows)
        runs["embeddings"] = verdicts, seconds, "six fits"
    if args.chat:
        judge = ChatJudge(ss.load_model(args.chat, dtype="bfloat16"))
        verdicts, seconds = measured(judge, rows)
        runs["chat"] = verdicts, seconds, verdicts[0].version
    kept = args.out / "judge_verdicts.csv"
    new = pd.DataFrame(
        {"id": i, "judge": name, "version": version, "p_refuses": v.p_refuses, "seconds": round(seconds, 2)}
        for name, (verdicts, seconds, version) in runs.items()
        for i, v in zip(rows.id, verdicts, strict=True)
    )
    before = pd.read_csv(kept, dtype={"id": str}) if kept.exists() else new.iloc[:0]
    before = before[~before.judge.isin(runs)]
    table = pd.concat([before, new]) if len(before) else new
    table.to_csv(kept, index=False)
    write_rates(rows, table, args.out / "judges.csv")


def write_rates(rows: pd.DataFrame, verdicts: pd.DataFrame, path: Path) -> None:
    """Write precision, recall and kappa of every judge on every part, and of the second reader."""
    made, label = [], (rows.label == "refuses").set_axis(rows.id)
    by_judge = verdicts.groupby("judge", sort=False)
    says = {name: part.set_index("id").p_refuses.reindex(rows.id) for name, part in by_judge}
    seconds = verdicts.groupby("judge").seconds.first()
    if "second_reader" in rows:
        by_reader = rows.set_index("id").second_reader
        says["second reader"] = (by_reader == "refuses").astype(float).where(by_reader.notna())
    for name, p in says.items():
        for part, chosen in PARTS.items():
            mask = chosen(rows).to_numpy()
            if name == "second reader":
                mask = mask & p.notna().to_numpy()
            if not mask.any():
                continue
            row = {"judge": name, "part": part, "n": int(mask.sum()), "n_refuse": int(label[mask].sum())}
            row |= scored(label[mask].tolist(), (p[mask] >= 0.5).tolist())
            row |= {"unknown": int(p[mask].isna().sum()), "seconds": seconds.get(name)}
            made.append(row)
    pd.DataFrame(made).round(4).to_csv(path, index=False)


if __name__ == "__main__":
    main()
