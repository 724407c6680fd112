"""Tests of pipelines.batches."""
