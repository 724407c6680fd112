"""A manifest reads back as it was, and anything else is refused before a byte of it is used."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.stream.position import DataPosition
from trainer.checkpoint.chunks import FileRecord
from trainer.checkpoint.loading import check_fits
from trainer.checkpoint.manifest import Manifest, StoredPiece, StoredTensor, decode
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.region import Region

MANIFEST = Manifest(
    base=None,
    base_digest=None,
    progress=Progress(step=3, samples=12, position=DataPosition(order=("of a test",), samples=12)),
    world_size=2,
    versions={"torch": "2"},
    files={"rank-00000.bin": FileRecord(32, (1,)), "rank-00001.bin": FileRecord(12, (2,))},
    tensors={
        "tables/item": StoredTensor(
            "float32",
            (5, 2),
            (
                StoredPiece("rank-00000.bin", 0, Region((0, 0), (4, 2))),
                StoredPiece("rank-00001.bin", 4, Region((4, 0), (1, 2))),
            ),
        ),
        "dense/step": StoredTensor("float32", (), (StoredPiece("rank-00001.bin", 0, Region((), ())),)),
    },
)


def test_reads_back_as_it_was() -> None:
    assert decode(MANIFEST.encode()) == MANIFEST


def test_a_full_checkpoint_of_the_format_before_is_read() -> None:
    values = json.loads(MANIFEST.encode())
    del values["base_digest"]
    assert decode(json.dumps({**values, "format": 2}).encode()) == MANIFEST


def _item(values: Any) -> Any:
    return values["tensors"]["tables/item"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=4), "of format 4, written by .*: use the code that wrote it"),
        (lambda v: v.pop("format"), "lacks something"),
        (lambda v: v["progress"].pop("position"), "lacks something"),
        (lambda v: v["progress"]["position"].pop("order"), "data position must have the keys"),
        (lambda v: v["files"].update({"../../home.bin": {"bytes": 0, "crc32": []}}), "no name of a file"),
        (lambda v: v["files"]["rank-00000.bin"].update(bytes=31), "outside its tensor or file"),
        (lambda v: v["files"]["rank-00000.bin"].update(crc32=[]), "have 1 chunks, not 0"),
        (lambda v: _item(v)["pieces"].pop(), "has 10 values, its pieces hold 8"),
        (lambda v: _item(v)["pieces"][0].update(start=-4), "outside its tensor or file"),
        (lambda v: _item(v)["pieces"][0].update(offsets=[2, 0]), "outside its tensor or file"),
        (lambda v: _item(v)["pieces"][0].update(file="rank-00007.bin"), "lacks something"),
        (lambda v: _item(v).update(dtype="float7"), "lacks something"),
        (lambda v: v.update(tensors=3), "lacks something"),
        (lambda v: v.update(base="../.."), "base must be a whole number, got '../..'"),
        (lambda v: v.update(world_size=None), "world_size must be a whole number, got None"),
        (lambda v: _item(v)["pieces"][1].update(start=1.5), "lies at other than whole numbers"),
        (lambda v: _item(v)["pieces"][1].update(start=math.nan), "lies at other than whole numbers"),
        (lambda v: _item(v)["pieces"][1].update(rows={"start": 0, "count": 0.5}), "lies at other than whole numbers"),
        (lambda v: _item(v)["pieces"][1].update(rows={"start": 0.5, "count": 0}), "lies at other than whole numbers"),
        (lambda v: v.update(base=3, base_digest="a"), "of step 3 and needs a later one, of step 3"),
        (lambda v: v.update(base=2), "needs the checkpoint of step 2, but does not say which"),
        (lambda v: v.update(base=2, format=2), "of format 2, written by .*: use the code that wrote it"),
    ],
)
def test_another_form_is_refused(change: Any, message: str) -> None:
    values = json.loads(MANIFEST.encode())
    change(values)
    with pytest.raises(ValueError, match=message):
        decode(json.dumps(values).encode())


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\x80\x04.", b"3", b"[" * 100_000, MANIFEST.encode()[:-20]])
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        decode(content)


JUNK = (None, True, -1, 1.5, math.inf, math.nan, 2**70, "", "x", "../..", [], {}, [1, 2], {"a": 1}, [[1]], "9" * 5000)


def test_whatever_stands_in_any_place_is_read_or_refused_in_one_way() -> None:
    """And what a tensor's place is made of is whole numbers, where it was read."""
    for path in _paths(json.loads(MANIFEST.encode())):
        for junk in JUNK:
            values = json.loads(MANIFEST.encode())
            holder = values
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = junk
            try:
                found = decode(json.dumps(values).encode())
            except ValueError:
                continue
            pieces = [piece for tensor in found.tensors.values() for piece in tensor.pieces]
            assert all(type(number) is int for piece in pieces for number in (piece.start, *piece.region.offsets))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _paths(value[key], (*path, key))


def test_a_tensor_without_a_value_is_nothing_that_a_checkpoint_lacks() -> None:
    stored = {name: (each.dtype, each.shape) for name, each in MANIFEST.tensors.items()}
    check_fits(MANIFEST, stored)
    check_fits(MANIFEST, {**stored, "dense/numbers.borders": ("float32", (2, 0))})
    with pytest.raises(ValueError, match=r"lacks 'dense/numbers.borders', which the model has"):
        check_fits(MANIFEST, {**stored, "dense/numbers.borders": ("float32", (2, 1))})
    with pytest.raises(ValueError, match=r"holds 'dense/step', which the model lacks"):
        check_fits(MANIFEST, {"tables/item": stored["tables/item"]})
