"""Tests of attention_kernels."""
