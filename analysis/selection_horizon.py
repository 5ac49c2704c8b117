"""The horizon H over which positions vote: 1, 3, 5, 7.

The paper finds that short horizons select words that open a refusal, longer ones words that explain it.
The column `tokens` shows the first of S; refuted if they are the same kinds of words at every H.
Refusals and drift of the home-made model's rows are after five steps, not at equal refusals.
"""

from ablation import read_command_line, run

ARMS = {f"H = {h}": {"tokens.horizon": h} for h in (1, 3, 5, 7)}

if __name__ == "__main__":
    print(run(read_command_line("selection_horizon", __doc__), ARMS).to_string())
