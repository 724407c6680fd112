"""Parquet files with a checksum a page: what a disk or a copy has changed is refused, not trained on.

Without them, four of five flipped bits read as other values: the compression notices few.  A footer has none; it says
where pages lie, and most changes of it end the reading.  Files without checksums, as other programs write them, are
read all the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs


def checked_writer(path: Path, schema: pa.Schema, **options: Any) -> pq.ParquetWriter:
    """A new file whose pages have checksums; `options` are the writer's."""
    return pq.ParquetWriter(path, schema, write_page_checksum=True, **options)


def open_checked(
    file: str, filesystem: fs.FileSystem | None = None, metadata: pq.FileMetaData | None = None, **options: Any
) -> pq.ParquetFile:
    """A file whose checksums are compared where it is read; `metadata` spares reading its footer again.  To be opened
    and read within `readable`."""
    return pq.ParquetFile(file, filesystem=filesystem, metadata=metadata, page_checksum_verification=True, **options)


@contextmanager
def readable(file: object) -> Iterator[None]:
    """Where a Parquet file is opened or read.

    Raises:
        ValueError: it is not there, or not what was written; names it.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: copy or prepare the data set again") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read, perhaps truncated or damaged: {error}") from error
