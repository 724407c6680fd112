"""Reads and assembles the batches of one rank, ahead of their use.  What runs in a reader process; no TorchRec.

    GlobalBatches (one planning thread) -> units read once, kept while near -> collate (reader threads) -> in order

Threads suffice here: decoding Parquet and copying arrays release the interpreter lock, and what does not release it
holds up nobody but the other threads of this process.
"""

import multiprocessing
import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, Thread

from torch.utils.data import IterableDataset

from pipelines.batches.collate import collate
from pipelines.batches.packed import Packed, share
from pipelines.config import DataConfig
from pipelines.selection import Selection
from pipelines.storage.columns import Samples, Values
from pipelines.storage.source import Source
from pipelines.stream.global_batches import BatchPlan, GlobalBatches
from pipelines.stream.position import DataPosition

GROUP = 4
"""Batches that a reader process hands over together."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands in the stream for what could not be read, so that the error arrives as it was raised."""

    error: Exception
    """What the caller shall raise."""


class Reader(IterableDataset[Packed | Failure]):
    """Iterates over one rank's batches; each iteration starts anew from `position`.  Can be sent to a process.

    With `reader_threads` it belongs in a process of its own, and hands batches over in shared memory.
    """

    def __init__(
        self,
        config: DataConfig,
        batches: GlobalBatches,
        sources: list[Source],
        *,
        position: DataPosition | None,
        world_size: int,
        kept_units: int,
        selection: Selection,
    ) -> None:
        self._config = config
        self._batches = batches
        self._sources = sources
        self._position = position
        self._world_size = world_size
        self._kept_units = kept_units
        self._selection = selection

    def __iter__(self) -> Iterator[Packed | Failure]:
        if not self._config.reader_threads:
            yield from self._plainly()
            return
        try:
            yield from self._groups()
        except (ValueError, OSError) as error:
            yield Failure(error)

    def _groups(self) -> Iterator[Packed]:
        """Several batches at a time: handing over costs the trainer's process the same for many as for one."""
        group: list[Packed] = []
        for batch in self._threaded():
            group.append(batch)
            if len(group) == GROUP:
                yield share(group)
                group = []
        if group:
            yield share(group)

    def _plainly(self) -> Iterator[Packed]:
        """All work in the caller's thread, when it asks for it."""
        units = _Units(self._sources, self._kept_units)
        for plan in self._batches.plans(self._position):
            yield self._assemble(plan, units)

    def _threaded(self) -> Iterator[Packed]:
        """Planned in one thread, read and assembled in others, ahead of the caller."""
        units, plans = _Units(self._sources, self._kept_units), self._batches.plans(self._position)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="plan") as planner,
            ThreadPoolExecutor(self._config.reader_threads, thread_name_prefix="read") as readers,
        ):
            waiting: deque[Future[Future[Packed] | None]] = deque()

            def begin() -> "Future[Packed] | None":
                plan = next(plans, None)
                return None if plan is None else readers.submit(self._assemble, plan, units)

            try:
                while True:
                    while len(waiting) < self._config.prefetch_batches:
                        waiting.append(planner.submit(begin))
                    batch = waiting.popleft().result()
                    if batch is None:
                        return
                    waiting.append(planner.submit(begin))
                    yield batch.result()
            finally:
                # A consumer that stops early must not wait for batches that nobody will see.
                planner.shutdown(cancel_futures=True)
                readers.shutdown(cancel_futures=True)

    def _assemble(self, plan: BatchPlan, units: "_Units") -> Packed:
        """Read what a plan needs and put it together."""
        keys = dict.fromkeys(zip(plan.samples.source.tolist(), plan.samples.unit.tolist(), strict=True))
        found = {key: units.read(key) for key in keys}
        return collate(plan, found, units.items(), self._selection, self._config, self._world_size)


def end_with_parent(worker: int) -> None:
    """Let this process end when the one that asked for it does, also by SIGKILL.

    DataLoader's own watch sees only the server that forked this process, which in turn waits for this process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, name=f"follow-{worker}", daemon=True).start()


class _Units:
    """Reads each unit once and keeps the ones used last; safe to call from several threads."""

    def __init__(self, sources: list[Source], kept: int) -> None:
        self._sources = sources
        self._kept = kept
        self._lock = Lock()
        self._units: OrderedDict[tuple[int, int], Future[Samples]] = OrderedDict()
        self._items: Mapping[str, Values] | None = None

    def items(self) -> Mapping[str, Values]:
        """The columns of items, which sources of a mix share."""
        with self._lock:
            if self._items is None:
                self._items = self._sources[0].items()
            return self._items

    def read(self, key: tuple[int, int]) -> Samples:
        """A unit of a source, waiting for another thread's reading of it if there is one."""
        with self._lock:
            future = self._units.get(key)
            ours = future is None
            if future is None:
                future = Future()
                self._units[key] = future
            self._units.move_to_end(key)
            while len(self._units) > self._kept:
                self._units.popitem(last=False)
        if ours:
            try:
                future.set_result(self._sources[key[0]].read(key[1]))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()
