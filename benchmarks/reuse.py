"""How few rows of KuaiRand's tables are touched between checkpoints, and what does a delta hold of them?

Run: python -m benchmarks.reuse [--data data/kuairand_sample] [--history 256] [--dim 64] [--json FILE]

The training samples are read in the trainer's order, one pass, with the candidates and the newest events of each.  At
ever more samples since a full checkpoint: the lookups of the tables of videos and users by row, the rows that were
touched, and the bytes of a delta beside those of a full checkpoint (rows of `--dim` float32 with row-wise Adagrad's
state, as the checkpoints' format stores them).  Beside each: the rows that as many lookups of Zipf-distributed ids with
exponent 1.05 touch, by expectation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.config import DataConfig
from pipelines.features import ITEM_ID, USER_ID
from pipelines.reading.loader import build_loader, dataset_info
from pipelines.selection import select

ZIPF = 1.05
BATCH = 16
NUMBER_BYTES = 8
"""Bytes of a row's number in a delta."""
STATE_BYTES = 4
"""Bytes that row-wise Adagrad keeps of a row."""


class Table:
    """The rows of one table that have been looked up."""

    def __init__(self, rows: int) -> None:
        self.touched = np.zeros(rows, dtype=np.bool_)
        self.lookups = 0

    def look_up(self, ids: npt.NDArray[np.int64]) -> None:
        """One batch's."""
        self.touched[ids] = True
        self.lookups += len(ids)

    def found(self) -> dict[str, float]:
        """What is known of it now."""
        rows = len(self.touched)
        return {
            "lookups_a_row": self.lookups / rows,
            "rows_touched": float(self.touched.mean()),
            "zipf_rows_touched": zipf_touched(rows, self.lookups),
        }

    def num_bytes(self, dim: int) -> tuple[int, int]:
        """(of a delta now, of a full checkpoint): rows and their state, each with the rows' numbers or all of them."""
        rows, touched, sizes = len(self.touched), int(self.touched.sum()), (4 * dim, STATE_BYTES)
        return sum(min((size + NUMBER_BYTES) * touched, size * rows) for size in sizes), sum(sizes) * rows


def zipf_touched(rows: int, lookups: int) -> float:
    """The part of the rows that so many independent lookups touch."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -ZIPF
    return float(-np.expm1(lookups * np.log1p(-weights / weights.sum())).mean())


def measure(data: str, history: int, dim: int) -> list[dict[str, Any]]:
    """A row for each number of samples, which doubles, and one for the whole pass."""
    config = DataConfig(path=data, global_batch_size=BATCH, max_history_len=history, reader_threads=0)
    info = dataset_info(config)
    selection = select(info, event=(ITEM_ID,), candidate=(ITEM_ID,), context=(USER_ID,))
    tables = {feature.name: Table(info.spaces[feature.space].rows) for feature in selection.features if feature.space}
    found, samples, due = [], 0, BATCH

    def add() -> None:
        deltas, fulls = zip(*(table.num_bytes(dim) for table in tables.values()), strict=True)
        known = {name: table.found() for name, table in tables.items()}
        found.append({"samples": samples, "share_of_full_bytes": sum(deltas) / sum(fulls), "tables": known})

    for batch in build_loader(config, split="train", rank=0, world_size=1, selection=selection):
        for name, table in tables.items():
            table.look_up(batch.inputs.ids_host(name).numpy())
        samples += len(batch.inputs.num_candidates)
        if samples >= due:
            add()
            due *= 2
    add()
    return found


def main() -> None:
    """Prints and writes a row for each number of samples."""
    parser = argparse.ArgumentParser(description="Rows touched between checkpoints.")
    parser.add_argument("--data", default="data/kuairand_sample")
    parser.add_argument("--history", type=int, default=256, help="newest events of a sample")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/reuse.json"))
    arguments = parser.parse_args()
    rows = measure(arguments.data, arguments.history, arguments.dim)
    for row in rows:
        shown = (
            f"{name} {table['lookups_a_row']:6.2f} lookups a row touch {table['rows_touched']:6.1%} (Zipf "
            f"{table['zipf_rows_touched']:6.1%})"
            for name, table in row["tables"].items()
        )
        print(f"{row['samples']:7} samples: {row['share_of_full_bytes']:6.1%} of the bytes; " + "; ".join(shown))
    name = dataset_info(DataConfig(path=arguments.data, global_batch_size=1, max_history_len=1)).name
    settings = {"data": name, "history": arguments.history, "dim": arguments.dim}
    arguments.json.write_text(json.dumps(settings | {"found": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
