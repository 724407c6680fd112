"""Logs of which the truth is known."""
