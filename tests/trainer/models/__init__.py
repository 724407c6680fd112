"""Tests of the HSTU models."""
