"""Ranking tokens by votes of positions, or by their mean lift.

The paper votes: a mean is ruled by few positions with an extreme ratio of two tiny probabilities. Refuted
if S by the mean trains as well.

The rows of the home-made model are void: 62 tokens pass the minimum probability and each position votes
for 200, so every token gets every vote and both arms have one S. Fewer votes are needed (`tokens.k_vote`).
"""

from ablation import read_command_line, run

ARMS = {"vote": {"tokens.method": "vote"}, "mean": {"tokens.method": "mean"}}

if __name__ == "__main__":
    print(run(read_command_line("selection_method", __doc__), ARMS).to_string())
