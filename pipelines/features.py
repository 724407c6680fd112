"""What a data set holds: spaces of ids and the columns of samples, events, candidates, items and labels.

`dataset.json` states it once; storage, validation, batches, tables, encoder and costs all follow it.  Standard library
only.

    space    a set of ids, [0, rows): a vocabulary that is only ever appended to, or a hash.  Id 0 is the unknown one:
             missing, too rare, or not seen before; its row is trained like any other.  A space becomes one table.
             Or an unbounded set: any 64-bit key but 0 is an id, and training decides which of them have the rows.
    column   one value an event, candidate, sample, item or label: an id of a space, many ids, or a number.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from pipelines.known_numbers import NumberStatistics, parse_statistics

FORMAT_VERSION = 2
ITEM_ID = "item_id"
"""The column that every event and candidate has: what it is about."""
USER_ID = "user_id"
"""The column that every sample has: whose it is.  A feature only where `sample` lists it with a space."""
ITEM_SPACE = "item"
"""The space of `item_id`."""
FIRST_PART = "."
"""The part whose files lie in the folder of a split itself."""
UNKNOWN_ID = 0
"""The id of what is missing, too rare or new, in every space."""
UNKNOWN_TIME = -1
"""Timestamp of an event whose time is not known; such events come first in a history."""
MAX_ACTIONS = 31
"""Bits of an action mask, a positive int32."""
LENGTH_COLUMNS = ("history_length", "num_candidates")
"""Optional int32 columns with the lengths of a row's lists: with them, ranks balance without reading the lists."""
TAKEN = ("action", "timestamp", "length")
"""Names that every event and candidate uses already, so that no column may have them."""
NUMBER = "number"
"""The word for a column of numbers in `dataset.json`, so no space may be called so."""
TEXT_KEYS, NUMBER_KEYS = KEY_KINDS = ("text", "number")
"""What unbounded keys are."""

Part = Literal["sample", "event", "candidate", "item", "label"]
"""What a column's values belong to."""
Kind = Literal["id", "ids", "number"]
"""One id of a space; any number of them; a number, NaN where it is missing."""

Cut = Literal["by_time", "by_place"]
"""Where a sample's history ends: strictly before its first candidate's time, or before its place in the order."""

Clock = Literal["unix", "relative"]
"""Seconds since 1970, or since an unstated beginning."""

