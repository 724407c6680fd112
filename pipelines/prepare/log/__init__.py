"""Logs of anybody: what their columns mean, how each value is read, and which id a key has."""
