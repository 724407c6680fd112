"""Descriptions of data sets that no file holds."""

from collections.abc import Mapping, Sequence

from pipelines.features import DatasetInfo, SplitInfo, parse_dataset_info


def made_up_info(
    *,
    num_items: int,
    actions: Sequence[str],
    context: Mapping[str, int] | None = None,
    numbers: Sequence[str] = (),
    splits: Mapping[str, SplitInfo] | None = None,
) -> DatasetInfo:
    """Context features with a space each, and numbers of events."""
    context = context or {}
    sizes = {
        name: {key: value for key in size.__slots__ if (value := getattr(size, key)) is not None}
        for name, size in (splits or {}).items()
    }
    values = {
        "format_version": 2,
        "name": "made up",
        "spaces": {name: {"rows": rows} for name, rows in {"item": num_items, **context}.items()},
        "sample": {name: name for name in context},
        "event": {"item_id": "item", **dict.fromkeys(numbers, "number")},
        "candidate": {"item_id": "item"},
        "actions": list(actions),
        "splits": sizes,
        "source": "",
        "licence": "",
    }
    return parse_dataset_info(values, "made up")
