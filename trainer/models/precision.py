"""Which type the dense model computes in: autocast's where it is on, the parameters' own otherwise."""

import torch
from torch import Tensor


def compute_dtype(reference: Tensor) -> torch.dtype:
    """The type of products on `reference`'s device under the autocast in force."""
    kind = reference.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return reference.dtype
