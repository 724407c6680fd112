"""Launchers of the Triton kernels: grids, tiles, scratch.  Validates nothing (see `interface.py`)."""

from torch import Tensor

from attention_kernels.mask import SemiLocalMask


def forward(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None,
    scale: float,
    max_len: int,
) -> Tensor:
    """Attention output [T, H, V] in v's dtype."""
    raise NotImplementedError("the Triton forward is being written")


def backward(
    dout_THV: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    mask: SemiLocalMask,
    *,
    num_targets: Tensor | None,
    scale: float,
    max_len: int,
    deterministic: bool,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of q, k and v into `out`."""
    raise NotImplementedError("the Triton backward is being written")
