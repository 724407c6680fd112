"""What the training part of a log says of its columns of numbers: kept in `dataset.json`, for transforms of inputs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import duckdb

from pipelines.features import Column
from pipelines.known_numbers import NumberStatistics
from pipelines.prepare.engine import quoted
from pipelines.prepare.source import Description, sample_column, value_column

logger = logging.getLogger(__name__)

STEPS = 100
"""Quantiles are kept at this many equal steps of probability."""
QUANTILE_VALUES = 1 << 20
"""Quantiles within are those of at most about so many values, which a hash chooses; the ends are exact."""


ROWS: Mapping[str, str] = {"events": "user_id, log_row", "users": "user_id", "items": "item_id"}
"""The tables with values, and what tells their rows apart."""


def with_statistics(
    connection: duckdb.DuckDBPyConnection, about: Description, split_time: int | None
) -> tuple[Column, ...]:
    """The columns of a description, those of numbers with statistics, but for counts, which need none.

    Of what events tell they are those of the labelled events before the split (of all without one); of attributes of
    users and items, those of each once.
    """
    counts = {name for each in about.counted for name in each.counts.columns}
    numbers = [column for column in about.columns if column.kind == "number"]
    places = {
        column: _place(column, about) for column in numbers if column.part != "candidate" or column.name not in counts
    }
    found: dict[tuple[str, str], NumberStatistics] = {}
    for table, row in ROWS.items():
        names = list(dict.fromkeys(name for place, name in places.values() if place == table))
        if names:
            chosen = table
            if table == "events":
                chosen += " WHERE candidate" + (f" AND time < {split_time}" if split_time is not None else "")
            statistics = _statistics(connection, f"(SELECT * FROM {chosen})", row, names)
            found |= {(table, name): each for name, each in zip(names, statistics, strict=True)}
    return tuple(
        replace(column, statistics=found[places[column]]) if column in places else column for column in about.columns
    )


def warn_of_other_numbers(earlier: Sequence[Column], delivered: Sequence[Column]) -> None:
    """Say where a delivery's numbers are not like those that a data set began with, by which models measure them: of a
    column in another unit, half of the values lie where hardly any did; one that is no longer filled has none."""
    began = {(column.part, column.name): column.statistics for column in earlier}
    for column in delivered:
        had, has = began[column.part, column.name], column.statistics
        # Where nearly all is missing, there are no quantiles but the ends.
        if had is None or has is None or len(had.quantiles) <= STEPS:
            continue
        low, middle, high = (had.quantiles[place] for place in (1, STEPS // 2, STEPS - 1))
        if not has.count:
            logger.warning("%s %s is missing in every row of this delivery", column.part, column.name)
        elif len(has.quantiles) > STEPS and not low <= has.quantiles[STEPS // 2] <= high:
            logger.warning(
                "half of the numbers %s %s of this delivery lie beyond 99%% of those that the data set began with, the "
                "middle one is %.6g and was %.6g: are they in the same unit?",
                *(column.part, column.name, has.quantiles[STEPS // 2], middle),
            )


def _place(column: Column, about: Description) -> tuple[str, str]:
    """(table, its column) with the values of a column of numbers."""
    if column.part in ("sample", "item"):
        if column.name in about.changing and column.part == "sample":
            return "events", sample_column(column.name)
        return {"sample": "users", "item": "items"}[column.part], column.name
    return "events", value_column(column.name)


def _statistics(
    connection: duckdb.DuckDBPyConnection, rows: str, row: str, columns: Sequence[str]
) -> list[NumberStatistics]:
    """Statistics of each of these columns: one pass for the moments and the ends, one for quantiles."""
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
