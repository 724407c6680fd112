"""Statistics of a preparation that go into `dataset.json`: how long, how active, how skewed."""

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


class LengthCounter:
    """Exact quantiles of lengths from their counts, in memory that does not grow with the data."""

    def __init__(self) -> None:
        self._counts = np.zeros(1024, dtype=np.int64)

    def add(self, lens: pa.ChunkedArray) -> None:
        """Count one more column of lengths."""
        counts = np.bincount(lens.to_numpy(), minlength=len(self._counts))
        if len(counts) > len(self._counts):
            self._counts = np.pad(self._counts, (0, len(counts) - len(self._counts)))
        self._counts += counts

    def summary(self) -> dict[str, float]:
        """Mean and quantiles; empty if nothing was counted."""
        total = int(self._counts.sum())
        if not total:
            return {}
        cumulative = np.cumsum(self._counts)
        places = np.searchsorted(cumulative, np.maximum(np.ceil(np.array(QUANTILES) * total), 1))
        quantiles = {f"q{100 * share:g}": int(place) for share, place in zip(QUANTILES, places, strict=True)}
        return {"mean": float(self._counts @ np.arange(len(self._counts)) / total), **quantiles}


class SampleCounter:
    """What the samples of one split hold."""

    def __init__(self, actions: Sequence[str]) -> None:
        self._history_len = LengthCounter()
        self._num_candidates = LengthCounter()
        self._positives = dict.fromkeys(actions, 0)
        self._candidates = 0

    def add(self, table: pa.Table) -> None:
        """Count one more table of samples."""
        self._history_len.add(table["history_length"])
        self._num_candidates.add(table["num_candidates"])
        taken = table["candidate_action"].combine_chunks().flatten().to_numpy()
        self._candidates += len(taken)
        for bit, name in enumerate(self._positives):
            self._positives[name] += int(np.count_nonzero(taken >> bit & 1))

    def summary(self) -> dict[str, Any]:
        """Lengths of histories, numbers of candidates, and of all of these how many are positive for each action."""
        return {
            "history_len": self._history_len.summary(),
            "num_candidates": self._num_candidates.summary(),
            "candidates": self._candidates,
            "positives": self._positives,
        }


def event_statistics(connection: duckdb.DuckDBPyConnection, actions: Sequence[str]) -> Mapping[str, Any]:
    """Counts, action rates and item popularity over all labelled events."""
    rates = ", ".join(f"avg((action >> {bit}) & 1)" for bit in range(len(actions)))
    count, users, first, last, *mean = connection.execute(
        f"SELECT count(*), count(DISTINCT user_id), min(time), max(time), {rates} FROM events WHERE candidate"
    ).fetchall()[0]
    popularity = connection.execute(
        """
        SELECT count(*), max(share), sum(share) FILTER (place <= 0.01 * total),
            sum(share) FILTER (place <= 0.1 * total)
        FROM (
            SELECT n / sum(n) OVER () AS share, row_number() OVER (ORDER BY n DESC) AS place, count(*) OVER () AS total
            FROM (SELECT count(*) AS n FROM events WHERE candidate GROUP BY item_id))
        """
    ).fetchall()[0]
    return {
        "events": count,
        "users": users,
        "first_time": first,
        "last_time": last,
        "action_rates": {name: round(rate, 6) for name, rate in zip(actions, mean, strict=True)},
        "item_popularity": {
            "items": popularity[0],
            "top_item_share": popularity[1],
            "top_1_percent_share": popularity[2] or popularity[1],
            "top_10_percent_share": popularity[3] or popularity[1],
        },
    }
