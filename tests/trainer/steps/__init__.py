"""Tests of what steps are made of."""
