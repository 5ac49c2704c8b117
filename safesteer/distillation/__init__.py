"""TODO distillation."""