PREFIXES: Mapping[str, str] = {
    "sample": "",
    "event": "history_",
    "candidate": "candidate_",
    "item": "",
    "label": "label_",
}
"""What stands before a column's name in Parquet, by part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """A set of ids, and the table that they are looked up in."""

    name: str
    """Unique name; also the table's, so it holds no dot or slash."""
    rows: int
    """Ids lie in [0, rows); rows above `used` are room to grow."""
    used: int
    """Ids in [0, used) have been given; equal to `rows` for a hash."""
    keys: str | None = None
    """Parquet file within the data set: the key behind each id, in order of ids."""
    digest: str | None = None
    """Digest of the keys in the order of ids: two data sets with the same one mean the same by an id."""
    hash: str | None = None
    """The function from keys to ids, in place of a file of keys."""
    unbounded: bool = False
    """Ids are any 64-bit keys, 0 for the unknown one; `rows` is then how many of them have a row at a time, with the
    row that the others share."""
    key_kind: str | None = None
    """What unbounded keys are, one of `KEY_KINDS`, where it is known: the text 7 is another key than the number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One value of every sample, event, candidate, item or label."""

    name: str
    """Name, unique within its part."""
    part: Part
    """What the values belong to."""
    kind: Kind
    """What its values are: ids, numbers or bits."""
    space: str | None = None
    """The ids' space; None for numbers."""
    statistics: NumberStatistics | None = None
    """Statistics of a column of numbers, where the preparation counted them."""

    @property
    def stored(self) -> str:
        """The column's name in Parquet."""
        return PREFIXES[self.part] + self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """Sizes of one split."""

    samples: int
    """Samples, which are rows of its files."""
    history_events: int
    """Events in all histories."""
    candidates: int
    """Labelled candidates."""
    files: int | None = None
    """Parquet files, where this was counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """What a model and a reader must know of a prepared data set."""

    name: str
    """Short name of the data set."""
    spaces: Mapping[str, Space]
    """Spaces of ids by name."""
    columns: tuple[Column, ...]
    """All columns, those of a part in the order of `dataset.json`; `item_id` of events and candidates included."""
    actions: tuple[str, ...]
    """Name of each bit of an action mask, lowest bit first."""
    weight: str | None = None
    """The label column of numbers that multiplies a candidate's loss; None weighs all alike."""
    keep_rate: str | None = None
    """The label column with the part of candidates like this one that downsampling kept; None for all of them."""
    cut: Cut = "by_time"
    """Where histories end.  Cut by place, a history may reach its candidates' time: for next-item retrieval alone."""
    clock: Clock = "unix"
    """What times count from."""
    parts: tuple[str, ...] = (FIRST_PART,)
    """Deliveries of the data, oldest first: folders within a split."""
    splits: Mapping[str, SplitInfo]
    """Sizes of `train` and `eval`."""
    source: str
    """Where the data comes from, with its attribution."""
    licence: str
    """Terms under which the data may be used."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that the preparation wrote down: split times, statistics, its own options."""

    def of(self, part: Part) -> tuple[Column, ...]:
        """The columns of a part."""
        return tuple(column for column in self.columns if column.part == part)

    @property
    def num_items(self) -> int:
        """Item ids lie in [0, num_items)."""
        return self.spaces[ITEM_SPACE].rows

    def action_bit(self, action: str) -> int:
        """Position of an action's bit.  Raises ValueError if there is no such action."""
        if action not in self.actions:
            raise ValueError(f"unknown action {action!r}; {self.name} has {', '.join(self.actions)}")
        return self.actions.index(action)

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """What is known of columns of numbers, by PART.NAME."""
        known = {f"{column.part}.{column.name}": column.statistics for column in self.columns}
        return {name: each.as_dict() for name, each in known.items() if each is not None}

    def measured_by(self, numbers: Mapping[str, Any]) -> "DatasetInfo":
        """The same data, with what `numbers` of other data say of columns of these names."""
        known = {name: parse_statistics(entry, name) for name, entry in numbers.items()}
        columns = (
            replace(each, statistics=known.get(f"{each.part}.{each.name}", each.statistics)) for each in self.columns
        )
        return replace(self, columns=tuple(columns))

    def as_dict(self) -> dict[str, Any]:
        """The content of `dataset.json`, which `parse_dataset_info` reads back."""
        spaces = {
            space.name: {
                key: value
                for key in ("rows", "used", "keys", "digest", "hash", "unbounded", "key_kind")
                if (value := getattr(space, key)) is not None and value is not False
            }
            for space in self.spaces.values()
        }
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "spaces": spaces,
            **{part: {each.name: _word(each) for each in self.of(part)} for part in get_args(Part)},
            "numbers": self.numbers,
            "actions": list(self.actions),
            "weight": self.weight,
            "keep_rate": self.keep_rate,
            "cut": self.cut,
            "clock": self.clock,
            "parts": list(self.parts),
            "splits": {
                split: {
                    key: size for key in SplitInfo.__dataclass_fields__ if (size := getattr(sizes, key)) is not None
                }
                for split, sizes in self.splits.items()
            },
            "source": self.source,
            "licence": self.licence,
            **self.details,
        }


