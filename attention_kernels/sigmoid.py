"""The sigmoid in Triton kernels, by one special-function instruction where 16-bit values are computed with.

Gluon kernels for Hopper GPUs, which take such values alone, call that instruction themselves (`hopper/groups.py`).
"""

import triton
import triton.language as tl
from torch import Tensor

from attention_kernels.launcher import INTERPRETED


def approximate(x: Tensor) -> bool:
    """Whether kernels on tensors like `x` take the hardware's tanh (about 11 bits): 16-bit values on a GPU."""
    return x.element_size() == 2 and not INTERPRETED


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    """1 / (1 + exp(-x)) = 1/2 + tanh(x / 2) / 2."""
    if APPROXIMATE:
        return 0.5 + 0.5 * _tanh(0.5 * x)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def twice_sigmoid(half, APPROXIMATE: tl.constexpr):
    """2 sigmoid(2 h) = 1 + tanh(h): SiLU of a score 2 h is h times this."""
    if APPROXIMATE:
        return _tanh(half) + 1.0
    return 2.0 / (1.0 + tl.exp(-2.0 * half))
