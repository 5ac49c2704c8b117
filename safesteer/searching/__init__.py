"""Search the settings of a run by Optuna: what is varied, one trial, which trials are the best, the study."""
