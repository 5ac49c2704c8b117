"""Why these tokens: votes, kinds of words, stories, token views, coverage and stability of S."""
