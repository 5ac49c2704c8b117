"""The same seed on one and on two threads: the same history, up to rounding."""

from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from conftest import copy_of, random_vector
from safesteer.directions.candidates import Candidates
from safesteer.directions.extraction import mean_difference
from safesteer.distillation.loop import training_steps
from safesteer.distillation.rollouts import Teacher
from safesteer.distillation.state import prepare_student
from safesteer.settings import DistillConfig, TokenConfig
from safesteer.steering.direction import Direction
from safesteer.tokens.selection import select_tokens
from safesteer.tokens.token_set import TokenSet

# Sums are split otherwise between threads: 1e-6 of a number here, and AdamW divides small gradients by
# themselves. What is counted (tokens, votes) must be equal.
TOLERANCE = 1e-3


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stages(chat, few, n_threads: int) -> tuple[Candidates, TokenSet, list[dict]]:
    torch.set_num_threads(n_threads)
    candidates = mean_difference(chat, few)
    vector = random_vector(chat.d_model)
    direction = candidates.direction(chat, candidates.positions[0], chat.n_layers // 2)
    direction = Direction(vector=20 * vector / vector.norm(), **direction.metadata)
    config = TokenConfig(k=20, k_vote=200, n_samples=2, horizon=3, min_steered_prob=1e-4, batch_size=2)
    tokens = select_tokens(chat, direction, few.harmless, config)
    training = DistillConfig(n_steps=2, harmful_per_step=2, harmless_per_step=2, max_new_tokens=4)
    state = prepare_student(copy_of(chat), direction, training)
    steps = training_steps(state, Teacher(chat, direction, tokens), few)
    return candidates, tokens, [asdict(step) for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_llama", "smollm2"])
def test_one_thread_and_two_agree(name, few, threads, request):
    chat = request.getfixturevalue(name)
    (one, tokens, history), (two, same_tokens, other) = (stages(chat, few, n) for n in (1, 2))
    worst = (one.vectors - two.vectors).abs().max() / one.vectors.abs().max()
    assert float(worst) < 1e-5
    assert set(tokens.ids.tolist()) == set(same_tokens.ids.tolist())
    assert {t.id: t.votes for t in tokens.tokens} == {t.id: t.votes for t in same_tokens.tokens}
    assert history[0]["grad_norm"] > 0
    for a, b in zip(history, other, strict=True):
        assert a["n_tokens"] == b["n_tokens"]
        for key in ("loss", "grad_norm", "mass_on_s_student", "mass_on_s_teacher", "kl_off_s"):
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE), key
