"""Tests of attention_kernels.attention."""
