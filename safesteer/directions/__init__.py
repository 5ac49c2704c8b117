"""TODO directions."""
