"""Batches of one rank, made ahead of their use in a process of their own.

    reader process: Reader -> shared memory -> this process: page-locked copy (own thread) -> Batch

A process, because the trainer launches its steps from Python: threads that read beside it hold the interpreter lock
when it wants it.  Batches are handed over by torch's DataLoader, one piece of memory each.
"""

import multiprocessing
import weakref
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pipelines.batches.batch import Batch
from pipelines.batches.packed import Packed
from pipelines.config import SYNTHETIC_PATH, DataConfig
from pipelines.features import ITEM_ID, DatasetInfo
from pipelines.reading.reader import Failure, Reader, end_with_parent
from pipelines.reading.reader_server import reader_server
from pipelines.selection import Selection, select
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.gathered_source import GatheredSource
from pipelines.storage.gathering import gathering_of
from pipelines.storage.source import ParquetSource, Source, Split, check_whole, newest_part
from pipelines.storage.vocabulary import check_same_ids, vocabularies
from pipelines.stream.balance import Cost, default_cost
from pipelines.stream.global_batches import GlobalBatches
from pipelines.stream.order import SampleOrder
from pipelines.stream.position import DataPosition
from pipelines.synthetic import SyntheticSource, synthetic_info

GROUPS_AHEAD = 2
"""Groups of finished batches that wait outside the reader process, in shared and in page-locked memory."""
LOOK_S = 1.0
"""Seconds between two looks whether the reader process lives, while a batch is waited for."""


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
    selection: Selection | None = None,
    cost: Cost | None = None,
    pin_memory: bool = False,
    unseen: int | None = None,
    info: DatasetInfo | None = None,
) -> "Loader":
    """The loader of one rank; `selection` None reads the item ids alone.

    `info` describes the data as a run knows it, which may have been extended since; None reads the description.

    Training goes from `position` (the start if None) to the end of the stream; evaluation makes one pass in stored
    order with full histories.  Every rank gets the same number of batches.  `cost` models a sample's work.  `unseen`
    evaluates the training samples of that part of the data, which a model has not been trained on yet.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size={world_size}), got {rank}")
    info = info or dataset_info(config)
    selection = selection or select(info, event=(ITEM_ID,), candidate=(ITEM_ID,), context=())
    sources = _open_sources(config, info, split, selection, unseen)
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
    if position is not None:
        position = batches.resumed(position)
    units = [order.units_in_window() for order in orders]
    # A batch may reach into the next window, and reading ahead does.
    kept = 2 * (sum(units) if config.mix_paths else max(units)) + 1
    if split == "eval":
        config = replace(config, unknown_share=0.0)
    reader = Reader(
        config, batches, sources, position=position, world_size=world_size, kept_units=kept, selection=selection
    )
    contents = " ".join(source.contents for source in sources)
    return Loader(
        reader, batches, info, contents, position, in_process=config.reader_threads == 0, pin_memory=pin_memory
    )


def _open_sources(
    config: DataConfig, info: DatasetInfo, split: Split, selection: Selection, unseen: int | None
) -> list[Source]:
    """What a stream is made of: parts in their order, the sources of a mix, or the one part that is evaluated."""
    if unseen is not None:
        return [open_source(config, info, "train", selection, info.parts[unseen])]
    if split == "eval":
        return [open_source(config, info, "eval", selection)]
    if not config.mix_paths:
        sources = [open_source(config, info, "train", selection, part) for part in info.parts]
        stored = [source for source in sources if isinstance(source, ParquetSource | GatheredSource)]
        if len(stored) > 1:
            check_whole(f"train of {config.path}", info.splits.get("train"), stored)
        return sources
    sources = []
    for path in (config.path, *config.mix_paths):
        other = read_dataset_info(path)
        if gathering_of(other) is not None:
            raise ValueError(
                f"data.mix_paths: the histories of {path} are gathered; a mix takes samples with their own"
            )
        if len(other.parts) > 1:
            raise ValueError(f"data.mix_paths: {path} has {len(other.parts)} parts; a mix takes data sets of one part")
        _check_same_features(info, other, path)
        sources.append(ParquetSource(path, other, "train", selection, other.parts[0]))
    return list(sources)


class Loader:
    """Iterates over batches; each iteration starts anew from the position that the loader was built with.

    An iterator that is not read to its end should be closed: `contextlib.closing(iter(loader))`.
    """

    def __init__(
        self,
        reader: Reader,
        batches: GlobalBatches,
        info: DatasetInfo,
        contents: str,
        position: DataPosition | None,
        *,
        in_process: bool,
        pin_memory: bool,
    ) -> None:
        self._reader = reader
        self._in_process = in_process
        self._pin_memory = pin_memory
        self.info = info
        self.contents = contents
        """Digests of what is read (`Source.contents`)."""
        self._batches = batches
        self.start = batches.start
        """The position before the first sample."""
        begin = batches.start if position is None else position
        self.total_samples = begin.samples + sum(batches.left(begin))
        """Samples of the whole stream, including those before the loader's position."""
        self.steps_left = batches.steps_left(begin)
        """Batches of this stream, where their size is given in samples."""

    def part_of(self, position: DataPosition) -> int:
        """The part of the data that training goes on with after `position`; the number of parts at the end."""
        return self._batches.part_of(self._batches.resumed(position))

    def __iter__(self) -> Generator[Batch]:
        """Starts the reader process at once: it works while the caller prepares other things."""
        before = set(multiprocessing.active_children())
        handed_over = iter(
            DataLoader(
                self._reader,
                batch_size=None,
                num_workers=0 if self._in_process else 1,
                prefetch_factor=None if self._in_process else GROUPS_AHEAD,
                multiprocessing_context=None if self._in_process else reader_server(),
                worker_init_fn=end_with_parent,
                pin_memory=self._pin_memory,
                # Its own, because starting draws a number, which must not change the trainer's.
                generator=torch.Generator(),
            )
        )
        if not self._in_process:
            # DataLoader itself looks every 5 s.  By a weak reference, for a cycle would keep its processes alive.
            look = partial(_MultiProcessingDataLoaderIter._try_get_data, weakref.proxy(handed_over), LOOK_S)
            vars(handed_over)["_try_get_data"] = look
        return _batches(handed_over, [child for child in multiprocessing.active_children() if child not in before])


