"""The next delivery of a log, added to a prepared data set: `prepare event_log --extend DIR`.

Ids never change, new keys get the next ones.  The new part's samples have histories that reach back into earlier parts,
by the state that a data set keeps (`pipelines.prepare.state`).  Its files appear in a folder of each split's own;
`dataset.json`, written last, is what makes them part of the data.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.counts import counts_as_dict, counts_of
from pipelines.features import Column, DatasetInfo, Space, SplitInfo
from pipelines.prepare.engine import connect
from pipelines.prepare.options import SampleOptions
from pipelines.prepare.samples.counts import counted_groups
from pipelines.prepare.samples.number_statistics import warn_of_other_numbers
from pipelines.prepare.samples.stages import Load, workspace, write_prepared
from pipelines.prepare.source import CountedGroup
from pipelines.prepare.state import STATE, check_state, read_state
from pipelines.storage.dataset_json import DATASET_FILE, read_dataset_info

logger = logging.getLogger(__name__)

SPLITS = ("train", "eval")
BEFORE_THEY_WERE: Mapping[str, Any] = {"count_user_columns": False}
"""What data sets are as that were prepared before there were these options, where today's default differs."""
OF_ALL_PARTS = ("max_history", "min_count", "leave_last", "drop_last")
"""Options that a part cannot change: by them state is kept, ids are given, and the data set is cut."""


def extend(load: Load, source: Path, folder: Path, options: Mapping[str, Any]) -> None:
    """Add the log in `source` to the data set in `folder`.

    Args:
        load: what reads the log, knowing the data set.
        options: the sample options that are said of this part; the others are as the data set began.

    Raises:
        ValueError: the folder holds no data set that can be extended, or the log does not fit it.
    """
    with workspace(folder / "part") as work:
        info = read_dataset_info(str(folder))
        state = info.details.get("state")
        if not isinstance(state, str) or not (folder / state).is_dir():
            raise ValueError(
                f"--extend {folder} keeps no state to go on from: prepare it with event_log, without --no-state"
            )
        chosen = _sample_options(info, options)
        # Whatever cannot be added to is told before the log is read.
        check_state(folder, state, info, _groups(info, chosen, folder))
        parts = info.parts
        part = f"part={len(parts):05d}"
        _remove_left(folder, part)
        with connect(work, chosen.memory_gib, chosen.threads) as connection:
            read_state(connection, folder, state, info)
            about = load(connection, source, work)
            # The ids of rare items are decided where keys are numbered: no later than that, ids could change.
            write_prepared(connection, replace(about, part=part), work / "result", replace(chosen, min_count=1))
        _join(info, folder, work / "result", (*parts, part))


def _sample_options(info: DatasetInfo, said: Mapping[str, Any]) -> SampleOptions:
    """How the part is cut: as the data set was, but for what is said of it.

    Raises:
        ValueError: the data set has options that this version does not know, or something else is said of what holds
            for all parts.
    """
    stored = info.details["options"]
    unknown = sorted(set(stored) - set(SampleOptions.__dataclass_fields__))
    if unknown:
        raise ValueError(f"another version of this project prepared the data, with {', '.join(unknown)}: use that one")
    began = SampleOptions(**{**BEFORE_THEY_WERE, **stored, "split_time": None})
    for name in OF_ALL_PARTS:
        first = getattr(began, name)
        if said.get(name, first) != first:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {said[name]} has no place with --extend: the data set began "
                f"{f'with {flag} {first}' if first is not None else f'without {flag}'}, as all its parts go on"
            )
    return replace(began, **said)


def _remove_left(folder: Path, part: str) -> None:
    """Remove what an extension that was killed has moved into the data set already."""
    for split in SPLITS:
        if (folder / split / part).exists():
            logger.info("%s was left by an extension that ended early; removed", folder / split / part)
            shutil.rmtree(folder / split / part)


def _groups(info: DatasetInfo, options: SampleOptions, folder: Path) -> tuple[CountedGroup, ...]:
    """What is counted of the data set's candidates.

    Raises:
        ValueError: the options count something else.
    """
    counts = counts_of(info)
    counted = {name for each in counts for name in each.columns}
    columns = [each for each in info.columns if each.part != "candidate" or each.name not in counted]
    groups = counted_groups(columns, len(info.actions), options)
    if counts_as_dict([each.counts for each in groups]) != counts_as_dict(counts):
        raise ValueError(
            f"--extend {folder} has counts by {_names(each.group for each in counts)}, but these options count by "
            f"{_names(each.counts.group for each in groups)}: leave out the options of counts, as a delivery counts "
            "what the data set does; or prepare it again"
        )
    return groups


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"


def _join(info: DatasetInfo, folder: Path, result: Path, parts: tuple[str, ...]) -> None:
    """Move what was prepared into the data set, its description last."""
    added = read_dataset_info(str(result))
    assert [_meaning(each) for each in info.columns] == [_meaning(each) for each in added.columns]
    warn_of_other_numbers(info.columns, added.columns)
    for split in SPLITS:
        if any((result / split).iterdir()):
            (result / split).rename(folder / split / parts[-1])
    for path in [*result.glob("*_ids.parquet"), *result.glob("items/*.parquet")]:
        # What stood in these files stands in the new ones, too.
        os.replace(path, folder / path.relative_to(result))
    state = f"{STATE}-{len(parts) - 1:05d}"
    shutil.rmtree(folder / state, ignore_errors=True)
    (result / added.details["state"]).rename(folder / state)
    old_state = folder / info.details["state"]
    described = replace(
        info,
        spaces={name: _grown(space, added.spaces[name]) for name, space in info.spaces.items()},
        parts=parts,
        splits={split: _sum(info.splits[split], added.splits[split]) for split in SPLITS},
        details={**info.details, **_details(info, added, parts, state)},
    )
    path = folder / f".{DATASET_FILE}"
    path.write_text(json.dumps(described.as_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(path, folder / DATASET_FILE)
    shutil.rmtree(old_state)
    logger.info("%s: %s added", folder, parts[-1])


def _meaning(column: Column) -> Column:
    return replace(column, statistics=None)


def _grown(space: Space, added: Space) -> Space:
    """A space after new keys; its rows grow only where there was no room."""
    if added.used > space.rows:
        logger.info("%s: %d ids outgrow its %d rows; its table grows with it", space.name, added.used, space.rows)
    # What kind of keys the parts before held nobody can tell where they do not say it.
    return replace(added, rows=max(space.rows, added.used), key_kind=space.key_kind)


def _sum(one: SplitInfo, other: SplitInfo) -> SplitInfo:
    """Sizes of two parts together; what one of them has not counted stays uncounted."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in SplitInfo.__dataclass_fields__}
    sums: dict[str, Any] = {name: None if None in pair else sum(pair) for name, pair in pairs.items()}
    return SplitInfo(**sums)


def _details(info: DatasetInfo, added: DatasetInfo, parts: tuple[str, ...], state: str) -> dict[str, Any]:
    """What `dataset.json` says of the parts, each as it was delivered, and of the digests that ids had before."""
    of_part = {key: added.details[key] for key in ("split_time", "statistics", "left_out", "duplicates")}
    digests = dict(info.details.get("earlier_digests", {}))
    for name, space in info.spaces.items():
        if space.digest is not None and space.digest != added.spaces[name].digest:
            digests[name] = [*digests.get(name, []), space.digest]
    return {
        "state": state,
        "earlier_digests": digests,
        "deliveries": {**info.details.get("deliveries", {}), parts[-1]: {**of_part, "source": added.source}},
    }
