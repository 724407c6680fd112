"""Where a log is divided in time, and whether both sides can have samples: seen before all is counted and sorted."""

import logging
from dataclasses import dataclass

import duckdb

from pipelines.prepare.options import SampleOptions

logger = logging.getLogger(__name__)

HOUR = 3600
FEW = 0.1
"""A larger part of the events that no sample can have for want of a history is worth a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Labelled events before the split time (train) and from it on (eval)."""

    first: int
    """The time of the oldest."""
    last: int
    """The time of the newest."""
    events: dict[str, int]
    """How many there are, by split."""
    longest: dict[str, int]
    """Events of the user with most of them up to the end of the side, of users with any there, labelled or not."""
    early: int
    """Events with fewer than `min_history` events of their user before them, on both sides."""


def choose_split_time(connection: duckdb.DuckDBPyConnection, options: SampleOptions) -> int:
    """The first full hour before which at least `train_fraction` of the labelled events lie and after which any do.

    In a log of whole days, or of few hours, the last may hold more than the rest: it is for evaluation then.  A log
    that lies within an hour is divided at a full second.
    """
    [(begin, end)] = connection.execute("SELECT min(time), max(time) FROM events WHERE candidate").fetchall()
    step = HOUR if begin // HOUR < end // HOUR else 1
    [(place, first, last)] = connection.execute(
        f"SELECT min(place) FILTER (share >= {options.train_fraction}), min(place), max(place) FROM "
        "(SELECT place, sum(n) OVER (ORDER BY place) / sum(n) OVER () AS share FROM "
        f"(SELECT time // {step} AS place, count(*) AS n FROM events WHERE candidate GROUP BY 1))"
    ).fetchall()
    return max(int(first) + 1, min(int(place) + 1, int(last))) * step


def check_sides(
    connection: duckdb.DuckDBPyConnection, split_time: int, options: SampleOptions, needed: tuple[str, ...]
) -> int:
    """See that a user of each of the `needed` sides has an event with the history that a sample needs.

    Returns how many labelled events have not, on both sides.

    Raises:
        ValueError: no event of a side can be a candidate; the message says by which rule.
    """
    sides = _sides(connection, split_time, options.min_history)
    for split in needed:
        where = "before" if split == "train" else "at or after"
        if not sides.events[split]:
            raise ValueError(
                f"no {split} samples: no event lies {where} the split time {split_time}, they span {sides.first} to "
                f"{sides.last}: give another --split-time or --train-fraction"
            )
        if sides.longest[split] <= options.min_history:
            raise ValueError(
                f"no {split} samples: none of the {sides.events[split]} events {where} the split time {split_time} has "
                f"--min-history={options.min_history} events of its user before it, the longest user has "
                f"{sides.longest[split]} in all: lower --min-history (0 takes users' first events, too)"
            )
    total = sum(sides.events.values())
    if sides.early:
        logger.log(
            logging.WARNING if sides.early > FEW * total else logging.INFO,
            "%d of %d events have fewer than --min-history=%d events of their user before them: they are part of "
            "histories, and neither learnt from nor evaluated; --min-history 0 takes all",
            *(sides.early, total, options.min_history),
        )
    return sides.early


def _sides(connection: duckdb.DuckDBPyConnection, split_time: int, min_history: int) -> Sides:
    """One pass over the events, by user."""
    first, last, train, evaluation, before, longest, early = connection.execute(
        "SELECT min(first), max(last), sum(train)::BIGINT, sum(labelled - train)::BIGINT, "
        "max(before) FILTER (train > 0), max(n) FILTER (labelled > train), "
        f"sum(least(labelled, greatest({min_history} - (n - labelled), 0)))::BIGINT FROM "
        "(SELECT count(*) AS n, count(*) FILTER (candidate) AS labelled, min(time) FILTER (candidate) AS first, "
        f"max(time) FILTER (candidate) AS last, count(*) FILTER (time < {split_time}) AS before, "
        f"count(*) FILTER (candidate AND time < {split_time}) AS train FROM events GROUP BY user_id)"
    ).fetchall()[0]
    return Sides(
        first=first,
        last=last,
        events={"train": train, "eval": evaluation},
        longest={"train": before or 0, "eval": longest or 0},
        early=early,
    )
