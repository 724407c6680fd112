"""Objects in a log's files: their fields as columns, and the types in which values of JSON are read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import duckdb
from duckdb.sqltypes import DuckDBPyType

from pipelines.prepare.engine import execute, literal, quoted
from pipelines.prepare.log.readings import NULL, TEXT

MIXED = "JSON"
"""The engine's type of a field of JSON whose values differ in kind from line to line."""
MOST_FIELDS = 2000
"""An object of JSON lines with more fields is no row and no part of one, but a dictionary."""


def fields_of(name: str, value: str, kind: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(OBJECT.FIELD, (SQL, SQL type)) of a value's fields and theirs, if it is an object, or a list of such."""
    described = kind.removesuffix("[]")
    many = described != kind
    if not described.startswith("STRUCT(") or described.endswith("]"):
        return
    for child, field in _children(duckdb.sqltype(described)):
        full, found, sql = f"{name}.{child}", str(field), f"struct_extract({value}, {literal(child)})"
        if many:
            found += "[]"
            sql = f"list_transform({value}, lambda element: struct_extract(element, {literal(child)}))"
        yield full, (sql, found)
        yield from fields_of(full, sql, found)


def json_columns(connection: duckdb.DuckDBPyConnection, file: str, path: Path) -> list[tuple[str, str]]:
    """(name, SQL type) of the fields of all rows of a file of JSON lines, as they are written; those alike but for
    large and small letters have one type.

    Args:
        file: the file, or its copy without compression, as SQL.
        path: the file, for messages.

    Raises:
        ValueError: fields of an object within are so alike, or the file cannot be read.
    """
    sql = (
        f"read_json({file}, format = 'newline_delimited', hive_partitioning = false, sample_size = -1, "
        f"map_inference_threshold = {MOST_FIELDS}, field_appearance_threshold = 0)"
    )
    try:
        rows = execute(connection, f"DESCRIBE SELECT * FROM {sql}", path)
    except duckdb.NotImplementedException as error:
        reason = str(error).split(", try ")[0].removeprefix("Not implemented Error: ")
        raise ValueError(
            f"{path}: fields of one object differ in large and small letters alone ({reason}): write one name"
        ) from error
    columns = {name: as_text(duckdb.sqltype(kind)) for name, kind, *_ in rows}
    if not any(_is_numbered(name, columns) for name in columns):
        return list(columns.items())
    keys = f"SELECT DISTINCT unnest(json_keys(json)) FROM read_json_objects({file}, format = 'newline_delimited')"
    written = sorted(name for (name,) in execute(connection, keys, path))
    types = {name.lower(): kind for name, kind in columns.items()}
    return [(name, types[name.lower()]) for name in sorted(written, key=lambda name: name not in columns)]


def _is_numbered(name: str, names: Iterable[str]) -> bool:
    """Whether a name may be the engine's, of a field like one of these but for large and small letters."""
    begin, _, number = name.rpartition("_")
    return number.isdigit() and begin.lower() in {each.lower() for each in names}


def as_text(kind: DuckDBPyType) -> str:
    """The type that reads every value within lists and objects of a JSON file as text; `NULL` where there is none."""
    if kind.id == "list":
        [(_, element)] = _children(kind)
        return (TEXT if str(element) == NULL else as_text(element)) + "[]"
    if str(kind) in (MIXED, NULL):
        return str(kind)
    if kind.id == "struct":
        return f"STRUCT({', '.join(f'{quoted(name)} {as_text(field)}' for name, field in _children(kind))})"
    return str(kind) if kind.id == "map" else TEXT


def read_as(kind: str) -> str:
    """The type in which a column or field of this type is read."""
    return f"{TEXT}{kind.removeprefix(MIXED)}" if kind in (MIXED, f"{MIXED}[]") else kind


def read_value(name: str, value: str, kind: str) -> str:
    """SQL of a value in the type in which it is read: of numbers beside texts, text.

    Objects among those are refused as they are read: {"id": 7} and 7 would be two keys of one.
    """
    if read_as(kind) == kind:
        return value
    if kind.endswith("[]"):
        return f"list_transform({value}, lambda element: {read_value(name, 'element', kind.removesuffix('[]'))})"
    what = literal(
        f"Expected values of one kind in {name}, some lines have objects or lists there: write all in one way"
    )
    return f"CASE WHEN json_type({value}) IN ('OBJECT', 'ARRAY') THEN error({what}) ELSE {value} ->> '$' END"


def _children(kind: DuckDBPyType) -> list[tuple[str, DuckDBPyType]]:
    """Names and types of what a list or an object holds."""
    return [(name, cast(DuckDBPyType, child)) for name, child in kind.children]
