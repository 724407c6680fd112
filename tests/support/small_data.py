"""A few hundred samples of the shipped data set, for tests whose subject is not the data: they evaluate in a second."""

import json
import shutil
import tempfile
from atexit import register
from functools import cache
from pathlib import Path

import pyarrow.parquet as parquet

SOURCE = Path(__file__).resolve().parents[2] / "data" / "kuairand_sample"
SAMPLES = {"train": 600, "eval": 200}


@cache
def small_dataset() -> Path:
    """The folder of the first samples of each split; written once a process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="longview-small-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    description = json.loads((SOURCE / "dataset.json").read_text())
    for split, num_samples in SAMPLES.items():
        table = parquet.read_table(sorted((SOURCE / split).glob("*.parquet"))[0]).slice(0, num_samples)
        (folder / split).mkdir()
        parquet.write_table(table, folder / split / "part-00000.parquet")
        description["splits"][split] = {
            "samples": table.num_rows,
            "history_events": len(table["history_item_id"].combine_chunks().flatten()),
            "candidates": len(table["candidate_item_id"].combine_chunks().flatten()),
        }
    shutil.copytree(SOURCE / "items", folder / "items")
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
