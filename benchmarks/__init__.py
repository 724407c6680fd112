"""Measurements: one module a question; results/ holds the figures with the hardware they were measured on."""
