"""Configuration trees as plain values: dotted overrides, dictionaries of JSON values, and how two of them differ.

A configuration is a tree of frozen dataclasses.  This module walks such a tree by its type annotations; it knows no
particular configuration.  `embeddings.records` reads the values back.
"""

import dataclasses
import json
from typing import Any, TypeVar

from embeddings.records import field_types, from_dict, group_of, groups

Config = TypeVar("Config")


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of a key that is not there, which null is not."""


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """Return `config` with each `dotted.key=value` applied, later ones last.

    Values are JSON (`3`, `0.1`, `true`, `null`, `[1, 2]`); text needs no quotes.

    Raises:
        ValueError: a malformed override, an unknown key or a value of the wrong type; one line naming it.
    """
    values = to_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r} is not of the form key=value")
        path = key.split(".")
        parent, kind = values, type(config)
        for depth, name in enumerate(path):
            fields = field_types(kind)
            if name not in fields:
                known = ", ".join(sorted(fields))
                raise ValueError(f"unknown key {key!r}: {'.'.join(path[:depth]) or 'the recipe'} has {known}")
            if depth == len(path) - 1:
                if dataclasses.is_dataclass(fields[name]):
                    raise ValueError(
                        f"key {key!r} names a group, not a value: set one of its keys, as {key}.NAME=value"
                    )
                parent[name] = _parse(text, fields[name])
                continue
            found, where = groups(fields[name]), ".".join(path[: depth + 1])
            if not found:
                raise ValueError(f"unknown key {key!r}: {where} is a value, not a group")
            if parent[name] is None:
                raise ValueError(f"key {key!r}: {where} is null here, set it whole as JSON first")
            parent, kind = parent[name], group_of(parent[name], found, where)
    return from_dict(type(config), values)


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as nested dictionaries of JSON values; `embeddings.records.from_dict` is its inverse."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves of two nested dictionaries that differ, as (dotted key, old value, new value); `ABSENT` where there is no
    such key."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        inner = [found for number, pair in pairs for found in differences(*pair, f"{prefix}[{number}]")]
        # Of a list of values, the whole is told.
        return inner if all(isinstance(each, dict) for each in (*old, *new)) else [(prefix, old, new)] * bool(inner)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix, old, new)]
    found = []
    for name in sorted(set(old) | set(new)):
        found += differences(old.get(name, ABSENT), new.get(name, ABSENT), f"{prefix}.{name}" if prefix else name)
    return found


def _parse(text: str, kind: Any) -> Any:
    """The JSON value that `text` stands for; text that is not JSON, or that a text field takes, is itself."""
    if kind is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