def parse_dataset_info(values: Any, name: str) -> DatasetInfo:
    """Check the content of a `dataset.json` of this format version or of version 1; `name` is the file's.

    Raises:
        ValueError: a field is missing, of another type, or contradicts another one; the message names file and field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(values).__name__}")
    version = values.get("format_version")
    if version == 1:
        values = _from_version_1(values, name)
    elif version != FORMAT_VERSION:
        raise ValueError(f"{name}: format_version is {version!r}, this version reads 1 and {FORMAT_VERSION}")
    _check_types(values, {"name": str, "spaces": dict, "actions": list, "splits": dict}, name)
    _check_types(values, {"source": str, "licence": str}, name)
    optional: dict[str, type] = dict.fromkeys((*get_args(Part), "numbers"), dict) | {"parts": list}
    _check_types({key: values.get(key, kind()) for key, kind in optional.items()}, optional, name)
    spaces = {key: _parse_space(key, entry, name) for key, entry in values["spaces"].items()}
    statistics = {
        key: parse_statistics(entry, f"{name}: numbers of {key!r}") for key, entry in values.get("numbers", {}).items()
    }
    columns = tuple(_parse_columns(values, spaces, statistics, name))
    unknown = sorted(set(statistics) - {f"{each.part}.{each.name}" for each in columns if each.kind == "number"})
    if unknown:
        raise ValueError(f"{name}: 'numbers' describes {unknown[0]!r}, which is no column of numbers")
    _check_names(values["actions"], "actions", MAX_ACTIONS, name)
    if not values["actions"]:
        raise ValueError(f"{name}: 'actions' must name at least one action")
    _check_names(values.get("parts", []), "parts", 1 << 20, name)
    for key, words in (("cut", get_args(Cut)), ("clock", get_args(Clock))):
        if values.get(key, words[0]) not in words:
            raise ValueError(f"{name}: {key!r} must be one of {', '.join(words)}, got {values[key]!r}")
    for key in ("weight", "keep_rate"):
        if values.get(key) is not None and values[key] not in {
            each.name for each in columns if each.part == "label" and each.kind == "number"
        }:
            raise ValueError(f"{name}: {key!r} must name a label column of numbers, got {values[key]!r}")
    return DatasetInfo(
        name=values["name"],
        spaces=spaces,
        columns=columns,
        actions=tuple(values["actions"]),
        weight=values.get("weight"),
        keep_rate=values.get("keep_rate"),
        cut=values.get("cut", "by_time"),
        clock=values.get("clock", "unix"),
        parts=tuple(values.get("parts") or (FIRST_PART,)),
        splits={split: _parse_split(sizes, f"{name}: split {split!r}") for split, sizes in values["splits"].items()},
        source=values["source"],
        licence=values["licence"],
        details={key: value for key, value in values.items() if key not in _FIELDS},
    )


_FIELDS = {
    *("format_version", "name", "spaces", "numbers", "actions", "weight", "keep_rate", "cut", "clock", "parts"),
    *("splits", "source", "licence"),
    *get_args(Part),
}


def _word(column: Column) -> str | list[str]:
    """A column's value in `dataset.json`."""
    if column.kind == "number":
        return NUMBER
    assert column.space is not None
    return [column.space] if column.kind == "ids" else column.space


def _check_types(values: Mapping[str, Any], types: Mapping[str, type], name: str) -> None:
    for key, kind in types.items():
        if not isinstance(values.get(key), kind):
            raise ValueError(f"{name}: field {key!r} must be present and of type {kind.__name__}")


def _check_names(names: Any, key: str, limit: int, where: str) -> None:
    """A list of distinct strings, not too long."""
    if not all(isinstance(item, str) and item for item in names) or len(set(names)) != len(names):
        raise ValueError(f"{where}: {key!r} must hold distinct names, got {names}")
    if len(names) > limit:
        raise ValueError(f"{where}: {key!r} may hold at most {limit} names, got {len(names)}")


def _parse_space(key: str, entry: Any, name: str) -> Space:
    where = f"{name}: space {key!r}"
    if not re.fullmatch(r"[^./]+", key) or key == NUMBER:
        raise ValueError(f"{where} must have a name without dot and slash, other than {NUMBER!r}")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object with its number of rows, got {entry!r}")
    unknown = sorted(set(entry) - set(Space.__dataclass_fields__) | ({"name"} & set(entry)))
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}")
    rows: Any = entry.get("rows")
    used: Any = entry.get("used", rows)
    for size in (rows, used):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where}: rows and used must be whole numbers above 0, got rows={rows!r}, used={used!r}")
    if used > rows:
        raise ValueError(f"{where}: {used} ids are used, but there are {rows} rows")
    for field_name in ("keys", "digest", "hash"):
        if not isinstance(entry.get(field_name, ""), str):
            raise ValueError(f"{where}: {field_name} must be text, got {entry[field_name]!r}")
    if entry.get("keys") is not None and entry.get("hash") is not None:
        raise ValueError(f"{where} has keys and a hash: ids come from a file of keys or from a hash, not from both")
    unbounded = entry.get("unbounded", False)
    if not isinstance(unbounded, bool):
        raise ValueError(f"{where}: unbounded must be true or false, got {unbounded!r}")
    if unbounded and (rows < 2 or {"keys", "hash", "digest"} & set(entry)):
        raise ValueError(
            f"{where} is unbounded: its ids are keys, so it has no keys, digest or hash, but 2 rows or more"
        )
    kind = entry.get("key_kind")
    if kind is not None and not (unbounded and kind in KEY_KINDS):
        raise ValueError(f"{where}: key_kind says of unbounded keys {' or '.join(KEY_KINDS)}, got {kind!r}")
    return Space(**{**entry, "name": key, "rows": rows, "used": used})


