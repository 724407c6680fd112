"""Committed results as pictures and tables."""
