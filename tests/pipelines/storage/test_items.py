"""Columns of items as other systems write them: the same values whatever their types, or one clear error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.storage.columns import Bags, Values
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.storage.items import read_items
from tests.pipelines.made_up import dataset_json


def read_back(folder: Path, *files: dict[str, pa.Array], word: Any = "number") -> Values:
    """The column `about` of six items, written as these files."""
    (folder / "items").mkdir(parents=True)
    for number, columns in enumerate(files):
        pq.write_table(pa.table(columns), folder / "items" / f"part-{number}.parquet")
    description = dataset_json({}) | {"format_version": 2, "spaces": {"item": {"rows": 6}, "tag": {"rows": 9}}}
    description |= {"event": {"item_id": "item"}, "candidate": {"item_id": "item"}, "item": {"about": word}}
    (folder / "dataset.json").write_text(json.dumps(description))
    info = read_dataset_info(str(folder))
    return read_items(str(folder), info, info.of("item"))["about"]


def test_whole_numbers_are_numbers_and_missing_where_an_item_has_no_row(tmp_path: Path) -> None:
    expected = [np.nan, 7, 3e9, np.nan, 250, np.nan]
    for kind in (pa.int64(), pa.uint32(), pa.float64()):
        about = pa.array([250, 7, 3_000_000_000], kind)
        found = read_back(tmp_path / str(kind), {"item_id": pa.array([4, 1, 2]), "about": about})
        np.testing.assert_array_equal(found, np.array(expected, np.float32))
    # Files of different types, as a column with gaps has where a job writes one file without a gap.
    parts = [{"item_id": pa.array([4, 1]), "about": pa.array([250, 7])}]
    parts.append({"item_id": pa.array([2, 5]), "about": pa.array([3e9, None])})
    np.testing.assert_array_equal(read_back(tmp_path / "mixed", *parts), np.array(expected, np.float32))


def test_files_whose_lists_have_offsets_of_two_widths(tmp_path: Path) -> None:
    parts = [{"item_id": pa.array([4, 1]), "about": pa.array([[3, 5], []], pa.large_list(pa.int64()))}]
    parts.append({"item_id": pa.array([2]), "about": pa.array([[8]])})
    found = read_back(tmp_path / "d", *parts, word=["tag"])
    assert isinstance(found, Bags)
    assert found.values.tolist() == [8, 3, 5]
    assert found.lens().tolist() == [0, 0, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("item_id", "about", "message"),
    [
        (pa.array([1.5, 2.0]), pa.array([1, 2]), "column item_id must have the type int64, got double"),
        (pa.array(["1", "2"]), pa.array([1, 2]), "column item_id must have the type int64, got string"),
        (pa.array([1, None]), pa.array([1, 2]), "column item_id holds missing values"),
        (pa.array([1, 6]), pa.array([1, 2]), r"item_id 1 to 6, outside \[0, 6\)"),
        (pa.array([1, 1]), pa.array([1, 2]), "an item_id stands in two rows"),
        (pa.array([1, 2]), pa.array([1, np.inf], pa.float16()), "about of row 1 is infinite"),
    ],
)
def test_what_no_item_can_be_is_refused(tmp_path: Path, item_id: pa.Array, about: pa.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_back(tmp_path / "d", {"item_id": item_id, "about": about})
