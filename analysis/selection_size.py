"""The size K of S: 10 to 500 tokens, and the whole vocabulary.

The paper finds about 50 enough: fewer lose safety, more add drift without safety. Refuted if harmful
refusals go on rising past 50, or if 500 drifts no more than 50.

In the home-made model's rows K = 100, 200 and 500 are one arm, as 61 to 64 tokens pass the minimum
probability; and all arms stop after five steps, not at equal refusals.
"""

from ablation import read_command_line, run

ARMS = {f"K = {k}": {"tokens.k": k} for k in (10, 25, 50, 100, 200, 500)}
ARMS |= {"whole vocabulary": {"distill.support": "full"}}

if __name__ == "__main__":
    print(run(read_command_line("selection_size", __doc__), ARMS).to_string())
