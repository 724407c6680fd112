"""Tests of attention_kernels.layer."""
