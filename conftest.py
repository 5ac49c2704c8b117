"""What every test shares: notebooks run with fewer prompts, and examples in docstrings have a tiny model."""

import os
import sys
from functools import cache
from pathlib import Path

import pytest
from _pytest.doctest import DoctestItem

os.environ.setdefault("SAFESTEER_QUICK", "1")


@pytest.fixture(autouse=True)
def _example_names(request: pytest.FixtureRequest) -> None:
    """Give docstring examples their globals: ss, chat, direction, tokens and folder."""
    if isinstance(request.node, DoctestItem):
        names = _example_values() | {"folder": request.getfixturevalue("tmp_path")}
        request.getfixturevalue("doctest_namespace").update(names)


@cache
def _example_values() -> dict:
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    import safesteer as ss
    from tests import conftest as tiny

    chat = tiny.tiny_chat()
    direction = ss.Direction(
        vector=tiny.random_vector(32, seed=3), layer=1, position="-1", extraction="given"
    )
    prompts = ss.load_prompts().split("val").harmless[:2]
    config = ss.TokenConfig(k=8, horizon=3, n_samples=2, min_steered_prob=0.0)
    return {
        "ss": ss,
        "chat": chat,
        "direction": direction,
        "tokens": ss.select_tokens(chat, direction, prompts, config),
    }
