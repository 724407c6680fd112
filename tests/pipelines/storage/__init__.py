"""Tests of pipelines.storage."""
