"""Dataclasses from the values of JSON files: every key and type checked against the annotations.

Where an annotation is a union of dataclasses, each has a field `kind`, a Literal with a default, that tells them apart.
Standard library only.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union

Record = TypeVar("Record")


def from_dict(kind: type[Record], values: dict[str, Any], prefix: str = "") -> Record:
    """Build the dataclass `kind` from nested dictionaries of JSON values, checking every key and type.

    Raises:
        ValueError: a missing or unknown key, a value of the wrong type, or a value that the dataclass refuses.
    """
    fields = field_types(kind)
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"unknown key {prefix + unknown[0]!r}: known are {', '.join(sorted(fields))}")
    arguments = {name: _convert(value, fields[name], prefix + name) for name, value in values.items()}
    required = {
        field.name
        for field in dataclasses.fields(kind)  # type: ignore[arg-type]  # every caller passes a dataclass
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(arguments))
    if missing:
        raise ValueError(f"key {prefix + missing[0]!r} is missing")
    return kind(**arguments)


def field_types(kind: Any) -> dict[str, Any]:
    return _field_types(kind)


@lru_cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def groups(kind: Any) -> list[Any]:
    """The dataclasses that values of `kind` may be."""
    choices = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [choice for choice in choices if dataclasses.is_dataclass(choice)]


def group_of(values: dict[str, Any], groups: list[Any], key: str) -> Any:
    """The one of `groups` that `values` are of: the only one, or that of their `kind`."""
    if len(groups) == 1:
        return groups[0]
    by_kind = {typing.get_args(field_types(group)["kind"])[0]: group for group in groups}
    if values.get("kind") not in by_kind:
        raise ValueError(f"key '{key}.kind' must be one of {', '.join(by_kind)}, got {json.dumps(values.get('kind'))}")
    return by_kind[values["kind"]]


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as the annotated type `kind`; raises ValueError naming `key` when it is not one."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value, key + ".")  # type: ignore[arg-type]  # an annotation names a class
    if origin in (Union, types.UnionType):
        return _convert_union(value, choices, key)
    if origin is Literal and value in choices and not isinstance(value, bool):
        return value
    if origin is tuple and isinstance(value, list):
        if len(choices) == 2 and choices[1] is Ellipsis:
            return tuple(_convert(item, choices[0], f"{key}[{index}]") for index, item in enumerate(value))
        if len(choices) == len(value):
            return tuple(
                _convert(item, choice, f"{key}[{i}]")
                for i, (item, choice) in enumerate(zip(value, choices, strict=True))
            )
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {name: _convert(item, choices[1], f"{key}.{name}") for name, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is type(None) and value is None:
        return None
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"key {key!r} must be a finite number, got {value}")
    if kind in (int, float, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"key {key!r} must be {_describe(kind)}, got {json.dumps(value)}")


def _convert_union(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    groups = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if groups and isinstance(value, dict):
        return from_dict(group_of(value, groups, key), value, key + ".")
    for choice in choices:
        try:
            return _convert(value, choice, key)
        except ValueError:
            continue
    kinds = " or ".join(_describe(choice) for choice in choices)
    raise ValueError(f"key {key!r} must be {kinds}, got {json.dumps(value)}")


def _describe(kind: Any) -> str:
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in choices)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in choices)
    if origin is tuple:
        return f"a list (each {_describe(choices[0])})"
    return names.get(kind, f"a group of keys ({getattr(kind, '__name__', kind)})")
