"""Samples as one batch of a rank: inputs, labels, bookkeeping."""
