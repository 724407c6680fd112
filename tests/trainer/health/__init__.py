"""Tests of trainer.health."""
