"""Objects in a log's files: their fields as columns, and the types in which values of JSON are read."""

from collections.abc import Iterator
from typing import cast

import duckdb
from duckdb.sqltypes import DuckDBPyType

from pipelines.prepare.engine import literal, quoted
from pipelines.prepare.log.readings import TEXT

MIXED = "JSON"
"""The engine's type of a field of JSON whose values differ in kind from line to line."""


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


def as_text(kind: DuckDBPyType) -> str:
    """The type that reads every value within lists and objects of a JSON file as text."""
    if kind.id == "list":
        [(_, element)] = _children(kind)
        return as_text(element) + "[]"
    if str(kind) == MIXED:
        return MIXED
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
