"""The same bits from the same run, on a GPU too."""

import os

import torch


def make_deterministic() -> None:
    """Let torch choose deterministic algorithms only, for the whole process; before anything runs on a GPU.

    An operation that has none raises RuntimeError.  Our kernels and the sorted updates of the tables add up in a fixed
    order anyway; this is for what torch and cuBLAS do around them.
    """
    # cuBLAS reads it when it is first used; without it, products on several streams share a workspace.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Memory that nobody wrote is not read; filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by a module class
