"""Functional sparse attention and fused layer kernels for long user sequences.  Knows tensors and nothing else.

`hstu_attention` is semi-local SiLU attention over packed sequences, `SemiLocalMask` says which keys a query sees.
"""

from attention_kernels.interface import hstu_attention, hstu_attention_backward, hstu_projection_backward
from attention_kernels.mask import SemiLocalMask

__all__ = ["SemiLocalMask", "hstu_attention", "hstu_attention_backward", "hstu_projection_backward"]
