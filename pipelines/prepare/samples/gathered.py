"""From the tables `events` and `items` to a data set that stores the log once (`pipelines.storage.gathering`).

Its samples come in windows of wall-clock time, a day each: parts of the training split, to be trained on one after
another, each scored before it is trained on.  The last window is the evaluation split.  Memory is bounded by the
engine's limit, the longest user and what a piece of the log takes, whatever its size.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import numpy as np

from pipelines.features import ITEM_ID, ITEM_SPACE, USER_ID, Column, DatasetInfo, Space, SplitInfo
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples.number_statistics import with_statistics
from pipelines.prepare.source import Description, GatheredRules
from pipelines.storage.columns import IntArray
from pipelines.storage.gathering import (
    ACTION,
    CROSS_HASH,
    FIELD,
    FIRST,
    HISTORY,
    ITEM,
    LOG,
    NO_POOL,
    PLACE,
    POOL,
    TIME,
    TYPES,
    USER,
    EventLog,
    Gathering,
    action_type,
    array_file,
)

logger = logging.getLogger(__name__)

WINDOW_S = 86_400
"""Seconds of a window, a day."""
REST = 0.1
"""What is left behind the last whole window is one of its own only if it is longer than this part of one."""
SCAN_EVENTS = 20_000
"""Events before a sample's among which its history is sought."""
READ_ROWS = 1 << 18
PIECE = 1 << 22
"""Samples that are divided over windows at a time."""
TAKEN = ("histories", "max_history", "min_history", "memory_gib", "threads")
"""Options that mean something here."""
FOUND = "sample.bin"
"""A temporary file beside the data set, which says of each event whether it is a sample."""


@dataclass(slots=True)
class _Split:
    """What was written of a split."""

    samples: int
    history_events: int
    positives: IntArray
    """[actions] how often each was taken."""

    def info(self, files: int) -> SplitInfo:
        """The sizes as `dataset.json` states them."""
        return SplitInfo(samples=self.samples, history_events=self.history_events, candidates=self.samples, files=files)


def check_options(options: SampleOptions, about: Description) -> GatheredRules:
    """How this source's histories are gathered.

    Raises:
        ValueError: its format does not say it, or an option has no effect.
    """
    if isinstance(about.gathered, str):
        raise ValueError(f"--histories gathered of {about.name}: {about.gathered}")
    for field in fields(options):
        if field.name not in TAKEN and getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} has no effect with --histories gathered, whose samples are single "
                "events in windows of a day; leave it out"
            )
    pools = len(about.gathered.pools)
    if options.max_history < pools:
        raise ValueError(f"--max-history must be at least {pools}, an event a pool, got {options.max_history}")
    return about.gathered


def write_gathered(
    connection: duckdb.DuckDBPyConnection, about: Description, folder: Path, options: SampleOptions
) -> DatasetInfo:
    """Write the log and its samples into a new folder, all but keys, items and description; returns the last."""
    rules = check_options(options, about)
    gathering = Gathering(
        pools=tuple(rules.pools),
        pool_events=options.max_history // len(rules.pools),
        scan_events=SCAN_EVENTS,
        crosses={name: cross.of for name, cross in rules.crosses.items()},
    )
    (folder / LOG).mkdir(parents=True)
    _write_log(connection, about, rules, folder)
    log = EventLog(str(folder), len(about.actions))
    logger.info("%d events of %d users", len(log.item), len(log.user))
    start = _find_samples(log, gathering, options.min_history, folder.parent)
    parts, splits = _write_windows(log, start, len(about.actions), folder)
    logger.info(
        "%d windows of a day: %d samples to train on, the last window's %d to evaluate on, %.1f events a history",
        len(parts) + 1,
        splits["train"].samples,
        splits["eval"].samples,
        splits["train"].history_events / splits["train"].samples,
    )
    described = {
        split: {"candidates": each.samples, "positives": dict(zip(about.actions, each.positives.tolist(), strict=True))}
        for split, each in splits.items()
    }
    spaces, columns = _described(about, rules)
    details: dict[str, Any] = {
        FIELD: gathering.as_dict(),
        "first_time": start,
        "window_s": WINDOW_S,
        "statistics": {"events": len(log.item), "users": len(log.user), "splits": described},
        **about.details,
    }
    return DatasetInfo(
        name=about.name,
        spaces=spaces,
        columns=with_statistics(connection, replace(about, columns=columns), None),
        actions=about.actions,
        clock=about.clock,
        parts=tuple(parts),
        splits={"train": splits["train"].info(len(parts)), "eval": splits["eval"].info(1)},
        source=about.source,
        licence=about.licence,
        details=details,
    )


def _described(about: Description, rules: GatheredRules) -> tuple[dict[str, Space], tuple[Column, ...]]:
    """Spaces and columns: items and theirs, users, crosses."""
    kept = [each for each in about.columns if each.part == "item" or each.name in (ITEM_ID, USER_ID)]
    crosses = [Column(name=name, part="sample", kind="id", space=name) for name in rules.crosses]
    used = {each.space for each in kept} | {ITEM_SPACE}
    spaces = {name: space for name, space in about.spaces.items() if name in used}
    # The rules are for the whole log; a smaller one gets crosses in proportion.
    share = min(1.0, about.spaces["user"].used / rules.users)
    for name, cross in rules.crosses.items():
        rows = max(2, round(cross.rows * share))
        spaces[name] = Space(name=name, rows=rows, used=rows, hash=CROSS_HASH)
    return spaces, (*kept, *crosses)


