"""What a log's columns mean: the description that flags and a schema file give alike."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pipelines.features import (
    ITEM_ID,
    ITEM_SPACE,
    LENGTH_COLUMNS,
    MAX_ACTIONS,
    PREFIXES,
    TAKEN,
    USER_ID,
    Kind,
    Part,
)
from pipelines.prepare.log.text_encoding import UTF_8, check_encoding
from pipelines.prepare.log.times import check_unit
from pipelines.prepare.source import USER_SPACE

PARTS: tuple[Part, ...] = get_args(Part)
ROW_LISTS: tuple[Part, ...] = ("event", "candidate", "label")
"""Parts whose values stand in the rows of the log."""
SPACE_NAME = re.compile(r"[^./]+")
STORED_PREFIXES = tuple(prefix for prefix in PREFIXES.values() if prefix)
MISSING_TEXTS = ("null", "NULL", "Null", "nan", "NaN", "NAN", "NaT", "None", "<NA>", "\\N")
"""How programs spell a missing value in text; empty text always is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogColumn:
    """A column of the data set, and the log's column that it is made of."""

    name: str
    """The column's name in the data set."""
    column: str
    """The name in the log or in a file of attributes."""
    kind: Kind
    """One id, many ids, or a number."""
    space: str | None = None
    """The space of its ids."""
    separator: str | None = None
    """What divides many ids in text; lists need none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaceOptions:
    """How a space comes by its ids."""

    rows: int | None = None
    """Rows of the table: room to grow beyond the keys of this log, or for hashed ids."""
    hash: bool = False
    """Whether an id is a hash of its key, which needs no list of keys and lets keys share an id."""
    unbounded: bool = False
    """Whether an id is its key itself, any 64-bit number, and training decides which keys have the rows."""
    min_count: int = 1
    """Keys that stand in fewer values of the log get id 0, that of the unknown."""

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {self.min_count}")
        if self.rows is not None and self.rows < 2:
            raise ValueError(f"rows must be at least 2, one is that of the unknown, got {self.rows}")
        if self.hash and self.rows is None:
            raise ValueError("a hash needs rows, the number of ids that it gives")
        if self.hash and self.min_count > 1:
            raise ValueError("min_count has no effect on a hash, which counts nothing; leave one of them out")
        if self.unbounded and (self.rows is None or self.hash or self.min_count > 1):
            raise ValueError(
                "unbounded ids need rows, the number of keys that have one at a time, and neither hash nor min_count: "
                "training counts keys (tables.SPACE.unbounded.min_count of a recipe)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """Files with one row a user or an item."""

    files: str
    """A folder, a file or a pattern of files, relative to the log's folder."""
    key: str
    """The column that says whose."""
    columns: tuple[LogColumn, ...]
    """Columns of samples (users) or of items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSchema:
    """The meaning of a log's columns."""

    user: str
    """The column that says who did it."""
    item: str
    """The column that says with which item."""
    time: str
    """The column that says when."""
    time_unit: str = "s"
    """How times are written (`pipelines.prepare.log.times`)."""
    actions: tuple[str, ...]
    """Columns of 0 and 1, or one column of words with action_values."""
    action_values: tuple[str, ...] = ()
    """The words, each an action."""
    action_separator: str | None = None
    """What divides several words in one cell; lists need none.  A row without a word took no action then."""
    columns: Mapping[Part, tuple[LogColumn, ...]] = field(default_factory=dict)
    """Columns that rows of the log hold, by part; a sample has the newest value known before it."""
    users: Attributes | None = None
    """Files of users, whose columns become columns of samples."""
    items: Attributes | None = None
    """Files of attributes of items."""
    request: str | None = None
    """What was shown together: a user's events of one request become candidates of one sample, as events of one second
    always do.  A missing value is no request."""
    sequence: str | None = None
    """What orders events of equal times: an offset or a number, of any type.  Without it they keep the log's order."""
    weight: str | None = None
    """The column that multiplies a candidate's loss."""
    keep_rate: str | None = None
    """The column that says which part of candidates like this one was kept when the log was thinned out."""
    spaces: Mapping[str, SpaceOptions] = field(default_factory=dict)
    """How spaces come by their ids, where not as SpaceOptions() says."""
    where: str | None = None
    """An SQL condition on the log's columns; rows that do not meet it are left out."""
    skip_invalid: bool = False
    """Whether rows that break a rule are left out and counted, instead of ending the preparation."""
    drop_duplicates: bool = False
    """Whether of rows that are equal in all columns read only the first is kept."""
    missing_texts: tuple[str, ...] = MISSING_TEXTS
    """Texts that mean a missing value."""
    encoding: str = UTF_8
    """Encoding of files of text that do not begin with the mark of UTF-16."""
    decimal: str | None = None
    """What stands before decimals in numbers of text, "." or ","; the other may stand between thousands then.  Without
    it that is a point, and nothing between thousands, as 1,593 may be either."""

    def __post_init__(self) -> None:
        check_unit(self.time_unit)
        check_encoding(self.encoding)
        if self.decimal not in (None, ".", ","):
            raise ValueError(f"decimal must be '.' (as in 1,593.81) or ',' (as in 1.593,81), got {self.decimal!r}")
        if len({self.user, self.item, self.time}) < 3:
            raise ValueError(
                f"user, item and time are the columns {self.user}, {self.item}, {self.time}; name three columns"
            )
        self._check_actions()
        for part in PARTS:
            self._check_columns(part)
        self._check_one_meaning()
        self._check_candidates()
        self._check_spaces()

    def of(self, part: Part) -> tuple[LogColumn, ...]:
        """The columns of a part, wherever they come from."""
        files = {"sample": self.users, "item": self.items}.get(part)
        return (*self.columns.get(part, ()), *(files.columns if files else ()))

    @property
    def told(self) -> tuple[LogColumn, ...]:
        """Columns of samples that rows of the log tell, from then on."""
        return tuple(column for column in self.columns.get("sample", ()) if column.name != USER_ID)

    def _check_actions(self) -> None:
        if not self.actions:
            raise ValueError("at least one action must be named: the labels that a model learns")
        if self.action_values and len(self.actions) != 1:
            raise ValueError(f"action values are words of one column, but the actions are {', '.join(self.actions)}")
        if self.action_separator and not self.action_values:
            raise ValueError(f"the separator {self.action_separator!r} divides words: give the action values")
        actions = self.action_values or self.actions
        if len(set(actions)) != len(actions):
            raise ValueError(f"each action must be named once, got {', '.join(actions)}")
        if len(actions) > MAX_ACTIONS:
            raise ValueError(f"at most {MAX_ACTIONS} actions fit into a bit mask, got {len(actions)}: leave some out")

    def _check_columns(self, part: Part) -> None:
        """Names that the prepared format can hold, each once."""
        names = [column.name.lower() for column in self.of(part)]
        for column in self.of(part):
            name = column.name
            if names.count(name.lower()) > 1:
                raise ValueError(f"the {part} column {name} is named twice, perhaps in other letters; name it once")
            if part == "sample" and (name in LENGTH_COLUMNS or name.startswith(STORED_PREFIXES)):
                raise ValueError(f"the {part} column cannot be called {name}, as the lists of a sample are; rename it")
            if not name or "." in name or "/" in name or name in (*TAKEN, ITEM_ID):
                raise ValueError(f"the {part} column cannot be called {name!r}; rename it")
            if part == "label" and column.kind == "ids":
                raise ValueError(f"the label column {name} cannot hold many ids; give a number or one id")
            if column.space is not None and not SPACE_NAME.fullmatch(column.space):
                raise ValueError(f"the space {column.space!r} of column {name} must have a name without dot and slash")
            if name == USER_ID and (part != "sample" or column.column != self.user or column.kind != "id"):
                raise ValueError(f"the {part} column cannot be called {name}, which says whose a sample is; rename it")

    def _check_one_meaning(self) -> None:
        """A name means one thing in a row: an event's price is that of the candidate that it was."""
        meant: dict[str, LogColumn] = {}
        for column in (column for part in ROW_LISTS for column in self.of(part)):
            first = meant.setdefault(column.name.lower(), column)
            if first != column:
                raise ValueError(
                    f"events, candidates and labels mean two things by {column.name}: {first.column} and "
                    f"{column.column}, or two kinds of value; give two names"
                )

    def _check_candidates(self) -> None:
        """What a model predicts is not known when a candidate is scored."""
        predicted = {*self.actions, *(column.column for column in self.of("label"))} - {self.weight, self.keep_rate}
        for column in self.of("candidate"):
            if column.column in predicted:
                raise ValueError(
                    f"the candidate column {column.name} is read from {column.column}, which a model is to predict and "
                    "nobody knows beforehand; let it be a column of events alone"
                )

    def _check_spaces(self) -> None:
        """Options only of spaces that a column uses; users and items can be told apart."""
        used = {ITEM_SPACE, USER_SPACE}
        used |= {column.space for part in PARTS for column in self.of(part) if column.space is not None}
        unused = sorted(set(self.spaces) - used)
        if unused:
            raise ValueError(f"no column is of the space {unused[0]}; spaces are {', '.join(sorted(used))}")
        alike = sorted(name for name in used if sum(name.lower() == other.lower() for other in used) > 1)
        if alike:
            raise ValueError(f"the spaces {' and '.join(alike)} differ in large and small letters alone; rename one")
        users = self.spaces.get(USER_SPACE, SpaceOptions())
        if users.hash or users.unbounded or users.min_count > 1:
            raise ValueError(
                f"the space {USER_SPACE} tells users apart: it can have neither a hash nor a min_count, and not be "
                "unbounded"
            )
        items = self.spaces.get(ITEM_SPACE, SpaceOptions())
        if self.items is not None and (items.hash or items.unbounded):
            raise ValueError(
                f"the space {ITEM_SPACE} cannot be {'a hash' if items.hash else 'unbounded'} where items have "
                "attributes: they are found by the ids of a dictionary"
            )
        for column in self.of("label"):
            if column.space is not None and self.spaces.get(column.space, SpaceOptions()).unbounded:
                raise ValueError(f"the label {column.name} is of the unbounded space {column.space}: classes are few")


def schema_from_dict(values: Mapping[str, Any]) -> LogSchema:
    """What `dataclasses.asdict` made of a description.

    Raises:
        ValueError: it says what this version does not know.
    """
    unknown = sorted(set(values) - set(LogSchema.__dataclass_fields__))
    if unknown:
        raise ValueError(f"a later version of this project described the log, by {', '.join(unknown)}: use that one")

    def columns(entries: Any) -> tuple[LogColumn, ...]:
        return tuple(LogColumn(**entry) for entry in entries)

    def attributes(entry: Any) -> Attributes | None:
        return None if entry is None else Attributes(**{**entry, "columns": columns(entry["columns"])})

    texts = {name: tuple(values[name]) for name in ("actions", "action_values", "missing_texts")}
    return LogSchema(
        **{
            **values,
            **texts,
            "columns": {part: columns(entries) for part, entries in values["columns"].items()},
            "users": attributes(values["users"]),
            "items": attributes(values["items"]),
            "spaces": {name: SpaceOptions(**entry) for name, entry in values["spaces"].items()},
        }
    )
