"""The live lens: base, steered base and student answer a prompt side by side, token by token."""
