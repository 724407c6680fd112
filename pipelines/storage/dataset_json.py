"""Reads a prepared data set's `dataset.json`, from a disk or an object store."""

import json
from pathlib import PurePosixPath

import pyarrow as pa
from pyarrow import fs

from pipelines.features import DatasetInfo, parse_dataset_info

DATASET_FILE = "dataset.json"


def open_filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a local path or of an s3://, gs:// or hdfs:// address, and the path within it.

    Raises ValueError if the address cannot be opened.
    """
    if "://" in path:
        try:
            filesystem, inner = fs.FileSystem.from_uri(path)
        except (pa.ArrowException, OSError) as error:
            # Without Java, the rest are the hundred places where it was sought.
            reason = str(error).splitlines()[0]
            needs = "; hdfs:// needs Hadoop's client: JAVA_HOME, HADOOP_HOME and CLASSPATH (hadoop classpath --glob)"
            raise ValueError(f"{path} cannot be opened: {reason}{needs * path.startswith('hdfs://')}") from error
        return filesystem, inner
    return fs.LocalFileSystem(), path


def read_dataset_info(path: str) -> DatasetInfo:
    """Read `dataset.json` of the prepared data set at `path`.

    Raises ValueError, naming the file, if it is missing, is not JSON or lacks a field.
    """
    filesystem, folder = open_filesystem(path)
    name = str(PurePosixPath(folder) / DATASET_FILE)
    if filesystem.get_file_info(name).type != fs.FileType.File:
        raise ValueError(f"{name} does not exist: data.path must be a folder written by `python -m pipelines.prepare`")
    with filesystem.open_input_stream(name) as stream:
        text = stream.read().decode("utf-8", errors="replace")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    return parse_dataset_info(values, name)
