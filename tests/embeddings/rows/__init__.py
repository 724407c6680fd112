"""Tests of `embeddings.rows`."""
