"""Digests of vocabularies: the same for the same keys in the same order, however stored, and another for any change."""

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from pipelines.features import DatasetInfo, Space
from pipelines.storage.vocabulary import check_same_ids, keys_digest, vocabularies
from tests.support.datasets import made_up_info

WORDS = ["a", "bc", "", "d\n", "\u00e9"]


def test_parts_and_types_of_storage_do_not_matter() -> None:
    whole = keys_digest([pa.array(WORDS)])
    assert keys_digest([pa.array(WORDS[:2]), pa.array([], pa.string()), pa.array(WORDS[2:])]) == whole
    assert keys_digest([pa.array(["x", *WORDS]).slice(1)]) == whole
    assert keys_digest([pa.array(WORDS, pa.large_string())]) == whole
    assert keys_digest([pa.array([word.encode() for word in WORDS])]) == whole
    numbers = keys_digest([pa.array([1, 22, 333])])
    assert keys_digest([pa.array([1, 22, 333], pa.uint16())]) == numbers
    assert keys_digest([pa.array([Decimal(1), Decimal(22), Decimal(333)], pa.decimal128(38, 0))]) == numbers
    assert keys_digest([pa.array(["1", "22", "333"])]) == numbers


def test_any_other_keys_or_order_have_another_digest() -> None:
    others = [["ab", "c"], ["a", "bc"], ["bc", "a"], ["a", "bc", ""], ["a"], ["abc"], []]
    assert len({keys_digest([pa.array(keys, pa.string())]) for keys in others}) == len(others)
    generator = np.random.default_rng(0)
    keys = [str(key) for key in generator.permutation(1000)]
    swapped = [keys[1], keys[0], *keys[2:]]
    assert keys_digest([pa.array(keys)]) != keys_digest([pa.array(swapped)])


def test_renumbered_ids_are_refused_with_both_digests() -> None:
    def info(digest: str | None) -> DatasetInfo:
        plain = made_up_info(num_items=9, actions=("click",))
        return replace(plain, spaces={"item": Space(name="item", rows=9, used=9, digest=digest)})

    assert vocabularies(info("aa")) == {"item": "aa", "event.action": "click"}
    check_same_ids({"item": "aa"}, info("aa"), data="new", other="the run")
    check_same_ids({}, info("aa"), data="new", other="the run")
    check_same_ids({"item": "aa"}, info(None), data="new", other="the run")
    with pytest.raises(
        ValueError, match=r"'item' mean something else in new \(digest bb\) than in the run \(digest aa\)"
    ):
        check_same_ids({"item": "aa"}, info("bb"), data="new", other="the run")
