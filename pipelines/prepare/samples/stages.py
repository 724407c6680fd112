"""From the tables `events` and `users` to a prepared data set: one external sort, then whole users at a time.

Memory is bounded by the engine's limit, the longest user and a few row groups, whatever the size of the log.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import duckdb
import numpy as np
import pyarrow.parquet as pq

from pipelines.counts import counts_as_dict
from pipelines.features import ITEM_ID, ITEM_SPACE, Column, DatasetInfo, Space, SplitInfo
from pipelines.prepare.engine import connect, quoted, table_exists
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples.counts import count_shared, counted_groups, keep_totals
from pipelines.prepare.samples.cut import cut
from pipelines.prepare.samples.gathered import write_gathered
from pipelines.prepare.samples.number_statistics import with_statistics
from pipelines.prepare.samples.rare_items import merge_rare_items
from pipelines.prepare.samples.split_time import check_sides, choose_split_time
from pipelines.prepare.samples.summary import SampleCounter, event_statistics
from pipelines.prepare.samples.time_order import TimeOrder
from pipelines.prepare.samples.user_events import listed, whole_users
from pipelines.prepare.samples.write import SplitWriter, write_dataset_file
from pipelines.prepare.source import Description, value_column
from pipelines.prepare.state import STATE, write_state
from pipelines.storage.checked_parquet import checked_writer
from pipelines.storage.locks import locks
from pipelines.storage.vocabulary import keys_digest

logger = logging.getLogger(__name__)

Load = Callable[[duckdb.DuckDBPyConnection, Path, Path], Description]
EVENTS_OF_A_GIB = 1 << 20
"""Events of samples that are sorted at once for each GiB that the engine may use: about a tenth of it."""
REQUEST_SECONDS = 86_400
"""A request that lasts longer is reported: what is shown together rarely is."""
LOCK = "lock"
"""A file that a process keeps locked in the folder where it works."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def prepare(load: Load, source: Path, out: Path, options: SampleOptions) -> None:
    """Prepare the data set that `load` reads from `source` into the new folder `out`.

    The folder appears complete or not at all.  Raises ValueError if it exists or the source is malformed.
    """
    for option, path in (("--source", source), ("--out", out)):
        if path.parts and path.parts[0].endswith(":"):
            raise ValueError(f"{option} {path} must be a folder of this machine; copy the data from or to the store")
    if out.exists():
        raise ValueError(f"--out {out} exists already; remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with workspace(out) as work:
        with connect(work, options.memory_gib, options.threads) as connection:
            write_prepared(connection, load(connection, source, work), work / "result", options)
        (work / "result").rename(out)


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which is made there, as long as it is needed; what a killed process left there is removed.

    Raises:
        ValueError: another process makes the same, or there is no room for what is written.
    """
    work = out.with_name(f".{out.name}-unfinished")
    work.mkdir(exist_ok=True)
    lock = _locked(work)
    try:
        _clear(work)
        yield work
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ValueError(
            f"{work.parent} has no room for the data and what lies beside it meanwhile: {error}; choose another --out"
        ) from error
    finally:
        # A network file system keeps what is open, and with it the folder.
        lock.close()
        shutil.rmtree(work)


def _locked(work: Path) -> IO[str]:
    """The open file by which a process keeps others out of its folder; the system ends that with the process.

    Raises:
        ValueError: another process works there.
    """
    lock = (work / LOCK).open("a")
    if not locks(lock):
        lock.close()
        raise ValueError(f"{work} is in use, another process makes the same: wait for its end, or choose another --out")
    return lock


def _clear(work: Path) -> None:
    """Remove everything but the lock."""
    left = [path for path in work.iterdir() if path.name != LOCK]
    if left:
        logger.info("%s was left by a process that was killed; its content is removed", work)
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_prepared(
    connection: duckdb.DuckDBPyConnection, about: Description, folder: Path, options: SampleOptions
) -> None:
    """Write the events, cut into samples or whole, with their description, into a new folder."""
    write = write_gathered if options.histories == "gathered" else _write_cut
    info = write(connection, about, folder, options)
    info = replace(info, spaces={name: _write_keys(connection, space, folder) for name, space in info.spaces.items()})
    if any(column.part == "item" for column in info.columns):
        (folder / "items").mkdir()
        _copy(connection, "items", "item_id", folder / "items" / "part-00000.parquet")
    write_dataset_file(folder, info, options)


def _write_cut(
    connection: duckdb.DuckDBPyConnection, about: Description, folder: Path, options: SampleOptions
) -> DatasetInfo:
    """Cut the events into samples that store their histories and write them; returns their description."""
    if not connection.execute("SELECT count(*) FROM events WHERE candidate").fetchall()[0][0]:
        raise ValueError("the source holds no events with labels")
    split_time = options.split_time if options.split_time is not None else choose_split_time(connection, options)
    # A later part may be all for training: it is evaluated before it is trained on.
    needed = ("train",) if about.part else ("train", "eval")
    early = check_sides(connection, split_time, options, needed) if options.leave_last is None else None
    about = _with_rare_items_merged(connection, about, split_time, options)
    statistics = event_statistics(connection, about.actions)
    place = f"at {np.datetime64(split_time, 's')} UTC" if options.leave_last is None else "before each user's newest"
    logger.info("%d events of %d users, split %s", statistics["events"], statistics["users"], place)
    _warn_of_long_requests(connection)
    of_log = list(dict.fromkeys(value_column(column.name) for column in listed(about)))
    about = _with_counts(connection, about, split_time, options)
    sizes, of_samples = _write_samples(connection, about, folder, split_time, options)
    for split, size in sizes.items():
        if not size.samples and split in needed:
            raise ValueError(_no_samples(split, options))
        logger.info("%s: %d samples, %d candidates", split, size.samples, size.candidates)
    left_out = {
        **({"events_without_history": early} if early is not None else {}),
        "users_in_no_sample": statistics["users"] - of_samples.pop("users"),
        "events_not_candidates": statistics["events"] - sum(size.candidates for size in sizes.values()),
    }
    logger.info(
        "left out: %d users without a sample, %d events that are not candidates (--min-history, --min-candidates, "
        "--samples-per-user, --eval-candidates, --max-users)",
        *(left_out["users_in_no_sample"], left_out["events_not_candidates"]),
    )
    _warn_of_constant_actions(of_samples["splits"]["train"]["positives"], sizes["train"].candidates)
    if about.keeps_state:
        keep_totals(connection, about.counted)
        write_state(connection, about, folder / STATE, options.max_history, of_log)
    details = {
        "split_time": split_time if options.leave_last is None else None,
        "statistics": {**statistics, **left_out, **of_samples},
        **about.details,
        **({"state": STATE} if about.keeps_state else {}),
    }
    return DatasetInfo(
        name=about.name,
        spaces=about.spaces,
        columns=with_statistics(connection, about, details["split_time"]),
        actions=about.actions,
        weight=about.weight,
        keep_rate=about.keep_rate,
        clock=about.clock,
        cut="by_time" if options.leave_last is None else "by_place",
        splits=sizes,
        source=about.source,
        licence=about.licence,
        details=details,
    )


def _no_samples(split: str, options: SampleOptions) -> str:
    """What a message says of a split that stays empty though there are events for it."""
    if options.leave_last is not None:
        return (
            f"no {split} samples: no user has more events than --leave-last={options.leave_last}, "
            f"--drop-last={options.drop_last} and --min-history={options.min_history} ask for together; lower them"
        )
    return (
        f"no {split} samples: what happened in one second or request with a user's first events, or goes on over the "
        f"split time, is no candidate, and each group of the rest has fewer than --min-candidates="
        f"{options.min_candidates}: change --min-candidates, --min-history, --split-time or the request column"
    )


def _warn_of_long_requests(connection: duckdb.DuckDBPyConnection) -> None:
    """Say where one request lasts so long that its id must mean several, as a number does that begins anew each day."""
    requests, longer, longest = connection.execute(
        f"SELECT count(*), count(*) FILTER (span > {REQUEST_SECONDS}), max(span) FROM (SELECT max(time) - min(time) AS "
        "span FROM events WHERE request_key IS NOT NULL GROUP BY user_id, request_key)"
    ).fetchall()[0]
    if longer:
        logger.warning(
            "%d of %d requests last more than a day, the longest %.1f days: where the request column repeats a value "
            "for something else, all from its first event to its last is one group of candidates, and none where that "
            "goes on over the split time or into another part; make its values differ",
            *(longer, requests, longest / REQUEST_SECONDS),
        )


def _warn_of_constant_actions(positives: Mapping[str, int], candidates: int) -> None:
    """Say early what training a ranker will refuse."""
    for action, count in positives.items():
        if count in (0, candidates):
            logger.warning(
                "%s is %s taken in the training samples: a ranker has nothing to learn from it and will refuse it; add "
                "impressions (rows where it was not taken), leave it out of model.labels, or train retrieval",
                *(action, "always" if count else "never"),
            )


def _with_rare_items_merged(
    connection: duckdb.DuckDBPyConnection, about: Description, split_time: int, options: SampleOptions
) -> Description:
    """The description of `events` after rare items have lost their ids, if the options ask for it."""
    if options.min_count == 1:
        return about
    others = [each.name for each in about.columns if each.space == ITEM_SPACE and each.name != ITEM_ID]
    if others:
        raise ValueError(
            f"--min-count cannot renumber {others[0]}, another column of the space {ITEM_SPACE}: give the space a "
            "min_count in the schema file"
        )
    items = merge_rare_items(connection, about.spaces[ITEM_SPACE], options.min_count, split_time)
    logger.info(
        "%d of %d items have fewer than --min-count=%d events and share id 0",
        *(about.spaces[ITEM_SPACE].used - items.used, about.spaces[ITEM_SPACE].used - 1, options.min_count),
    )
    return replace(about, spaces={**about.spaces, ITEM_SPACE: items})


def _with_counts(
    connection: duckdb.DuckDBPyConnection, about: Description, split_time: int, options: SampleOptions
) -> Description:
    """The description of `events` with columns of counts, if the options ask for them."""
    groups = counted_groups(about.columns, len(about.actions), options)
    if not groups:
        return about
    counts = [each.counts for each in groups]
    logger.info("counting by %s", ", ".join(each.group for each in counts))
    taken = {column.name for column in listed(about)} & {n for each in counts for n in each.columns}
    if taken:
        raise ValueError(f"column {min(taken)} has the name of a count; rename it, or prepare with --no-counts")
    frozen_at = None if options.eval_groups else split_time
    count_shared(connection, groups, frozen_at)
    columns = (Column(name=name, part="candidate", kind="number") for each in counts for name in each.columns)
    details = {**about.details, "counts": counts_as_dict(counts)}
    return replace(about, columns=(*about.columns, *columns), details=details, counted=groups)


def _write_keys(connection: duckdb.DuckDBPyConnection, space: Space, folder: Path) -> Space:
    """Write the keys behind a space's ids, where they are not the ids themselves."""
    table = f"{space.name}_ids"
    if not table_exists(connection, table):
        return space
    path = folder / f"{table}.parquet"
    _copy(connection, table, f"{space.name}_id", path)
    keys = (batch.column(0) for batch in pq.ParquetFile(path).iter_batches(columns=[f"{space.name}_key"]))
    return replace(space, keys=path.name, digest=keys_digest(keys))


def _copy(connection: duckdb.DuckDBPyConnection, table: str, order: str, path: Path) -> None:
    """Write a table as one Parquet file in the order of a column."""
    rows = connection.sql(f"SELECT * FROM {quoted(table)} ORDER BY {quoted(order)}").to_arrow_reader()
    # DuckDB's own files have no checksums.
    with checked_writer(path, rows.schema) as writer:
        for batch in rows:
            writer.write_batch(batch)


def _write_samples(
    connection: duckdb.DuckDBPyConnection, about: Description, folder: Path, split_time: int, options: SampleOptions
) -> tuple[dict[str, SplitInfo], dict[str, Any]]:
    """Cut and write both splits; returns their sizes, and what they hold."""
    counters = {split: SampleCounter(about.actions) for split in ("train", "eval")}
    users = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(SplitWriter(folder / split, options.row_group_events, options.file_events))
            for split in counters
        }
        by_time = TimeOrder(folder.parent / "by_time", int(options.memory_gib * EVENTS_OF_A_GIB))
        train = by_time if options.order == "time" else writers["train"]
        for events in whole_users(connection, about, options):
            found = [np.zeros(0, dtype=np.int64)]
            for split, table in cut(events, split_time, options):
                counters[split].add(table)
                found.append(table["user_id"].unique().to_numpy())
                (train if split == "train" else writers["eval"]).add(table)
            users += len(np.unique(np.concatenate(found)))
        for table in by_time.read():
            writers["train"].add(table)
    sizes = {split: writer.sizes() for split, writer in writers.items()}
    return sizes, {"users": users, "splits": {split: counter.summary() for split, counter in counters.items()}}
