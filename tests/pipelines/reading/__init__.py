"""Tests of pipelines.reading."""
