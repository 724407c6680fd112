"""What a run reads of a data set: the features that its model takes, and the labels.  Standard library only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.counts import Counts, counts_of
from pipelines.features import ITEM_ID, Column, DatasetInfo, Kind, Part
from pipelines.known_numbers import NumberStatistics

ITEM_PREFIX = "item."
"""Stands before an item column where an event or a candidate takes it from its item."""
SAMPLE_PREFIX = "sample."
"""Stands before a sample's column, whose name may also be an event's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """One input of a model, over the rows of its parts: events, candidates, events and then candidates, or samples."""

    name: str
    """`NAME` of events and candidates, `item.NAME` of their items, `sample.NAME` of samples; the key of its lookup."""
    parts: tuple[Part, ...]
    """("event",), ("candidate",), ("event", "candidate") or ("sample",)."""
    kind: Kind
    """What its values are."""
    space: str | None
    """The ids' space; None for numbers."""
    statistics: NumberStatistics | None = None
    """Statistics of numbers, where the data set has them."""

    @property
    def of_item(self) -> bool:
        """Whether it is a column of items, joined by the item's id."""
        return self.name.startswith(ITEM_PREFIX)

    @property
    def column(self) -> str:
        """The column's name within its part."""
        return self.name.removeprefix(ITEM_PREFIX).removeprefix(SAMPLE_PREFIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Ids that are drawn uniformly for each global batch and looked up beside its own (`pipelines.stream.draws`)."""

    name: str
    """The key of the lookup."""
    num_ids: int
    """Ids are drawn from 0 to below this."""
    count: int | None
    """Ids drawn for a global batch; None: each id once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The inputs and labels that a run reads."""

    features: tuple[Feature, ...] = ()
    """The columns that a model reads, each once."""
    labels: tuple[Column, ...] = ()
    """Label columns besides the action bits, which are always read."""
    counts: tuple[Counts, ...] = ()
    """Groups of counts of candidates; their columns are among the features."""
    draw: Draw | None = None
    """Ids besides those of the features; None for none."""

    def of(self, *parts: Part) -> tuple[Feature, ...]:
        """The features over exactly these parts that enter by themselves: all but columns of counts."""
        counted = {column for each in self.counts for column in each.columns}
        return tuple(
            feature
            for feature in self.features
            if feature.parts == parts and not (parts == ("candidate",) and feature.name in counted)
        )


def select(
    info: DatasetInfo,
    *,
    event: Sequence[str] | None = None,
    candidate: Sequence[str] | None = None,
    context: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    counts: Sequence[str] | None = (),
) -> Selection:
    """The features that these columns, and these groups of counts, name; None takes all that the data set has there.

    A column of counts is read with its group or not at all.

    Raises:
        ValueError: a column that the data set does not have, or one named twice.
    """
    columns = {(each.part, each.name): each for each in info.columns}
    chosen: dict[Part, Sequence[str]] = {
        "event": _choose(info, "event", event),
        "candidate": _choose(info, "candidate", candidate),
    }
    features = [
        _token_feature(name, tuple(part for part in chosen if name in chosen[part]), columns)
        for name in dict.fromkeys([*chosen["event"], *chosen["candidate"]])
    ]
    groups = _choose_counts(info, counts)
    features += [_feature(name, ("candidate",), columns["candidate", name]) for each in groups for name in each.columns]
    of_samples = _choose(info, "sample", context)
    features += [_feature(SAMPLE_PREFIX + name, ("sample",), columns["sample", name]) for name in of_samples]
    unknown = [name for name in labels if ("label", name) not in columns]
    if unknown:
        have = ", ".join(each.name for each in info.of("label")) or "none"
        raise ValueError(f"label {unknown[0]!r} is none of the data set's label columns: {have}")
    return Selection(
        features=tuple(features), labels=tuple(columns["label", name] for name in labels), counts=tuple(groups)
    )


def _choose_counts(info: DatasetInfo, names: Sequence[str] | None) -> list[Counts]:
    """The groups of counts of these names."""
    groups = {each.group: each for each in counts_of(info)}
    unknown = [name for name in names or () if name not in groups]
    if unknown:
        have = ", ".join(groups) or "none"
        raise ValueError(f"model.input.counts names {unknown[0]!r}, but the groups that {info.name} counts are: {have}")
    return list(groups.values()) if names is None else [groups[name] for name in names]


def _counted(info: DatasetInfo) -> set[str]:
    """The columns of candidates that are counts."""
    return {column for each in counts_of(info) for column in each.columns}


def _choose(info: DatasetInfo, part: Part, names: Sequence[str] | None) -> Sequence[str]:
    """The names of columns that a part's tokens take, checked."""
    counted = _counted(info) if part == "candidate" else set()
    have = [each.name for each in info.of(part) if each.name not in counted]
    if part != "sample":
        have += [ITEM_PREFIX + each.name for each in info.of("item")]
    if names is None:
        return have
    for name in names:
        if name not in have:
            raise ValueError(
                f"model.input names {name!r}, which is none of the {part} columns of {info.name}: {', '.join(have)}"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"model.input names a {part} column twice: {', '.join(names)}")
    return names


def _token_feature(name: str, parts: tuple[Part, ...], columns: dict[tuple[Part, str], Column]) -> Feature:
    """A feature of events, candidates or both."""
    if name.startswith(ITEM_PREFIX):
        return _feature(name, parts, columns["item", name.removeprefix(ITEM_PREFIX)])
    first, *others = (columns[part, name] for part in parts)
    if any((other.kind, other.space) != (first.kind, first.space) for other in others):
        raise ValueError(f"column {name!r} of events and of candidates differ in kind or space: rename one of them")
    known = next((each.statistics for each in (first, *others) if each.statistics is not None), None)
    return Feature(name=name, parts=parts, kind=first.kind, space=first.space, statistics=known)


def _feature(name: str, parts: tuple[Part, ...], column: Column) -> Feature:
    return Feature(name=name, parts=parts, kind=column.kind, space=column.space, statistics=column.statistics)


def stored_columns(selection: Selection) -> Iterator[Column]:
    """The columns that are read from every row for a selection, besides those that every data set has.

    Those of items are read once, apart.
    """
    for feature in selection.features:
        if not feature.of_item and feature.name != ITEM_ID:
            for part in feature.parts:
                yield Column(name=feature.column, part=part, kind=feature.kind, space=feature.space)
    yield from selection.labels


def unread_columns(selection: Selection, info: DatasetInfo) -> list[str]:
    """`PART.NAME` of each column of the data set that neither an input nor a label of the selection is."""
    read = {(column.part, column.name) for column in stored_columns(selection)} | {
        ("event", ITEM_ID),
        ("candidate", ITEM_ID),
    }
    read |= {("item", feature.column) for feature in selection.features if feature.of_item}
    counted = {("candidate", name) for name in _counted(info)}
    columns = ((column.part, column.name) for column in info.columns)
    return [f"{part}.{name}" for part, name in columns if (part, name) not in read | counted]
