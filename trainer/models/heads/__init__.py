"""Heads: from a tower's outputs to scores, one module a head."""
