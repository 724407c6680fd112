"""Rows that the engine has sorted, piece by piece: no piece divides a group of equal keys."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

READ_ROWS = 1 << 18
"""Rows that the engine hands over at once."""


def whole_groups(batches: Iterable[pa.RecordBatch], keys: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of `batches` as tables, in which rows that are equal in all keys stand together.

    Rows with equal keys must follow each other.  A table has more rows than a batch where a group goes over several.
    """
    waiting: list[pa.Table] = []
    for batch in batches:
        table = pa.Table.from_batches([batch])
        if not table.num_rows:
            continue
        start = _last_group(table, keys)
        if start or (waiting and _differ(waiting[-1], table, keys)):
            yield pa.concat_tables([*waiting, table.slice(0, start)])
            waiting = []
        waiting.append(table.slice(start))
    if waiting:
        yield pa.concat_tables(waiting)


def _last_group(table: pa.Table, keys: Sequence[str]) -> int:
    """Where the last group begins."""
    others = np.zeros(table.num_rows, dtype=np.bool_)
    for key in keys:
        values = table[key].to_numpy()
        others |= values != values[-1]
    return table.num_rows - int(np.argmax(others[::-1])) if others.any() else 0


def _differ(one: pa.Table, other: pa.Table, keys: Sequence[str]) -> bool:
    """Whether the group at the end of one table is not that at the beginning of the other."""
    return any(one[key][-1].as_py() != other[key][0].as_py() for key in keys)
