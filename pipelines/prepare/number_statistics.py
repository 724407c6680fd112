"""What the training part of a log says of its columns of numbers: kept in `dataset.json`, for transforms of inputs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import duckdb

from pipelines.features import Column, Part
from pipelines.known_numbers import NumberStatistics
from pipelines.prepare.counts import COUNTED
from pipelines.prepare.engine import quoted
from pipelines.prepare.source import value_column

STEPS = 100
"""Quantiles are kept at this many equal steps of probability."""
QUANTILE_VALUES = 1 << 20
"""Quantiles within are those of at most about so many values, which a hash chooses; the ends are exact."""


EVENT = "user_id, log_row"
TABLES: Mapping[Part, tuple[str, str]] = {
    **dict.fromkeys(("event", "candidate", "label"), ("events", EVENT)),
    "sample": ("users", "user_id"),
    "item": ("items", "item_id"),
}
"""Where the values of a part stand, and what tells its rows apart."""


def with_statistics(
    connection: duckdb.DuckDBPyConnection,
    columns: Sequence[Column],
    split_time: int | None,
    counts: Collection[str] = (),
) -> tuple[Column, ...]:
    """The columns, those of numbers with statistics.

    Of events, candidates and labels they are those of the labelled events before the split (of all without one); of
    users and items, those of each once.  `counts` are columns whose values stand in the table COUNTED.
    """

    def place(column: Column) -> tuple[str, str]:
        counted = column.part == "candidate" and column.name in counts
        return (COUNTED, EVENT) if counted else TABLES[column.part]

    found: dict[tuple[str, str], NumberStatistics] = {}
    for table, row in {**dict.fromkeys(TABLES.values()), (COUNTED, EVENT): None}:
        names = [each.name for each in columns if each.kind == "number" and place(each) == (table, row)]
        known = {name: value_column(name) if row == EVENT else name for name in dict.fromkeys(names)}
        if known:
            chosen = table
            if table == "events":
                chosen += " WHERE candidate" + (f" AND time < {split_time}" if split_time is not None else "")
            statistics = _statistics(connection, f"(SELECT * FROM {chosen})", row, list(known.values()))
            found |= {(table, name): each for name, each in zip(known, statistics, strict=True)}
    return tuple(
        replace(column, statistics=found[place(column)[0], column.name]) if column.kind == "number" else column
        for column in columns
    )


def _statistics(
    connection: duckdb.DuckDBPyConnection, rows: str, row: str, columns: Sequence[str]
) -> list[NumberStatistics]:
    """Of each of these columns: one pass for the moments and the ends, one for quantiles."""
    values = [f"nullif({quoted(column)}::DOUBLE, 'nan'::DOUBLE)" for column in columns]
    moments = ", ".join(
        f"[count({value}), fsum({value}) / count({value}), stddev_pop({value}), min({value}), max({value})]"
        for value in values
    )
    [(total, *found)] = connection.execute(f"SELECT count(*), {moments} FROM {rows}").fetchall()
    steps = ", ".join(str(step / STEPS) for step in range(STEPS + 1))
    quantiles = ", ".join(f"quantile_disc({value}, [{steps}])" for value in values)
    chosen = f"hash({row}) % {max(-(-total // QUANTILE_VALUES), 1)} = 0"
    [inner] = connection.execute(f"SELECT {quantiles} FROM {rows} WHERE {chosen}").fetchall()
    return [_described(total, each, within) for each, within in zip(found, inner, strict=True)]


def _described(rows: int, moments: Sequence[float], inner: Sequence[float] | None) -> NumberStatistics:
    count, mean, std, low, high = moments
    if not count:
        return NumberStatistics(count=0, missing=rows, mean=0.0, std=0.0, quantiles=())
    return NumberStatistics(
        count=int(count),
        missing=rows - int(count),
        # Rounded, because threads add up in any order: the last digits may differ each time.
        mean=float(f"{mean:.10g}"),
        std=float(f"{std:.10g}"),
        quantiles=(low, *(inner[1:-1] if inner else ()), high),
    )
