"""TODO tokens."""
