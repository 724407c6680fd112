"""Batches of one rank: plans the global stream, reads the units it needs, and assembles ahead of the consumer.

    GlobalBatches (one planning thread) -> units read once, kept while near -> collate (reader threads) -> in order

Threads suffice: decoding Parquet and copying arrays release the interpreter lock.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from pipelines.balance import Cost, default_cost
from pipelines.batch import Batch
from pipelines.collate import collate
from pipelines.columns import Samples
from pipelines.config import SYNTHETIC_PATH, DataConfig
from pipelines.global_batches import BatchPlan, GlobalBatches
from pipelines.order import SampleOrder
from pipelines.position import DataPosition
from pipelines.schema import DatasetInfo, read_dataset_info
from pipelines.source import ParquetSource, Source, Split
from pipelines.synthetic import SyntheticSource, synthetic_info


def dataset_info(config: DataConfig) -> DatasetInfo:
    """The description of the data that `config` reads."""
    if config.path == SYNTHETIC_PATH:
        return synthetic_info(config.synthetic)
    return read_dataset_info(config.path)


def build_loader(
    config: DataConfig,
    *,
    split: Split,
    rank: int,
    world_size: int,
    position: DataPosition | None = None,
    cost: Cost | None = None,
    pin_memory: bool = False,
) -> "Loader":
    """The loader of one rank.

    Training goes from `position` (the start if None) to the end of the stream; evaluation makes one pass in stored
    order with full histories.  Every rank gets the same number of batches.  `cost` models a sample's work.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
    paths = (config.path, *config.mix_paths) if split == "train" else (config.path,)
    sources = [open_source(path, config, split) for path in paths]
    for path, source in zip(paths, sources, strict=True):
        _check_same_features(sources[0].info, source.info, path)
    shuffled = split == "train" and config.order == "shuffled"
    orders = [
        SampleOrder(
            source,
            (config.seed, number),
            shuffled=shuffled,
            window_samples=config.window_samples,
            run=config.shuffle_run,
        )
        for number, source in enumerate(sources)
    ]
    batches = GlobalBatches(
        config, orders, split=split, rank=rank, world_size=world_size, cost=cost if cost is not None else default_cost
    )
    # A batch may reach into the next window, and reading ahead does.
    kept = 2 * sum(order.units_in_window() for order in orders) + 1
    return Loader(config, batches, _Units(sources, kept), position, world_size, pin_memory)


class Loader:
    """Iterates over batches; each iteration starts anew from the position that the loader was built with."""

    def __init__(
        self,
        config: DataConfig,
        batches: GlobalBatches,
        units: "_Units",
        position: DataPosition | None,
        world_size: int,
        pin_memory: bool,
    ) -> None:
        self._config = config
        self._batches = batches
        self._units = units
        self._position = position
        self._world_size = world_size
        self._pin_memory = pin_memory
        self.info = units.sources[0].info
        self.total_samples = batches.total_samples

    @property
    def start(self) -> DataPosition:
        """The position before the first sample."""
        return self._batches.start

    def __iter__(self) -> Iterator[Batch]:
        plans = self._batches.plans(self._position)
        if not self._config.reader_threads:
            for plan in plans:
                yield self._assemble(plan)
            return
        threads = self._config.reader_threads
        with (
            ThreadPoolExecutor(1, thread_name_prefix="plan") as planner,
            ThreadPoolExecutor(threads, thread_name_prefix="read") as readers,
        ):
            waiting: deque[Future[Future[Batch] | None]] = deque()

            def begin() -> "Future[Batch] | None":
                plan = next(plans, None)
                return None if plan is None else readers.submit(self._assemble, plan)

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

    def _assemble(self, plan: BatchPlan) -> Batch:
        """Read what a plan needs and put it together."""
        keys = dict.fromkeys(zip(plan.samples.source.tolist(), plan.samples.unit.tolist(), strict=True))
        units = {key: self._units.read(key) for key in keys}
        batch = collate(plan, units, self._config, self.info, self._world_size)
        return batch.pin_memory() if self._pin_memory else batch


class _Units:
    """Reads each unit once and keeps the ones used last; safe to call from several threads."""

    def __init__(self, sources: list[Source], kept: int) -> None:
        self.sources = sources
        self._kept = kept
        self._lock = Lock()
        self._units: OrderedDict[tuple[int, int], Future[Samples]] = OrderedDict()

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
                future.set_result(self.sources[key[0]].read(key[1]))
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()


def open_source(path: str, config: DataConfig, split: Split) -> Source:
    """One split of one of the data sets that `config` names."""
    if path == SYNTHETIC_PATH:
        if config.history_features:
            raise ValueError(f"data.history_features={config.history_features}: synthetic data has none")
        return SyntheticSource(config.synthetic, split)
    return ParquetSource(path, read_dataset_info(path), split, config.history_features)


def _check_same_features(first: DatasetInfo, other: DatasetInfo, path: str) -> None:
    """Sources of a mix share tables and tasks."""
    for name in ("num_items", "context_features", "actions"):
        if getattr(first, name) != getattr(other, name):
            raise ValueError(
                f"data.mix_paths: {name} of {path} is {getattr(other, name)}, but data.path has {getattr(first, name)}"
            )
