"""Puts the parts together: recipes, models, parallelism, the training loop, checkpoints and evaluation."""
