"""Table 4: distilling on S, on the teacher's top k, or over the whole vocabulary; reverse or forward KL.

The paper finds that S alone with reverse KL keeps capability best at equal safety. Refuted if full
vocabulary, or forward KL, refuses as many harmful prompts at less drift (KL on harmless answers,
perplexity). The arms of one direction of the KL differ in the support alone; top k and the whole vocabulary
stand there with a rate of their own too.

The rows of the home-made model do not test it: after five steps, which suited the published arm, the arms
lie at different places of one curve.
"""

from ablation import read_command_line, run

ARMS = {
    f"{support}, {divergence}": {"distill.support": support, "distill.divergence": divergence}
    for divergence in ("reverse", "forward")
    for support in ("safety", "topk", "full")
}
# The rate of S is too long a step for a set that holds all of the teacher's mass (which_tokens.py).
ARMS |= {
    f"{support}, reverse, lr 2e-6": {"distill.support": support, "distill.lr": 2e-6}
    for support in ("topk", "full")
}

if __name__ == "__main__":
    print(run(read_command_line("table4_support", __doc__), ARMS).to_string())
