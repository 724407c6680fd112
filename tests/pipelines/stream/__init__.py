"""Tests of pipelines.stream."""
