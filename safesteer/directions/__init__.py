"""Step 1: see the direction that makes a model refuse.

In the order in which one reads it:

    refusal_tokens  which first tokens start a refusal in this model, and the refusal score of a prompt
    activations     residual streams of prompts, batch by batch
    candidates      one vector per position and layer, as a value
    extraction      candidates as contrasts of texts: the paper's difference of means and four others
    scoring         the three scores of many candidates at once
    halving         all candidates on few prompts, the best on more
    sweeping        the table of scores, with intervals and controls: which candidates pass, and why
    calibration     how strongly to steer
    finding         all of it in one call: `find_direction`
    inspection      what a direction says, where it lives, which components write it
    shifts          where teacher and student have moved, layer by layer
    reader_fitting  a reader of harmfulness, which says whom to steer: `fit_reader`
    formats         directions in the files of other tools
"""
