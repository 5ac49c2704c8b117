"""How many harmful prompts are needed: 10, 25, 50, 100.

The paper finds 100 enough and fewer already useful. Refuted if 100 are no better than 10 (then fewer
would do), or if the curve has not flattened by 100. Steps and answers per step stay the same.

The rows of the home-made model are void: five steps of 4 prompts use 20 distinct prompts at most. More
steps are needed.
"""

from ablation import N_HARMFUL, read_command_line, run

ARMS = {f"{n} prompts": {N_HARMFUL: n} for n in (10, 25, 50, 100)}

if __name__ == "__main__":
    print(run(read_command_line("harmful_samples", __doc__), ARMS).to_string())