def _write_log(connection: duckdb.DuckDBPyConnection, about: Description, rules: GatheredRules, folder: Path) -> None:
    """Sort the events, write them to `log/`, and beside the data set whether each is a sample's."""
    cases = " ".join(f"WHEN {sql} THEN {number}" for number, sql in enumerate(rules.pools.values()))
    logger.info("sorting")
    reader = connection.sql(
        f"SELECT user_id, item_id, time, action, (CASE {cases} ELSE {NO_POOL} END)::UTINYINT AS pool, "
        f"coalesce(candidate AND ({rules.samples}), false)::UTINYINT AS sample FROM events WHERE {rules.within} "
        # In equal times the log's own order: nothing that a model predicts may decide.
        "ORDER BY user_id, candidate, rank, log_row"
    ).to_arrow_reader(READ_ROWS)
    names = {ITEM: "item_id", TIME: "time", ACTION: "action", POOL: "pool"}
    kinds = {**TYPES, ACTION: action_type(len(about.actions))}
    users, starts, total, last = [], [], 0, -1
    files: dict[str, BinaryIO] = {name: array_file(folder / LOG, name).open("wb") for name in names}
    try:
        with (folder.parent / FOUND).open("wb") as found:
            for batch in reader:
                user = batch["user_id"].to_numpy()
                assert (np.diff(user, prepend=last) >= 0).all(), "the engine's sort is out of order"
                begins = np.flatnonzero(np.diff(user, prepend=last))
                users.append(user[begins])
                starts.append(total + begins)
                for name, column in names.items():
                    files[name].write(batch[column].to_numpy().astype(kinds[name]).tobytes())
                found.write(batch["sample"].to_numpy().tobytes())
                total, last = total + batch.num_rows, int(user[-1]) if len(user) else last
    finally:
        for file in files.values():
            file.close()
    _save(folder / LOG, USER, np.concatenate([np.zeros(0, dtype=np.int64), *users]))
    _save(folder / LOG, FIRST, np.append(np.concatenate([np.zeros(0, dtype=np.int64), *starts]), total))


def _find_samples(log: EventLog, gathering: Gathering, min_history: int, scratch: Path) -> int:
    """Write places and history lengths of all samples to `scratch`, in order of users; returns the first one's time.

    Raises:
        ValueError: there are none.
    """
    marked = np.memmap(scratch / FOUND, dtype=np.uint8, mode="r") if len(log.item) else np.zeros(0, dtype=np.uint8)
    start = None
    with array_file(scratch, PLACE).open("wb") as place_file, array_file(scratch, HISTORY).open("wb") as history_file:
        for user in range(len(log.user)):
            first, last = int(log.first[user]), int(log.first[user + 1])
            places = first + np.flatnonzero(marked[first:last])
            if len(places):
                places = places[log.before_its_second(user, places) >= min_history]
            if not len(places):
                continue
            earliest = int(log.time[places[0]])
            start = earliest if start is None else min(start, earliest)
            place_file.write(places.astype(TYPES[PLACE]).tobytes())
            lens = log.histories(user, places, gathering).lens()
            history_file.write(lens.astype(TYPES[HISTORY]).tobytes())
    if start is None:
        raise ValueError(
            f"none of the events that become samples has {min_history} others of its user before its second: lower "
            "--min-history, or give a longer log"
        )
    return start


def _write_windows(log: EventLog, start: int, num_actions: int, folder: Path) -> tuple[list[str], dict[str, _Split]]:
    """Divide the samples over windows; returns the training parts' names and what was written.

    Raises:
        ValueError: all lie in one window.
    """
    latest = max(int(log.time[place].max()) for place, _ in _pieces(folder.parent))
    last = max(math.ceil((latest + 1 - start) / WINDOW_S - REST) - 1, 0)
    counts = np.zeros(last + 1, dtype=np.int64)
    splits = {name: _Split(0, 0, np.zeros(num_actions, dtype=np.int64)) for name in ("train", "eval")}
    for place, history in _pieces(folder.parent):
        window = np.minimum((log.time[place].astype(np.int64) - start) // WINDOW_S, last)
        for number in np.unique(window).tolist():
            mine, split = window == number, "eval" if number == last else "train"
            counts[number] += int(mine.sum())
            written = splits[split]
            written.samples += int(mine.sum())
            written.history_events += int(history[mine].sum())
            taken = log.action[place[mine]]
            written.positives += [np.count_nonzero(taken >> bit & 1) for bit in range(num_actions)]
            to = folder / split / ("" if split == "eval" else _part(number))
            to.mkdir(parents=True, exist_ok=True)
            for name, values in ((PLACE, place), (HISTORY, history)):
                with array_file(to, name).open("ab") as file:
                    file.write(values[mine].tobytes())
    parts = [_part(number) for number in np.flatnonzero(counts[:last]).tolist()]
    if not parts:
        raise ValueError("all samples lie in one window of a day: there must be another to train on before it")
    return parts, splits


def _part(window: int) -> str:
    return f"day-{window:03d}"


def _pieces(scratch: Path) -> Iterator[tuple[IntArray, IntArray]]:
    """(places, history lengths) of all samples, piece by piece."""
    arrays = [np.memmap(array_file(scratch, name), dtype=TYPES[name], mode="r") for name in (PLACE, HISTORY)]
    for first in range(0, len(arrays[0]), PIECE):
        place, history = (np.asarray(each[first : first + PIECE]) for each in arrays)
        yield place, history


def _save(folder: Path, name: str, values: IntArray) -> None:
    array_file(folder, name).write_bytes(values.astype(TYPES[name]).tobytes())
