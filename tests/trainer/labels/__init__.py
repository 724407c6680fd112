"""Tests of what a ranker predicts of a candidate."""