def _parse_columns(
    values: Mapping[str, Any], spaces: Mapping[str, Space], statistics: Mapping[str, NumberStatistics], name: str
) -> Iterator[Column]:
    """The columns of all parts, checked."""
    for part in get_args(Part):
        columns = values.get(part, {})
        if part in ("event", "candidate") and columns.get(ITEM_ID) != ITEM_SPACE:
            raise ValueError(f"{name}: {part!r} must hold the column {ITEM_ID!r} of the space {ITEM_SPACE!r}")
        for key, word in columns.items():
            where = f"{name}: column {key!r} of {part!r}"
            if not key or "." in key or "/" in key or key in TAKEN:
                raise ValueError(f"{where} must have a name without dot and slash, none of {', '.join(TAKEN)}")
            if key == ITEM_ID and part not in ("event", "candidate"):
                raise ValueError(f"{where} cannot be called {ITEM_ID!r}, which names events' and candidates' items")
            if (
                key in (*LENGTH_COLUMNS, *(PREFIXES[each] + TAKEN[0] for each in ("event", "candidate")))
                and part == "sample"
            ):
                raise ValueError(f"{where} cannot be called {key!r}, which is a column that every data set has")
            many = isinstance(word, list)
            space = word[0] if many and len(word) == 1 else word
            if space == NUMBER and not many:
                yield Column(name=key, part=part, kind="number", statistics=statistics.get(f"{part}.{key}"))
            elif isinstance(space, str) and space in spaces and not (many and part == "label"):
                if spaces[space].unbounded and part == "label":
                    raise ValueError(f"{where} cannot be of {space!r}, which is unbounded: classes are a vocabulary")
                if spaces[space].unbounded and space == ITEM_SPACE and values.get("item"):
                    raise ValueError(f"{name}: the space {ITEM_SPACE!r} is unbounded, so 'item' can have no columns")
                yield Column(name=key, part=part, kind="ids" if many else "id", space=space)
            else:
                raise ValueError(
                    f"{where} is {word!r}, expected {NUMBER!r}, a space"
                    f"{'' if part == 'label' else ' or [space]'}; spaces are {', '.join(spaces)}"
                )


def _parse_split(sizes: Any, where: str) -> SplitInfo:
    """Check one entry of `splits`."""
    needed = ("samples", "history_events", "candidates")
    known = {key: sizes.get(key, 0) for key in (*needed, "files")} if isinstance(sizes, dict) else {}
    if not set(needed) <= set(sizes if known else ()) or any(not isinstance(n, int) or n < 0 for n in known.values()):
        raise ValueError(f"{where} must give {', '.join(needed)} as whole numbers, got {sizes!r}")
    return SplitInfo(**{**known, "files": sizes.get("files")})


def _from_version_1(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Version 1 had one item column, context features with a table each, and history lists of numbers."""
    types: dict[str, type] = {"num_items": int, "context_features": dict, "history_features": list}
    _check_types(values, types, name)
    context = values["context_features"]
    if ITEM_SPACE in context:
        raise ValueError(f"{name}: a context feature must not be called {ITEM_SPACE!r}, which names the items' table")
    _check_names(values["history_features"], "history_features", 64, name)
    sizes = {ITEM_SPACE: values["num_items"], **context}
    return {
        **{key: value for key, value in values.items() if key not in types},
        "format_version": FORMAT_VERSION,
        "spaces": {key: {"rows": size} for key, size in sizes.items()},
        "sample": {key: key for key in context},
        "event": {ITEM_ID: ITEM_SPACE, **dict.fromkeys(values["history_features"], NUMBER)},
        "candidate": {ITEM_ID: ITEM_SPACE},
    }
