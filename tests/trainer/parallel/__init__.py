"""Tests of trainer.parallel."""
