"""Hands batches to the pipeline in the form that the task's model reads, and remembers what it handed out.

The pipeline pulls batches ahead of the step that trains on them; the record says what each step consumed.
"""

import time
from collections import deque
from collections.abc import Container, Iterator
from contextlib import nullcontext

from torchrec.streamable import Pipelineable

from embeddings.lookups.unbounded import UnboundedTables
from pipelines.batches.batch import Batch
from trainer.health.watchdog import Phase
from trainer.parallel.mesh import Mesh
from trainer.resolve import Resolved
from trainer.run.profiling import stage
from trainer.steps.step_log import Consumed


class Feed:
    """An iterator over prepared batches."""

    def __init__(
        self,
        batches: Iterator[Batch],
        resolved: Resolved,
        mesh: Mesh,
        unbounded: UnboundedTables,
        phase: Phase = nullcontext,
        *,
        step: int = 0,
        left_out: Container[int] = (),
    ) -> None:
        """Keys of `unbounded` tables become rows as batches are pulled; `phase` tells a watchdog what goes on.

        The batches come after `step`, and those of `left_out` steps are not handed out.
        """
        self._batches, self._resolved, self._mesh = batches, resolved, mesh
        self._unbounded = unbounded
        unbounded.forget_flight()
        self._phase = phase
        self._step, self._left_out = step, left_out
        self._in_flight: deque[Consumed] = deque()

    def __iter__(self) -> Iterator[Pipelineable]:
        return self

    def __next__(self) -> Pipelineable:
        batch = self._pull()
        while self._step in self._left_out:
            batch = self._pull()
        ids_host = batch.inputs.ids_host
        for name, rows in self._unbounded.admit(ids_host).items():
            # The batch has not been copied to the device yet.
            ids_host(name).copy_(rows)
        return self._resolved.task.prepare(batch, self._mesh)

    def _pull(self) -> Batch:
        start = time.perf_counter()
        with self._phase("data"), stage("longview: data"):
            batch = next(self._batches)
        self._step += 1
        self._in_flight.append(describe(batch, self._resolved, waited_s=time.perf_counter() - start))
        return batch

    def leaves_out(self, step: int) -> bool:
        """Whether the batch of `step`, the next one, is not handed out: then it is on the record at once.

        Raises:
            StopIteration: there is no further batch.
        """
        if step not in self._left_out:
            return False
        if not self._in_flight:
            self._pull()
        return True

    def done(self) -> Consumed:
        """Take the oldest batch off the record: its step has been taken, or left out."""
        return self._in_flight.popleft()


def describe(batch: Batch, resolved: Resolved, *, waited_s: float = 0.0) -> Consumed:
    """What is noted of a batch: little, for it delays the launch of a step."""
    return Consumed(
        position=batch.position,
        samples=batch.global_samples,
        # Copies: views would keep the whole batch's memory.
        history_lens=batch.inputs.history_lens_host.numpy().copy(),
        num_candidates=batch.inputs.num_candidates_host.numpy().copy(),
        channel_history_lens={
            name: choice.history_lens(batch.inputs).numpy() for name, choice in resolved.selective_channels.items()
        },
        imbalance=batch.imbalance,
        waited_s=waited_s,
    )
