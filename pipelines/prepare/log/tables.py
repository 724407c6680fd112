"""Tables of a described log: what is read of each file into them, and as which types.

raw     log_row, user_key, item_key, rank (the time in nanoseconds), request_key, action, a column a `raw_name`, and
        `sequence`, if there is one
users_attributes, items_attributes    log_row, key, a column a `raw_name`
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from pipelines.features import ITEM_SPACE
from pipelines.prepare.log.files import LogFile
from pipelines.prepare.log.readings import (
    NULL,
    TEXT,
    IdType,
    Reading,
    Rule,
    Stored,
    id_type,
    read_flag,
    read_id,
    read_ids,
    read_number,
    read_words,
)
from pipelines.prepare.log.schema import Attributes, LogColumn, LogSchema
from pipelines.prepare.log.times import read_time
from pipelines.prepare.source import USER_SPACE

Read = Callable[[LogFile], Reading]
Columns = Mapping[str, tuple[str, Read]]
"""(SQL type, how a file's value is read) by name."""
RAW, USERS, ITEMS = "raw", "users_attributes", "items_attributes"
"""Names of the tables in the database."""
REQUEST, ACTION, SEQUENCE = "request.", "action.", "sequence."
"""What the types of requests, actions' words and sequences are found under: with a dot, so no space is called so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSources:
    """The files of a described log."""

    log: Sequence[LogFile]
    """Files of the log, one row an event."""
    users: Sequence[LogFile] = ()
    """Files of users' attributes, one row a user."""
    items: Sequence[LogFile] = ()
    """Files of items' attributes, one row an item."""


def raw_name(column: LogColumn) -> str:
    """The name that a column has in the database: it is read once, however many parts have it."""
    return ".".join((column.kind, column.space or "", column.column))


def log_columns(schema: LogSchema) -> list[LogColumn]:
    """The columns that the log's rows hold, each once."""
    columns = {raw_name(column): column for part in schema.columns.values() for column in part}
    return list(columns.values())


def needed_columns(schema: LogSchema) -> list[str]:
    """The columns that every file of the log must have: without them, no row is an event with its labels."""
    named = (schema.user, schema.item, schema.time, *schema.actions, schema.request, schema.sequence)
    columns = [*named, *(column.column for column in schema.of("label"))]
    return [name for name in dict.fromkeys(columns) if name is not None]


def optional_columns(schema: LogSchema) -> list[str]:
    """The columns that may come later than the log's first files, or be those of some events alone."""
    columns = dict.fromkeys(column.column for column in log_columns(schema))
    return [name for name in columns if name not in needed_columns(schema)]


def check_columns(schema: LogSchema, sources: LogSources) -> None:
    """Raise ValueError if a file lacks a column of the description."""
    for file in sources.log:
        file.require([*needed_columns(schema), *optional_columns(schema)])
    for attributes, files in ((schema.users, sources.users), (schema.items, sources.items)):
        for file in files:
            assert attributes is not None
            file.require([attributes.key, *(column.column for column in attributes.columns)])


def space_types(schema: LogSchema, sources: LogSources, stored: Iterable[tuple[str, Stored]] = ()) -> dict[str, IdType]:
    """The type in which the ids of each space are read: one that all its columns in all files have in common.

    `stored` are columns of keys that have ids already.
    """
    found: dict[str, list[Stored]] = {}
    for space, column in chain(stored, _keys(schema, sources)):
        found.setdefault(space, []).append(column)
    return {space: id_type(columns) for space, columns in found.items()}


def _keys(schema: LogSchema, sources: LogSources) -> Iterator[tuple[str, Stored]]:
    """Every column with keys in every file, and its space."""
    for file in sources.log:
        yield USER_SPACE, file.stored(schema.user)
        yield ITEM_SPACE, file.stored(schema.item)
        if schema.request is not None:
            yield REQUEST, file.stored(schema.request)
        if schema.sequence is not None:
            yield SEQUENCE, file.stored(schema.sequence)
        if schema.action_values:
            yield ACTION, file.stored(schema.actions[0]).element
        yield from _column_keys(file, log_columns(schema))
    for attributes, files, space in (
        (schema.users, sources.users, USER_SPACE),
        (schema.items, sources.items, ITEM_SPACE),
    ):
        for file in files:
            assert attributes is not None
            yield space, file.stored(attributes.key)
            yield from _column_keys(file, attributes.columns)


def _column_keys(file: LogFile, columns: Sequence[LogColumn]) -> Iterator[tuple[str, Stored]]:
    for column in columns:
        if column.space is not None:
            stored = file.stored(column.column)
            if column.kind == "ids":
                stored = stored.element if stored.is_list or stored.type == NULL else replace(stored, type=TEXT)
            yield column.space, stored


def raw_columns(schema: LogSchema, types: Mapping[str, IdType]) -> Columns:
    """The table of the log's rows."""
    texts = schema.missing_texts

    def key(name: str, space: str) -> tuple[str, Read]:
        return types[space].name, lambda file: read_id(file.stored(name), types[space], texts, required=True)

    return {
        "user_key": key(schema.user, USER_SPACE),
        "item_key": key(schema.item, ITEM_SPACE),
        "rank": ("BIGINT", lambda file: read_time(file.stored(schema.time), schema.time_unit)),
        "request_key": ("UBIGINT", lambda file: _read_request(file, schema, types)),
        "action": ("INTEGER", lambda file: _read_actions(file, schema, types)),
        **({"sequence": key(schema.sequence, SEQUENCE)} if schema.sequence is not None else {}),
        **_read_columns(log_columns(schema), types, schema, {column.column for column in schema.of("label")}),
    }


def attribute_columns(attributes: Attributes, space: str, schema: LogSchema, types: Mapping[str, IdType]) -> Columns:
    """The table of one kind of attributes."""

    def read_key(file: LogFile) -> Reading:
        return read_id(file.stored(attributes.key), types[space], schema.missing_texts, required=True)

    return {"key": (types[space].name, read_key), **_read_columns(attributes.columns, types, schema)}


def _read_columns(
    columns: Sequence[LogColumn], types: Mapping[str, IdType], schema: LogSchema, labels: Container[str] = ()
) -> Columns:
    """What columns of all kinds are read as; `labels` are those of which no value may be missing."""
    texts = schema.missing_texts

    def entry(column: LogColumn) -> tuple[str, Read]:
        name = column.column
        if column.space is None:
            rules = _label_rules(column, schema) if name in labels else ()
            return "DOUBLE", lambda file: _with_rules(read_number(file.stored(name), texts, schema.decimal), rules)
        target, required = types[column.space], name in labels
        if column.kind == "ids":
            return f"{target.name}[]", lambda file: read_ids(file.stored(name), target, texts, column.separator)
        return target.name, lambda file: read_id(file.stored(name), target, texts, required=required)

    return {raw_name(column): entry(column) for column in columns}


def _with_rules(reading: Reading, conditions: Sequence[tuple[str, str, str]]) -> Reading:
    """A reading whose value must also keep conditions, given as (SQL behind the value, text, column)."""
    rules = tuple(
        Rule(condition=f"({reading.value}) {condition}", text=text, column=column)
        for condition, text, column in conditions
    )
    return replace(reading, rules=(*reading.rules, *rules))


def _label_rules(column: LogColumn, schema: LogSchema) -> list[tuple[str, str, str]]:
    """What a label, a weight and a keep rate must be."""
    name = column.column
    if name == schema.weight:
        return [(">= 0", f"weight {name} must not be negative or missing", name)]
    if name == schema.keep_rate:
        return [("BETWEEN 1e-9 AND 1", f"keep rate {name} must lie above 0 and at most at 1, not missing", name)]
    return [("IS NOT NULL", f"label {name} must not be missing", name)]


def _read_request(file: LogFile, schema: LogSchema, types: Mapping[str, IdType]) -> Reading:
    """What tells requests apart, null where none is known."""
    if schema.request is None:
        return Reading(value="NULL::UBIGINT")
    reading = read_id(file.stored(schema.request), types[REQUEST], schema.missing_texts)
    key = f"({reading.value})"
    return replace(reading, value=f"CASE WHEN {key} IS NOT NULL THEN hash({key}::VARCHAR) END")


def _read_actions(file: LogFile, schema: LogSchema, types: Mapping[str, IdType]) -> Reading:
    """The bits of all actions."""
    if schema.action_values:
        stored = file.stored(schema.actions[0])
        return read_words(stored, types[ACTION], schema.action_values, schema.action_separator)
    flags = [read_flag(file.stored(name)) for name in schema.actions]
    bits = " + ".join(f"(({flag.value}) << {bit})" for bit, flag in enumerate(flags))
    return Reading(value=bits, rules=tuple(rule for flag in flags for rule in flag.rules))
