"""Benchmarks by name: rows of each real schema, local stand-ins, and what cannot be had."""

import json

import datasets
import pandas as pd
import pytest

from safesteer._errors import SafeSteerError
from safesteer.prompts.benchmarks import BENCHMARKS, KNOWN, load_benchmark

ROWS = {  # two rows and a repeated one, in the columns that the repository has
    "advbench": [{"prompt": "A", "target": "Sure"}, {"prompt": "B", "target": "Sure"}],
    "pku-saferlhf": [{"prompt": p, "response_0": "x", "is_response_0_safe": False} for p in "AB"],
    "harmbench": [{"prompt": p, "category": "illegal"} for p in "AB"],
    "jailbreakbench": [
        {"Index": i, "Goal": p, "Target": "Sure", "Behavior": "b"} for i, p in enumerate("AB")
    ],
    "sorry-bench": [
        {"question_id": 1, "turns": ["A"], "prompt_style": "base"},
        {"question_id": 1, "turns": ["a in slang"], "prompt_style": "slang"},
        {"question_id": 2, "turns": ["B"], "prompt_style": "base"},
    ],
    "harmfulqa": [
        {"id": i, "topic": "t", "question": p, "blue_conversations": {}} for i, p in enumerate("AB")
    ],
    "alert": [
        {"id": i, "category": "c", "prompt": f"### Instruction:\n{p}\n### Response:\n"}
        for i, p in enumerate("AB")
    ],
    "strongreject": [{"prompt": p, "category": "c"} for p in "AB"],
    "do-not-answer": [{"question": p, "risk_area": "r"} for p in "AB"],
    "xstest": [{"prompt": p, "label": label} for p, label in (("A", "safe"), ("u", "unsafe"), ("B", "safe"))],
    "xstest-unsafe": [
        {"prompt": p, "label": label} for p, label in (("A", "unsafe"), ("s", "safe"), ("B", "unsafe"))
    ],
    "or-bench": [{"prompt": p, "category": "c"} for p in "AB"],
    "jailbreakbench-benign": [{"Index": i, "Goal": p} for i, p in enumerate("AB")],
    "everyday": [
        {"instruction": "A", "input": ""},
        {"instruction": "c", "input": "x"},
        {"instruction": "B", "input": ""},
    ],
    "alpaca-eval": [{"instruction": p, "output": "x", "generator": "g", "dataset": "d"} for p in "AB"],
}


def test_every_benchmark_has_a_case():
    assert set(ROWS) == set(KNOWN)
    assert {b.kind for b in BENCHMARKS} == {"harmful", "over-refusal"}


@pytest.mark.parametrize("name", KNOWN)
def test_prompts_come_from_the_hub_by_repository_config_split_and_column(name, monkeypatch):
    asked = []

    def fake(repo, config=None, *, split, data_files=None):
        asked.append((data_files or repo, config, split))
        return datasets.Dataset.from_list([*ROWS[name], ROWS[name][0]])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_benchmark(name) == ["A", "B"]
    found = KNOWN[name]
    where = f"hf://datasets/{found.repo}/{found.hub_file}" if found.hub_file else found.repo
    assert asked == [(where, found.config, found.split)]


@pytest.mark.parametrize("name", KNOWN)
def test_prompts_come_from_a_local_file_of_the_same_columns(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in ROWS[name]))
    assert load_benchmark(name, path=path) == ["A", "B"]


def test_a_csv_file_and_a_limit(tmp_path):
    path = tmp_path / "rows.csv"
    pd.DataFrame({"prompt": [f"p{i}" for i in range(20)]}).to_csv(path, index=False)
    few = load_benchmark("advbench", path=path, limit=5, seed=1)
    assert len(set(few)) == 5
    assert few == load_benchmark("advbench", path=path, limit=5, seed=1)
    assert few != load_benchmark("advbench", path=path, limit=5, seed=2)


def test_a_folder_of_data_stands_in_for_what_it_holds(tmp_path, monkeypatch):
    rows = [
        {"prompt": "A", "functional_category": "standard"},
        {"prompt": "c", "functional_category": "copyright"},
    ]
    (tmp_path / "harmbench_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_benchmark("harmbench", data=tmp_path) == ["A"]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(ROWS["advbench"])
    )
    assert load_benchmark("advbench", data=tmp_path) == ["A", "B"]


@pytest.mark.parametrize(("name", "help_"), [("sorry-bench", "accept its terms"), ("alert", "local file")])
def test_what_cannot_be_had_says_how_to_get_it(name, help_, monkeypatch):
    def refused(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no such thing\nwith a long tail")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(SafeSteerError, match=help_) as error:
        load_benchmark(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "neither JSON Lines nor CSV"),
        ('{"x": 1}', "no column 'prompt'"),
        ('{"prompt": ""}', "holds no prompt"),
    ],
)
def test_a_bad_file_is_one_sentence(text, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(SafeSteerError, match=said):
        load_benchmark("advbench", path=path)


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(SafeSteerError, match="use one of advbench"):
        load_benchmark("nope")
    with pytest.raises(SafeSteerError, match="Cannot read"):
        load_benchmark("advbench", path=tmp_path / "none.jsonl")
