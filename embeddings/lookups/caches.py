"""Caches of rows that lie in host memory, between the steps of a pipeline that fills them ahead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from embeddings.tables import Tables, fbgemm_kernels


class Caches:
    """All caches of sharded tables that a pipeline fills ahead."""

    def __init__(self, tables: Tables) -> None:
        self._kernels = [
            kernel
            for collection in tables.collections
            for kernel in fbgemm_kernels(collection)
            if _filled_ahead(kernel)
        ]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Look up between two steps, without a backward pass, and leave what was filled for coming batches as it is.

        A lookup takes the places in the cache that were prefetched first, for whatever batch; and the places that it
        fills where none were prefetched are locked until its backward pass, which an evaluation does not have.
        """
        held = []
        for kernel in self._kernels:
            self._wait(kernel, first=False)
            locks = kernel.lxu_cache_locking_counter
            held.append((kernel.timesteps_prefetched, kernel.lxu_cache_locations_list, locks.clone()))
            kernel.timesteps_prefetched, kernel.lxu_cache_locations_list = [], []
        try:
            yield
        finally:
            for kernel, (steps, places, locks) in zip(self._kernels, held, strict=True):
                kernel.timesteps_prefetched, kernel.lxu_cache_locations_list = steps, places
                kernel.lxu_cache_locking_counter.copy_(locks)
                self._wait(kernel, first=True)

    @staticmethod
    def _wait(kernel: Any, *, first: bool) -> None:
        """Let this stream wait for prefetches that were asked for, or coming ones (`first`) wait for this stream."""
        ahead: Any = kernel.prefetch_stream
        if ahead is not None:
            here = torch.cuda.current_stream()
            waits, other = (ahead, here) if first else (here, ahead)
            waits.wait_stream(other)


def _filled_ahead(kernel: Any) -> bool:
    return bool(kernel.prefetch_pipeline and kernel.lxu_cache_weights.numel())
