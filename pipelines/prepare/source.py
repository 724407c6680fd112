"""What a data set's module says of the tables it has filled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.counts import Counts
from pipelines.features import ITEM_ID, ITEM_SPACE, UNKNOWN_ID, USER_ID, Clock, Column, Kind, Space

MISSING: Mapping[Kind, str] = {"id": f"{UNKNOWN_ID}::BIGINT", "ids": "[]::BIGINT[]", "number": "'nan'::DOUBLE"}
"""SQL of the values that stand for missing ones."""
USER_SPACE = "user"
"""The space of the users' ids."""


@dataclass(frozen=True, slots=True)
class Cross:
    """A column of samples that is a hash of other values."""

    of: tuple[str, ...]
    """Words of `pipelines.storage.gathering`."""
    rows: int
    """Rows of its table, for a log of `GatheredRules.users` users."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedGroup:
    """Events that are counted together, and the columns of candidates with their numbers."""

    counts: Counts
    keys: tuple[str, ...]
    """What they have in common: columns of the table `events`, or `item.NAME` of `items`; the user, if so, is first."""

    @property
    def of_user(self) -> bool:
        """Whether all of them are one user's."""
        return self.keys[0] == USER_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class GatheredRules:
    """How histories are gathered from a log that is stored once; conditions are SQL on the columns of `events`."""

    pools: Mapping[str, str]
    """Kinds of events: an event belongs to the first whose condition holds."""
    samples: str
    """Which of the labelled events are samples."""
    within: str = "true"
    """Which events are kept."""
    crosses: Mapping[str, Cross]
    """Columns of samples beside the user."""
    users: int
    """Users of the log that the rows of crosses are for; a smaller one has fewer in proportion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The part of `dataset.json` that depends on the data set."""

    name: str
    """Short name."""
    spaces: Mapping[str, Space]
    """Spaces of ids; the keys of one are in the table SPACE_ids, where they are not the ids."""
    columns: tuple[Column, ...]
    """All columns, `item_id` of events and candidates included."""
    actions: tuple[str, ...]
    """Names of the bits of `action`."""
    weight: str | None = None
    """The label column that multiplies a candidate's loss."""
    changing: tuple[str, ...] = ()
    """Columns of samples that `events` tells of, in a `sample_column` each: a sample has the newest value that is known
    before its first candidate, or what stands in `users`, which was known before all events."""
    clock: Clock = "unix"
    """What times count from."""
    keep_rate: str | None = None
    """The label column that says which part of candidates like this one was kept."""
    source: str
    """Where the data comes from, with its attribution."""
    licence: str
    """Terms of use."""
    part: str = ""
    """The name of the part, if it is added to a data set; otherwise it is the first."""
    keeps_state: bool = False
    """Whether a later part can be added, for which the state is stored."""
    counted: tuple[CountedGroup, ...] = ()
    """What candidates are told of what the log knew before them, once the preparation has chosen it."""
    gathered: GatheredRules | str = "its format does not say which events make up histories"
    """For `--histories gathered`: how, or why it cannot be."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else `dataset.json` is to say."""


def value_column(name: str) -> str:
    """The column of the table `events` with the values of a column of events, candidates or labels.

    A name means one thing in a row of the log: an event's `price` is the price of the candidate that it was.
    """
    return f"value_{name}"


def sample_column(name: str) -> str:
    """The column of the table `events` with what an event tells of a column of samples."""
    return f"sample_{name}"


def item_columns() -> tuple[Column, ...]:
    """The columns that every data set has."""
    return (
        Column(name=ITEM_ID, part="event", kind="id", space=ITEM_SPACE),
        Column(name=ITEM_ID, part="candidate", kind="id", space=ITEM_SPACE),
    )


def narrow_spaces(num_items: int, num_users: int, context: Mapping[str, int]) -> dict[str, Space]:
    """Spaces of a log whose items are told by their ids alone; `context` gives the rows of each context feature."""
    rows = {ITEM_SPACE: num_items, USER_SPACE: num_users, **context}
    return {name: Space(name=name, rows=size, used=size) for name, size in rows.items()}


def narrow_columns(context: Mapping[str, int], numbers: Sequence[str] = ()) -> tuple[Column, ...]:
    """Columns of such a log; `numbers` are further columns of events."""
    return (
        Column(name=USER_ID, part="sample", kind="id", space=USER_SPACE),
        *(Column(name=name, part="sample", kind="id", space=name) for name in context),
        *item_columns(),
        *(Column(name=name, part="event", kind="number") for name in numbers),
    )
