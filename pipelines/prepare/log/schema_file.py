"""The file of `prepare event_log --schema FILE.toml`: what a log's columns mean, in TOML.

A column's value says what it is, as in `dataset.json`: "number", the name of a space (one id), or [space] (many ids); a
table says more: `{ of = ["tag"], column = "tags", separator = "|" }`.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipelines.features import NUMBER, Part
from pipelines.prepare.log.schema import Attributes, LogColumn, LogSchema, SpaceOptions

TEXTS = (
    "user",
    "item",
    "time",
    "time_unit",
    "action_separator",
    "request",
    "sequence",
    "weight",
    "keep_rate",
    "where",
    "encoding",
    "decimal",
)
"""Keys that hold text; `actions`, `action_values` and `missing` hold lists of text."""
ROW_PARTS: tuple[Part, ...] = ("sample", "event", "candidate", "label")
"""Parts whose columns the log's rows hold; those of `users` and `items` are in files of their own."""
KEYS = (*TEXTS, "actions", "action_values", "missing", *ROW_PARTS, "users", "items", "spaces")


def read_schema(path: Path) -> LogSchema:
    """What the file says.

    Raises:
        ValueError: the file is missing or no TOML, or a key is unknown, missing or of the wrong kind; the message names
            file and key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--schema {path} cannot be read: {error}") from error
    try:
        return _schema(values)
    except ValueError as error:
        raise ValueError(f"--schema {path}: {error}") from error


def _schema(values: Mapping[str, Any]) -> LogSchema:
    _check_keys(values, KEYS, "the file")
    texts: dict[str, Any] = {key: _text(values[key], key) for key in TEXTS if key in values}
    lacking = [key for key in ("user", "item", "time", "actions") if key not in values]
    if lacking:
        raise ValueError(f"{', '.join(lacking)} must be given")
    columns = {part: _columns(values.get(part, {}), part) for part in ROW_PARTS}
    # What an event says of its request, a candidate of the same request has, too.
    columns["candidate"] += tuple(
        column
        for column, entry in zip(columns["event"], values.get("event", {}).values(), strict=True)
        if isinstance(entry, dict) and entry.get("request", False)
    )
    columns["label"] += tuple(
        LogColumn(name=texts[key], column=texts[key], kind="number")
        for key in ("weight", "keep_rate")
        if key in texts and texts[key] not in {column.name for column in columns["label"]}
    )
    optional: dict[str, Any] = {"missing_texts": _texts(values["missing"], "missing")} if "missing" in values else {}
    return LogSchema(
        **texts,
        **optional,
        actions=_texts(values["actions"], "actions"),
        action_values=_texts(values.get("action_values", []), "action_values"),
        columns=columns,
        users=_attributes(values["users"], "users", texts["user"]) if "users" in values else None,
        items=_attributes(values["items"], "items", texts["item"]) if "items" in values else None,
        spaces={name: _space(entry, name) for name, entry in _table(values.get("spaces", {}), "spaces").items()},
    )


def _columns(entries: Any, part: str) -> tuple[LogColumn, ...]:
    """The columns of a part, or of a file of attributes."""
    return tuple(_column(name, entry, part) for name, entry in _table(entries, part).items())


def _column(name: str, entry: Any, part: str) -> LogColumn:
    where = f"column {name} of {part}"
    more = {"of": entry} if not isinstance(entry, dict) else entry
    _check_keys(more, ("of", "column", "separator", *["request"] * (part == "event")), where)
    of = more.get("of")
    many = isinstance(of, list) and len(of) == 1
    space = of[0] if isinstance(of, list) and many else of
    if not isinstance(space, str) or not space or (many and space == NUMBER):
        raise ValueError(f"{where} must be {NUMBER!r}, a space's name or [name], got {of!r}")
    if not isinstance(more.get("request", False), bool):
        raise ValueError(f"{where}: request must be true or false, got {more['request']!r}")
    if "separator" in more and not many:
        raise ValueError(f"{where}: a separator divides many ids; say of = [{space!r}]")
    return LogColumn(
        name=name,
        column=_text(more.get("column", name), f"{where}: column"),
        kind="ids" if many else "number" if space == NUMBER else "id",
        space=None if space == NUMBER else space,
        separator=_text(more["separator"], f"{where}: separator") if "separator" in more else None,
    )


def _attributes(entry: Any, name: str, key: str) -> Attributes:
    values = _table(entry, name)
    _check_keys(values, ("files", "key", "columns"), name)
    if "files" not in values or not values.get("columns"):
        raise ValueError(f"{name} must give files and columns")
    return Attributes(
        files=_text(values["files"], f"{name}.files"),
        key=_text(values.get("key", key), f"{name}.key"),
        columns=_columns(values["columns"], f"{name}.columns"),
    )


def _space(entry: Any, name: str) -> SpaceOptions:
    values = _table(entry, f"spaces.{name}")
    kinds = {field.name: bool if field.name in ("hash", "unbounded") else int for field in fields(SpaceOptions)}
    _check_keys(values, tuple(kinds), f"spaces.{name}")
    for key, value in values.items():
        if type(value) is not kinds[key]:
            raise ValueError(f"spaces.{name}.{key} must be of type {kinds[key].__name__}, got {value!r}")
    try:
        return SpaceOptions(**values)
    except ValueError as error:
        raise ValueError(f"spaces.{name}: {error}") from error


def _check_keys(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(known)}")


def _table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a table, got {value!r}")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be text, got {value!r}")
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    """A list of text; one text alone is a list of one."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise ValueError(f"{key} must be a list of text, got {value!r}")
    return tuple(_text(each, key) for each in values)
