"""Attention kernels in Triton for any GPU and for the interpreter: they define what is computed."""
