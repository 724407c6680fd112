"""The fused kernels around attention in an HSTU layer: norms, products, gates, gathers."""
