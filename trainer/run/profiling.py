"""Profiles a few steps: `--profile STEP:COUNT` writes a trace that Chrome and Perfetto open.

Stages have names: TorchRec's pipeline marks its own (`## forward ##`, `## start_sparse_data_dist ##`, ...), and what is
ours is marked with `stage`, which costs a few microseconds where nobody looks.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from trainer.run.writing import written

logger = logging.getLogger(__name__)

stage = torch.profiler.record_function
"""Names what happens in its context."""


class StepProfile:
    """Records the steps of a window, and nothing before or after it."""

    def __init__(self, window: tuple[int, int], folder: Path, *, rank: int, step: int) -> None:
        """`step` steps have been taken; the trace of each rank goes to a file of its own in `folder`."""
        self._first, self._count = window
        self._file = folder / f"steps-{self._first}-to-{self._first + self._count - 1}-rank-{rank}.json"
        self._step = step
        self._recording: Any = None
        if step >= self._first:
            logger.warning("--profile %d:%d: step %d is done already; nothing is recorded", *window, step)
        self._begin_if_due()

    def stepped(self) -> None:
        """Another step has been launched."""
        self._step += 1
        if self._recording is not None and self._step == self._first + self._count - 1:
            self._write()
        self._begin_if_due()

    def close(self) -> None:
        """Write what has been recorded where the run ends within the window, and say so where it ends before it."""
        if self._recording is not None:
            self._write()
        elif self._step < self._first - 1:
            logger.warning("--profile: the run ended at step %d, before step %d", self._step, self._first)

    def _begin_if_due(self) -> None:
        if self._step != self._first - 1:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            # Earlier steps may still compute, and do not belong in the trace.
            torch.cuda.synchronize()
        self._recording = torch.profiler.profile(activities=activities)
        self._recording.start()

    def _write(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._recording.stop()
        with written(self._file):
            self._file.parent.mkdir(exist_ok=True)
            self._recording.export_chrome_trace(str(self._file))
        self._recording = None
        logger.info(
            "profile of steps %d to %d: %s (open it at https://ui.perfetto.dev)", self._first, self._step, self._file
        )
