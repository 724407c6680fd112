"""Tests of `embeddings.measuring`."""
