"""Prompts: matched pairs in splits, benchmarks by name, and the data that ships with the package."""
