"""Table 5: probabilities on S as they are, against renormalised on S; and forms that are divergences.

The paper finds that not renormalising is better: renormalised, the loss cannot move mass onto S. Its own
form ("partial", Eq. 6) has no minimum at the teacher; "generalized" and "tail" have. Refuted if
"renormalized" refuses as many harmful prompts; ours is refuted if "partial" does as well as "generalized".

The rows of the home-made model do not test it: the paper's claim is about capability (-4.76 and -3.04
points), they have refusals and drift after five steps. Their drift goes the paper's way.
"""

from ablation import read_command_line, run

ARMS = {name: {"distill.normalizer": name} for name in ("partial", "renormalized", "generalized", "tail")}

if __name__ == "__main__":
    print(run(read_command_line("table5_normalizers", __doc__), ARMS).to_string())
