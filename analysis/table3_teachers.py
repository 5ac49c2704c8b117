"""Table 3: a steered teacher against a teacher with a refusing system prompt.

The paper finds that the steered teacher aligns better: a prompt changes what is read at every position,
steering what is written. Refuted if the system-prompt student refuses as many harmful prompts with no
more harmless refusals.

The paper's table most likely scores the teachers, so they stand here too, without training; then their
students. The paper's prompt arm selects S by the prompt teacher, as the third student does; the second has
the S of the steered one. (`analysis/results/table3_teachers.csv`, of an earlier model, has neither the
teachers nor the third student, and its teacher had another prompt, which declines everything.)
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from ablation import as_it_is, read_command_line, run
from comparison import under_system

import safesteer as ss

ARMS = {
    "steered teacher": {},
    "system-prompt teacher": {"distill.teacher": "prompt"},
    "system-prompt teacher, S by it": {"distill.teacher": "prompt", "tokens.teacher": "prompt"},
}


@contextmanager
def steered(base: ss.ChatModel, direction: ss.Direction) -> Iterator[ss.ChatModel]:
    teacher = replace(base)  # another value around the same weights: drift is from the base as it is
    with ss.steer(teacher, direction):
        yield teacher


def prompted(base: ss.ChatModel, direction: ss.Direction) -> AbstractContextManager[ss.ChatModel]:
    return nullcontext(under_system(base, ss.DistillConfig().system))


UNTRAINED = {
    "base": as_it_is,
    "steered teacher, untrained": steered,
    "system-prompt teacher, untrained": prompted,
}

if __name__ == "__main__":
    print(run(read_command_line("table3_teachers", __doc__), ARMS, untrained=UNTRAINED).to_string())
