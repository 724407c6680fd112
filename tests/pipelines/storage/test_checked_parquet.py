"""What a disk or a copy has changed in prepared data is refused where it is read, and named."""

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.storage.checked_parquet import open_checked, readable
from tests.pipelines.prepare.test_prepare import prepare, read_back, write_kuairand


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    write_kuairand(folder / "in")
    options = ("--candidates", "4", "--samples-per-user", "0", "--max-history", "9", "--row-group-events", "50")
    assert prepare("kuairand", folder / "in", folder / "out", *options) == 0
    return folder / "out"


def test_a_flipped_bit_of_any_page_changes_no_value(prepared: Path) -> None:
    """Of samples, of columns of items, and of keys."""
    files, chance = sorted(prepared.rglob("*.parquet")), random.Random(5)
    assert {file.parent.name for file in files} >= {"train", "eval", "items", "out"}
    for file in files:
        whole, content, refused = str(pq.read_table(file).to_pydict()), file.read_bytes(), 0
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        for _ in range(15):
            bit = chance.randrange(8 * footer)
            file.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
            try:
                with readable(file):
                    found = open_checked(str(file)).read()
            except ValueError as error:
                refused += str(file) in str(error)
            else:
                assert str(found.to_pydict()) == whole, f"bit {bit} of {file} changed a value"  # NaN is NaN
        file.write_bytes(content)
        assert refused, "no page has a checksum"


def test_reading_samples_names_the_file_whose_page_has_changed(prepared: Path) -> None:
    file = next((prepared / "train").glob("*.parquet"))
    content, group = file.read_bytes(), pq.ParquetFile(file).metadata.row_group(0)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "user_id")
    at = column.data_page_offset + column.total_compressed_size - 3
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    try:
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read, perhaps truncated or damaged"):
            read_back(prepared)
    finally:
        file.write_bytes(content)
