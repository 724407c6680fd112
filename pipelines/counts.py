"""What the log knew of a candidate before it came: how often its item, its user, or both together stood in the log, and
with which actions.  Columns of numbers of candidates, named in `dataset.json`.  Standard library only.

    "counts": {"item": {"seen": "item_seen", "taken": ["item_taken_0", "item_taken_1"]}, ...}

They count labelled events strictly before the candidate's time, so that no label is among its own inputs.  Others may
count other things in the same way: what they call a group is free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.features import DatasetInfo

ITEM, USER, USER_ITEM = "item", "user", "user_item"
"""The groups that `pipelines.prepare` counts: a candidate's item, its user, and the two together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Columns of candidates with what was counted of one group."""

    group: str
    """What the counted events have in common with the candidate."""
    seen: str
    """Column with the number of events."""
    taken: tuple[str, ...]
    """Column with the number of them in which the action was taken, one an action of the data set, in their order."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns of counts."""
        return (self.seen, *self.taken)


def group_counts(group: str, num_actions: int) -> Counts:
    """The columns of a group under the names that `pipelines.prepare` gives them."""
    taken = tuple(f"{group}_taken_{bit}" for bit in range(num_actions))
    return Counts(group=group, seen=f"{group}_seen", taken=taken)


def counts_as_dict(counts: Sequence[Counts]) -> dict[str, Any]:
    """The field `counts` of `dataset.json`, which `counts_of` reads back."""
    return {each.group: {"seen": each.seen, "taken": list(each.taken)} for each in counts}


def counts_of(info: DatasetInfo) -> tuple[Counts, ...]:
    """The counts that a data set has; none if it does not mention any.

    Raises:
        ValueError: the field `counts` is malformed or names what is no column of numbers of candidates.
    """
    known = {column.name for column in info.of("candidate") if column.kind == "number"}
    entries = info.details.get("counts", {})
    if not isinstance(entries, dict):
        raise ValueError(f"{info.name}: 'counts' must be an object of groups, got {entries!r}")
    return tuple(_parse(info, group, entry, known) for group, entry in entries.items())


def _parse(info: DatasetInfo, group: str, entry: Any, known: set[str]) -> Counts:
    where = f"{info.name}: counts of {group!r}"
    if not isinstance(entry, dict) or set(entry) != {"seen", "taken"} or not isinstance(entry["taken"], list):
        raise ValueError(f"{where} must give 'seen' and the list 'taken', got {entry!r}")
    if len(entry["taken"]) != len(info.actions):
        raise ValueError(
            f"{where}: 'taken' must name one column for each of the {len(info.actions)} actions, got "
            f"{len(entry['taken'])}"
        )
    for column in (entry["seen"], *entry["taken"]):
        if column not in known:
            raise ValueError(f"{where} names {column!r}, which is no column of numbers of candidates")
    return Counts(group=group, seen=entry["seen"], taken=tuple(entry["taken"]))
