"""Tests of what models are trained for."""
