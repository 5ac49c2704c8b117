"""TODO steering."""
