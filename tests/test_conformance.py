"""A part of `make conformance`: every function on families that differ in what they are likely to break."""

import pytest
from conformance.checks import CHECKS
from conformance.results import measure

RIGHT = (
    "llama, tied head",
    "llama, padded head",
    "llama, bfloat16",
    "mistral, window of 8",
    "gemma 3, window of 8",
    "gemma 2, soft caps",
    "cohere, logit scale",
    "granite, scales",
    "gpt2",
    "opt",
    "falcon",
    "mpt",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "gemma4_text",
    "lfm2",
    "mamba",
    "falcon h1, head multiplier",
    "gemma3 (multimodal)",
)
# What these cannot do, they refuse in a sentence.
REFUSE = {
    "beam": {"ablate", "scores", "bridge"},
    "hy_v4": {
        "extraction",
        "add",
        "clamp",
        "gate",
        "ablate",
        "scores",
        "selection",
        "loss",
        "step",
        "bridge",
    },
}


@pytest.mark.parametrize("name", [*RIGHT, *REFUSE])
def test_every_function_is_right_or_says_why_not(name):
    result = measure(name)
    assert not result.not_built
    outcomes = {outcome.check: outcome for outcome in result.outcomes}
    assert outcomes.keys() == CHECKS.keys()
    assert {c: o.reason for c, o in outcomes.items() if o.is_wrong} == {}
    assert {c for c, o in outcomes.items() if o.outcome == "refused"} == REFUSE.get(name, set())
