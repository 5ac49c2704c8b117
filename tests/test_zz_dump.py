import json, os
from pathlib import Path
import torch
from conftest import *
from test_attribution import CONFIG, answer_rows, fill_run
from safesteer.settings import ExplainConfig
from safesteer.attribution.explanation import explain
from safesteer.tokens.selection import select_tokens
from safesteer.report.page_data import page_data
OUT = Path(os.environ["DUMP"])
from dataclasses import replace
CONFIG = replace(CONFIG, batch_size=2)
def test_dump(tiny_llama, tiny_qwen2, direction, few, tmp_path):
    for name, chat in (("llama", tiny_llama), ("qwen", tiny_qwen2)):
        cfg = ExplainConfig(n_prompts=4, n_harmful=3, max_tokens=10, n_sets=3, n_splits=3)
        toks = select_tokens(chat, direction, PROMPTS, CONFIG)
        toks.save(OUT / f"tokens-{name}.json")
        explain(chat, direction, toks, chat, prompts=few, config=cfg).save(OUT / f"a-{name}.json")
        s = explain(chat, direction, toks, prompts=few, answers=answer_rows(4), config=cfg)
        s.save(OUT / f"b-{name}.json")
        run = fill_run(tmp_path / name, toks, s, answer_rows(4))
        (OUT / f"page-{name}.json").write_text(json.dumps(page_data(run), indent=1))
