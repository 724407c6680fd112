"""Tests of pipelines.prepare."""
