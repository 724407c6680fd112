"""Data that comes in parts: trained on one part after another, gone on with when a part is added, each seen unseen."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.baseline import count_rates, item_counts
from pipelines.config import DataConfig
from pipelines.features import DatasetInfo
from pipelines.reading import loader
from pipelines.reading.loader import build_loader, dataset_info
from pipelines.storage.dataset_json import read_dataset_info
from pipelines.stream.position import DataPosition, position_from_dict
from tests.pipelines.made_up import dataset_json, made_up_rows, table_of

NAMES = (".", "part=00001", "part=00002")
SIZES = (20, 13, 9)


def write_parts(folder: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    """The first `count` parts, users numbered through; returns the training rows of each."""
    rows, first = {}, 0
    for name, size in list(zip(NAMES, SIZES, strict=True))[:count]:
        rows[name] = made_up_rows(size, seed=size, first_user=first)
        first += size
        for split in ("train", "eval"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of(rows[name]), folder / "train" / name / "part-0.parquet", row_group_size=4)
        # The newest part has nothing to evaluate.
        if name != NAMES[2]:
            pq.write_table(table_of(rows[name][:3]), folder / "eval" / name / "part-0.parquet")
    every = [row for part in rows.values() for row in part]
    values = dataset_json({"train": every, "eval": [row for part in rows.values() for row in part[:3]]})
    described = {
        **{key: values[key] for key in ("name", "actions", "source", "licence", "splits")},
        "format_version": 2,
        "spaces": {"item": {"rows": values["num_items"] + count}, "country": {"rows": 7}},
        "sample": {"country": "country"},
        "event": {"item_id": "item", "watch_time": "number"},
        "candidate": {"item_id": "item"},
        "parts": list(NAMES[:count]),
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return rows


def configuration(folder: Path, **changes: Any) -> DataConfig:
    values = {"global_batch_size": 6, "max_history_len": 24, "num_epochs": 2, "window_samples": 8, "reader_threads": 0}
    return DataConfig(path=str(folder), **(values | changes))


def stream(
    config: DataConfig, world_size: int = 1, position: DataPosition | None = None, stop: int | None = None
) -> tuple[list[list[int]], DataPosition | None]:
    """The users of each global batch, and the position after the last one."""
    ranks = [
        build_loader(config, split="train", rank=rank, world_size=world_size, position=position)
        for rank in range(world_size)
    ]
    batches = []
    for shares in islice(zip(*ranks, strict=True), stop):
        batches.append(sorted(user for share in shares for user in share.inputs.user_id.tolist() if user >= 0))
        position = position_from_dict(json.loads(json.dumps(shares[0].position.as_dict())))
    return batches, position


def test_parts_follow_one_another_and_no_batch_reaches_into_two(tmp_path: Path) -> None:
    rows = write_parts(tmp_path, 3)
    batches, _ = stream(configuration(tmp_path))
    seen = iter(batches)
    for part in rows.values():
        users = [row["user_id"] for row in part]
        taken: list[int] = []
        while len(taken) < 2 * len(users):
            taken += next(seen)
        assert sorted(taken) == sorted(2 * users)
    assert next(seen, None) is None
    assert stream(configuration(tmp_path), world_size=3)[0] == batches


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_goes_on_where_it_stood_when_parts_have_come_in(tmp_path: Path, stop: int) -> None:
    write_parts(tmp_path / "early", 1)
    write_parts(tmp_path / "late", 3)
    expected, _ = stream(configuration(tmp_path / "late"))
    before, position = stream(configuration(tmp_path / "early"), stop=stop)
    after, _ = stream(configuration(tmp_path / "late"), 2, position)
    assert before + after == expected


@pytest.mark.parametrize("stop", [2, 5, None])
def test_later_parts_are_trained_on_as_often_as_asked_then(tmp_path: Path, stop: int | None) -> None:
    """A run that began with two passes goes on with one: at the end of the first part, or in a pass of it."""
    rows = write_parts(tmp_path / "late", 3)
    write_parts(tmp_path / "early", 1)
    _, position = stream(configuration(tmp_path / "early"), stop=stop)
    assert position is not None
    config = configuration(tmp_path / "late", num_epochs=1)
    loader = build_loader(config, split="train", rank=0, world_size=1, position=position)
    after, end = stream(config, 1, position)
    # A second pass that was begun is left where it is; a first one goes on.
    first, later = SIZES[0], [row["user_id"] for name in NAMES[1:] for row in rows[name]]
    seen = [user for batch in after for user in batch]
    assert sorted(user for user in seen if user >= first) == sorted(later)
    assert sum(user < first for user in seen) == max(0, first - position.samples)
    assert end is not None and end.samples == loader.total_samples and len(after) == loader.steps_left
    assert stream(config, 1, end)[0] == []


def test_another_early_part_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path / "data", 1)
    _, position = stream(configuration(tmp_path / "data"), stop=2)
    other = made_up_rows(19, seed=1)
    write_parts(tmp_path / "other", 2)
    pq.write_table(table_of(other), tmp_path / "other" / "train" / "part-0.parquet", row_group_size=4)
    values = json.loads((tmp_path / "other" / "dataset.json").read_text())
    values["splits"]["train"]["samples"] -= 1
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="belongs to other data or another order of samples"):
        stream(configuration(tmp_path / "other"), position=position)


def test_evaluation_reads_the_newest_part_that_has_any_and_a_part_unseen_when_asked(tmp_path: Path) -> None:
    rows = write_parts(tmp_path, 3)
    config = configuration(tmp_path)

    def users(**options: Any) -> list[int]:
        loader = build_loader(config, split="eval", rank=0, world_size=1, **options)
        return sorted(user for batch in loader for user in batch.inputs.user_id.tolist())

    assert users() == [row["user_id"] for row in rows[NAMES[1]][:3]]
    assert users(unseen=2) == [row["user_id"] for row in rows[NAMES[2]]]


def test_what_scores_are_compared_with_is_counted_in_the_parts_before(tmp_path: Path) -> None:
    rows = write_parts(tmp_path, 3)
    config = configuration(tmp_path)
    info = dataset_info(config)
    for unseen, names in ((None, NAMES), (2, NAMES[:2]), (1, NAMES[:1])):
        candidates = [item for name in names for row in rows[name] for item in row["candidate_item_id"]]
        shares = [count_rates(config, info, ("click",), share, 2, unseen=unseen) for share in range(2)]
        assert sum(share.items.count.sum() for share in shares) == len(candidates)
        events = len(candidates) + sum(len(row["history_item_id"]) for name in names for row in rows[name])
        assert item_counts(config, info, unseen=unseen).sum() == events


def test_a_missing_part_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path, 3)
    (tmp_path / "train" / NAMES[2] / "part-0.parquet").unlink()
    with pytest.raises(ValueError, match=r"part=00002 holds no .parquet file"):
        stream(configuration(tmp_path))


def test_a_part_that_lacks_what_it_has_to_evaluate_is_no_reason_to_score_an_older_one(tmp_path: Path) -> None:
    write_parts(tmp_path, 3)
    description = json.loads((tmp_path / "dataset.json").read_text())
    description["splits"]["eval"]["files"] = 2
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    build_loader(configuration(tmp_path), split="eval", rank=0, world_size=1)
    (tmp_path / "eval" / NAMES[1] / "part-0.parquet").unlink()
    with pytest.raises(ValueError, match=r"eval holds 1 file\(s\), dataset.json tells of 2"):
        build_loader(configuration(tmp_path), split="eval", rank=0, world_size=1)


def test_the_description_is_read_as_often_for_many_parts_as_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: str) -> DatasetInfo:
        read.append(path)
        return read_dataset_info(path)

    monkeypatch.setattr(loader, "read_dataset_info", counted)
    times = []
    for count in (1, 3):
        write_parts(tmp_path / str(count), count)
        read.clear()
        build_loader(configuration(tmp_path / str(count)), split="train", rank=0, world_size=1)
        times.append(len(read))
    assert times == [1, 1]
