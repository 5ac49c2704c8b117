"""Table 3: a steered teacher against a teacher with a refusing system prompt.

The paper finds that the steered teacher aligns better: a prompt changes what is read at every position,
steering what is written. Refuted if the system-prompt student refuses as many harmful prompts with no
more harmless refusals.

Not the paper's table: that one most likely scores the teachers. Here students are trained. The paper's prompt
arm selects S by the prompt teacher, as the third arm does; the second has the S of the steered teacher. (The
committed rows lack the third, and their teacher had another prompt: ours, which declines everything.)
"""

from ablation import read_command_line, run

ARMS = {
    "steered teacher": {},
    "system-prompt teacher": {"distill.teacher": "prompt"},
    "system-prompt teacher, S by it": {"distill.teacher": "prompt", "tokens.teacher": "prompt"},
}

if __name__ == "__main__":
    print(run(read_command_line("table3_teachers", __doc__), ARMS).to_string())
