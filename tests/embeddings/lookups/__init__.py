"""Tests of `embeddings.lookups`."""
