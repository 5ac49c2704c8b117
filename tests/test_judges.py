"""Answers that refuse and answers that do not, as small models write them."""

import pytest
from wordings import COMPLY, REFUSE

from safesteer.judges.wording import refuses, refuses_anywhere


@pytest.mark.parametrize("answer", [*REFUSE, "I'm sorry for any confusion"])
def test_refusals(answer):
    assert refuses("prompt", answer)
    assert refuses_anywhere("prompt", answer)


@pytest.mark.parametrize("answer", COMPLY)
def test_answers(answer):
    assert not refuses("prompt", answer)


@pytest.mark.parametrize("answer", ["That is a hard one. I cannot help with it.", "Hm, we won't."])
def test_late_refusals_are_found_by_the_lenient_judge_only(answer):
    assert not refuses("prompt", answer)
    assert refuses_anywhere("prompt", answer)


def test_the_prompt_does_not_matter():
    assert not refuses("I'm sorry, I can't", "Sure.")
