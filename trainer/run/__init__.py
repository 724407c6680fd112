"""A run directory: which file is what, and what is written there besides checkpoints."""
