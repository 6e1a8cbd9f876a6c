"""Hostile checkpoints, kept: one function each, whose docstring says what it tries. See README.md."""
