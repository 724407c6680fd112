"""Functional sparse attention and fused layer kernels for long user sequences.  Knows tensors and nothing else.

`hstu_attention` is semi-local SiLU attention over packed sequences, `SemiLocalMask` says which keys a query sees.
Layers that write their own backward make one `AttentionPlan` for all that share sequences and mask.
"""

from attention_kernels.attention.interface import (
    attention_backward,
    attention_forward,
    hstu_attention,
    projection_backward,
)
from attention_kernels.attention.plan import AttentionPlan, make_plan, plan_of_newest, plan_of_targets
from attention_kernels.mask import SemiLocalMask

__all__ = [
    "AttentionPlan",
    "SemiLocalMask",
    "attention_backward",
    "attention_forward",
    "hstu_attention",
    "make_plan",
    "plan_of_newest",
    "plan_of_targets",
    "projection_backward",
]
