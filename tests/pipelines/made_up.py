"""Small made-up data sets in the prepared format, written the way any other system would write them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ITEMS = 500
ACTIONS = ("click", "like")
START = 1_600_000_000


def made_up_rows(count: int, seed: int = 0, first_user: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    """Rows of random lengths; user ids tell them apart."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(first_user, first_user + count):
        history, candidates = int(generator.integers(0, longest + 1)), int(generator.integers(1, 5))
        times = START + np.sort(generator.choice(10_000, history + candidates, replace=False))
        times[: history // 3] = -1
        row: dict[str, Any] = {"user_id": user, "country": int(generator.integers(0, 7))}
        for part, span in (("history", slice(0, history)), ("candidate", slice(history, None))):
            size = len(times[span])
            row[f"{part}_item_id"] = generator.integers(0, NUM_ITEMS, size).tolist()
            row[f"{part}_action"] = generator.integers(0, 4, size).tolist()
            row[f"{part}_timestamp"] = times[span].tolist()
        row["history_watch_time"] = generator.integers(0, 100, history).tolist()
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows in the prepared format's types."""
    kinds = {"item_id": pa.int64(), "action": pa.int32(), "timestamp": pa.int64(), "watch_time": pa.int32()}
    fields = [(name, pa.int64()) for name in ("user_id", "country")]
    fields += [(name, pa.list_(kinds[name.split("_", 1)[1]])) for name in rows[0] if name not in ("user_id", "country")]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def dataset_json(splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The content of dataset.json."""
    return {
        "format_version": 1,
        "name": "made_up",
        "num_items": NUM_ITEMS,
        "context_features": {"country": 7},
        "actions": list(ACTIONS),
        "history_features": ["watch_time"],
        "splits": {
            split: {
                "samples": len(rows),
                "history_events": sum(len(row["history_item_id"]) for row in rows),
                "candidates": sum(len(row["candidate_item_id"]) for row in rows),
            }
            for split, rows in splits.items()
        },
        "source": "made up",
        "licence": "none",
    }


def write_dataset(
    folder: Path, *, train: int = 103, evaluation: int = 23, files: int = 3, row_group: int = 7, first_user: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Write a data set of several files and row groups; returns its rows by split, in stored order."""
    splits = {
        "train": made_up_rows(train, seed=1, first_user=first_user),
        "eval": made_up_rows(evaluation, seed=2, first_user=first_user + 10_000),
    }
    for split, rows in splits.items():
        (folder / split).mkdir(parents=True)
        bounds = np.linspace(0, len(rows), files + 1).astype(int)
        for number, (start, end) in enumerate(pairwise(bounds)):
            path = folder / split / f"part-{number}.parquet"
            pq.write_table(table_of(rows[start:end]), path, row_group_size=row_group)
    (folder / "dataset.json").write_text(json.dumps(dataset_json(splits)))
    return splits
