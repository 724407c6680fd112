"""The description of a data set: what it says is what is read back, and what contradicts itself is refused."""

import copy
from typing import Any

import pytest

from pipelines.features import parse_dataset_info

GOOD: dict[str, Any] = {
    "format_version": 2,
    "name": "shop",
    "spaces": {
        "item": {"rows": 100, "used": 90, "keys": "item_ids.parquet", "digest": "ab"},
        "tag": {"rows": 64, "used": 64, "hash": "xxh64"},
        "rating": {"rows": 6, "used": 6},
    },
    "sample": {"age": "number", "interests": ["tag"]},
    "event": {"item_id": "item", "dwell_s": "number"},
    "candidate": {"item_id": "item", "query": ["tag"]},
    "item": {"tags": ["tag"]},
    "label": {"rating": "rating", "importance": "number"},
    "numbers": {"event.dwell_s": {"count": 3, "missing": 1, "mean": 2.0, "std": 0.5, "quantiles": [1.0, 2.0, 3.0]}},
    "actions": ["click"],
    "weight": "importance",
    "keep_rate": None,
    "cut": "by_place",
    "clock": "relative",
    "parts": ["day=1"],
    "splits": {"train": {"samples": 1, "history_events": 2, "candidates": 3}},
    "source": "made up",
    "licence": "none",
    "split_time": 17,
}


def test_what_is_written_is_read_back() -> None:
    info = parse_dataset_info(GOOD, "dataset.json")
    assert info.as_dict() == GOOD
    assert parse_dataset_info(info.as_dict(), "dataset.json") == info
    assert [column.stored for column in info.columns] == [
        *("age", "interests", "history_item_id", "history_dwell_s", "candidate_item_id", "candidate_query", "tags"),
        *("label_rating", "label_importance"),
    ]
    assert info.details == {"split_time": 17}


def test_version_1_is_a_data_set_with_one_item_column() -> None:
    old = {key: GOOD[key] for key in ("name", "actions", "splits", "source", "licence")} | {
        "format_version": 1,
        "num_items": 7,
        "context_features": {"country": 3},
        "history_features": ["dwell_s"],
    }
    info = parse_dataset_info(old, "dataset.json")
    assert {name: space.rows for name, space in info.spaces.items()} == {"item": 7, "country": 3}
    assert [(each.part, each.name, each.kind) for each in info.columns] == [
        ("sample", "country", "id"),
        ("event", "item_id", "id"),
        ("event", "dwell_s", "number"),
        ("candidate", "item_id", "id"),
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spaces", "item"), {"rows": 0}, "space 'item': rows and used must be whole numbers above 0"),
        (("spaces", "item"), {"rows": 5, "used": 6}, "space 'item': 6 ids are used, but there are 5 rows"),
        (("spaces", "item"), {"rows": 5, "row": 6}, "space 'item' has the unknown field 'row'"),
        (("spaces", "tag"), {"rows": 5, "keys": "a", "hash": "b"}, "space 'tag' has keys and a hash"),
        (("spaces", "tag"), {"rows": 5, "unbounded": 1}, "space 'tag': unbounded must be true or false, got 1"),
        (("spaces", "tag"), {"rows": 5, "unbounded": True, "hash": "b"}, "space 'tag' is unbounded: its ids are keys"),
        (("spaces", "tag"), {"rows": 5, "unbounded": True, "key_kind": "x"}, "keys text or number, got 'x'"),
        (("spaces", "tag"), {"rows": 5, "key_kind": "text"}, "key_kind says of unbounded keys text or number"),
        (("spaces", "rating"), {"rows": 5, "unbounded": True}, "cannot be of 'rating', which is unbounded"),
        (("spaces", "item"), {"rows": 5, "unbounded": True}, "'item' is unbounded, so 'item' can have no columns"),
        (("spaces", "a.b"), {"rows": 5}, "space 'a.b' must have a name without dot"),
        (("spaces", "number"), {"rows": 5}, "other than 'number'"),
        (("clock",), "local", "'clock' must be one of unix, relative, got 'local'"),
        (("cut",), "by_day", "'cut' must be one of by_time, by_place, got 'by_day'"),
        (("event", "item_id"), "tag", "'event' must hold the column 'item_id' of the space 'item'"),
        (("event", "action"), "tag", "column 'action' of 'event' must have a name"),
        (("event", "surface"), "shop", "column 'surface' of 'event' is 'shop', expected 'number', a space or [space]"),
        (("item", "item_id"), "item", "column 'item_id' of 'item' cannot be called"),
        (("sample", "num_candidates"), "number", "cannot be called 'num_candidates'"),
        (("label", "rating"), ["rating"], "column 'rating' of 'label' is ['rating'], expected 'number', a space"),
        (("numbers", "event.price"), GOOD["numbers"]["event.dwell_s"], "'numbers' describes 'event.price'"),
        (("numbers", "event.dwell_s"), {"count": 1}, "numbers of 'event.dwell_s' must give count, missing"),
        (("weight",), "rating", "'weight' must name a label column of numbers, got 'rating'"),
        (("actions",), [], "'actions' must name at least one action"),
        (("splits", "train"), {"samples": -1}, "split 'train' must give samples"),
        (("format_version",), 3, "format_version is 3, this version reads 1 and 2"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(path: tuple[str, ...], value: Any, message: str) -> None:
    values = copy.deepcopy(GOOD)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError) as error:
        parse_dataset_info(values, "shop/dataset.json")
    assert message in str(error.value) and "shop/dataset.json" in str(error.value)