def _batches(handed_over: Iterator[Packed | Failure], processes: list[BaseProcess]) -> Generator[Batch]:
    """What the reader hands over, its failure raised; ends the reader process when closed."""

    def kill() -> None:
        for process in processes:
            process.kill()

    # Where nobody closed the iterator, Python would wait at its exit for a process that no longer listens.  A finalizer
    # of multiprocessing, for the processes that it started run nothing of atexit.
    at_exit = Finalize(None, kill, exitpriority=0)
    try:
        while (item := _next(handed_over, processes)) is not None:
            if isinstance(item, Failure):
                raise item.error
            for memory, contents in item.split():
                yield Batch(contents, memory)
    finally:
        # The last reference: DataLoader ends its processes when it is collected.
        del handed_over
        at_exit.cancel()


def _next(handed_over: Iterator[Packed | Failure], processes: list[BaseProcess]) -> Packed | Failure | None:
    """What comes next, None at the end.  Raises ChildProcessError if the reader process is gone."""
    try:
        return next(handed_over, None)
    except (OSError, EOFError, RuntimeError) as error:
        for process in processes:
            process.join(timeout=1)
            if process.exitcode:
                raise ChildProcessError(
                    f"the process that reads the data ended unexpectedly with exit code {process.exitcode}, perhaps "
                    "for lack of memory (lower data.window_samples); start the same command again to resume"
                ) from error
        raise


def open_source(
    config: DataConfig, info: DatasetInfo, split: Split, selection: Selection | None = None, part: str | None = None
) -> Source:
    """One part of a split of `config.path`, which `info` describes; `selection` None reads what every data set has.

    `part` None is the first one for training, and for evaluation the newest that has samples for it.
    """
    if config.path == SYNTHETIC_PATH:
        return SyntheticSource(config.synthetic, split)
    if gathering_of(info) is not None:
        return GatheredSource(config.path, info, split, selection or Selection(), part or info.parts[0])
    if part is None:
        part = info.parts[0] if split == "train" else newest_part(config.path, info, split)
    return ParquetSource(config.path, info, split, selection, part)


def _check_same_features(first: DatasetInfo, other: DatasetInfo, path: str) -> None:
    """Sources of a mix share tables, what their ids mean, and tasks."""
    check_same_ids(vocabularies(first), other, data=f"{path} of data.mix_paths", other="data.path")
    for name in ("spaces", "columns", "actions"):
        if getattr(first, name) != getattr(other, name):
            raise ValueError(
                f"data.mix_paths: {name} of {path} is {getattr(other, name)}, but data.path has {getattr(first, name)}"
            )
