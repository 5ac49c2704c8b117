"""Step 2, see the tokens: which output tokens does steering lift?

Answers are sampled from the steered teacher and read with and without steering (`sampling`); the tokens
that positions vote for become the safety tokens S (`selection`), a value that prints, renders and saves
(`token_set`). Why each was selected is the subpackage `attribution`.

Read `selection` first: its `select_tokens` is the whole step.
"""
