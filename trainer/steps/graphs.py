"""Functions over fixed memory, recorded as CUDA graphs and replayed: the host launches each of them as one."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

logger = logging.getLogger(__name__)

_void_graphs: list[Any] = []
"""Graphs whose capture broke off; PyTorch's allocators may go on asking them whose memory is whose."""


class Graphs:
    """What a model's recordings share: a pool of memory, since one runs at a time and what it leaves there is read
    before the next, and whether any of them is replayed.

    Where one cannot be recorded, all are launched from then on: memory that graphs hold may be what was lacking, and
    what a broken capture leaves in PyTorch is not made for graphs that came before it.
    """

    def __init__(self, *, must: bool = True) -> None:
        """`must`: what cannot be recorded is an error."""
        self._must, self._on = must, True
        self._pool: Any = None
        self._recorded: dict[str, Any] = {}

    def replay(self, name: str, function: Callable[[], None]) -> bool:
        """Replay the recording of this name, which is made the first time; False if it has to be launched.

        Raises:
            RuntimeError: it cannot be recorded, and must be.
        """
        if not self._on:
            return False
        if name not in self._recorded:
            try:
                self._recorded[name] = self._record(name, function)
            except RuntimeError as error:
                self._on = False
                self._recorded.clear()
                if self._must:
                    raise
                logger.warning("%s; steps are launched from now on, none is replayed", error)
                return False
        self._recorded[name].replay()
        return True

    def _record(self, name: str, function: Callable[[], None]) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, failure = torch.cuda.CUDAGraph(), None
        before = torch.cuda.current_stream()
        try:
            # Other threads read data and pin memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    function()
                except RuntimeError as error:
                    failure = error
        except RuntimeError as error:
            failure = failure or error
            _leave_capture(graph, self._pool)
        torch.cuda.set_stream(before)
        if failure is not None:
            raise RuntimeError(f"{name} cannot be recorded (recorded=off launches it): {failure}") from failure
        reserved = torch.cuda.memory_reserved() / 2**30
        logger.info("recorded %s; %.2f GiB of the GPU's memory are reserved now", name, reserved)
        return graph


def _leave_capture(graph: Any, pool: Any) -> None:
    """What PyTorch leaves undone where CUDA calls a capture void: memory goes on coming from the graph's pool, and the
    generator of random numbers takes every draw for one of the graph's."""
    _void_graphs.append(graph)
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # The capture had not begun.
        torch._C._cuda_endAllocateToPool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


class Recording:
    """A function of nothing, over fixed memory: launched at its first call, recorded at its second, then replayed."""

    def __init__(
        self, name: str, function: Callable[[], None], graphs: Graphs | None, *, launched: bool = False
    ) -> None:
        """`name` is its own among the recordings of `graphs`; None launches every time.  `launched`: it was before."""
        self._name, self._function, self._graphs = name, function, graphs
        self._launched = launched

    def __call__(self) -> None:
        replayed = self._launched and self._graphs is not None and self._graphs.replay(self._name, self._function)
        self._launched = True
        if not replayed:
            self._function()
