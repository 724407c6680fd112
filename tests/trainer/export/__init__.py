"""Tests of trainer.export."""
