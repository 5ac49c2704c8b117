"""Where S is selected: on the steered teacher's samples, or on the base's.

The paper finds that samples of the base break the selection on a shallowly aligned model, because its
answers never reach the states where refusing tokens are lifted. Refuted if S from the base's samples
trains as well. The home-made model's rows compare after five steps, not at equal refusals.
"""

from ablation import read_command_line, run

ARMS = {
    "teacher's samples": {"tokens.rollouts": "teacher"},
    "base's samples": {"tokens.rollouts": "base"},
}

if __name__ == "__main__":
    print(run(read_command_line("selection_rollouts", __doc__), ARMS).to_string())
