"""Attention kernels for Hopper GPUs, warp-specialised in Gluon."""
