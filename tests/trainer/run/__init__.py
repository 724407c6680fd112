"""Tests of trainer.run."""
