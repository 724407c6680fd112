"""Global batches: the same for any number of ranks, resumable anywhere, complete, and equal to a naive reading."""

import json
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.batches.batch import Batch
from pipelines.batches.packed import bag_lens
from pipelines.config import DataConfig, StochasticLengthConfig
from pipelines.reading.loader import build_loader, dataset_info
from pipelines.selection import Draw, select
from pipelines.storage.columns import Samples
from pipelines.storage.source import ParquetSource
from pipelines.stream.position import DataPosition, position_from_dict
from tests.pipelines.made_up import dataset_json, made_up_rows, table_of, write_dataset
from trainer.models.negatives import retrieval_batch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("data") / "made_up"
    return str(folder), write_dataset(folder)


@pytest.fixture
def config(data: tuple[str, Any]) -> DataConfig:
    return DataConfig(
        path=data[0],
        global_batch_size=16,
        max_history_len=24,
        num_epochs=2,
        window_samples=20,
        reader_threads=0,
        seed=3,
    )


def users(batch: Batch) -> list[int]:
    return [user for user in batch.inputs.user_id.tolist() if user >= 0]


def global_stream(
    config: DataConfig, world_size: int, position: DataPosition | None = None, stop: int | None = None
) -> list[list[Batch]]:
    """The shares of all ranks, one list a global batch; fails if ranks disagree on the number of batches."""
    selection = select(dataset_info(config))
    ranks = [
        build_loader(config, split="train", rank=rank, world_size=world_size, position=position, selection=selection)
        for rank in range(world_size)
    ]
    return [list(shares) for shares in islice(zip(*ranks, strict=True), stop)]


def order(stream: list[list[Batch]]) -> list[list[int]]:
    return [sorted(user for share in shares for user in users(share)) for shares in stream]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("balance", ["none", "equal", "bounded"])
def test_global_batches_do_not_depend_on_ranks(config: DataConfig, world_size: int, balance: Any) -> None:
    alone = global_stream(replace(config, balance=balance), 1)
    together = global_stream(replace(config, balance=balance), world_size)
    assert order(together) == order(alone)
    assert [shares[0].position for shares in together] == [shares[0].position for shares in alone]
    for shares, [whole] in zip(together, alone, strict=True):
        assert {share.imbalance for share in shares} == {shares[0].imbalance}
        assert shares[0].global_tokens == whole.inputs.timestamp.numel()
        assert sum(float(share.labels.loss_denominator) for share in shares) == pytest.approx(
            whole.labels.action.numel()
        )


def test_each_pass_holds_every_sample_once(config: DataConfig, data: tuple[str, Any]) -> None:
    every = [row["user_id"] for row in data[1]["train"]]
    stream = [user for [share] in global_stream(config, 1) for user in users(share)]
    assert sorted(stream[: len(every)]) == sorted(stream[len(every) :]) == every
    assert stream[: len(every)] != stream[len(every) :]
    assert len(stream) == build_loader(config, split="train", rank=0, world_size=1).total_samples


def test_the_loss_is_divided_by_the_labelled_candidates_and_nothing_else(tmp_path: Path) -> None:
    """Where samples have no candidate or no history, and ranks no sample; in retrieval, by the predictions."""
    rows = made_up_rows(17, seed=4)
    for number, row in enumerate(rows):
        part = {0: "candidate", 1: "history"}.get(number % 3, "")
        if part == "history" or row["history_item_id"]:
            row.update({name: [] for name in row if part and name.startswith(f"{part}_")})
    folder = tmp_path / "data"
    for split in ("train", "eval"):
        (folder / split).mkdir(parents=True)
        pq.write_table(table_of(rows), folder / split / "part-0.parquet", row_group_size=5)
    (folder / "dataset.json").write_text(json.dumps(dataset_json({"train": rows, "eval": rows})))
    config = DataConfig(path=str(folder), global_batch_size=8, max_history_len=24, reader_threads=0)
    by_user = {row["user_id"]: row for row in rows}
    for world_size in (1, 3):
        for shares in global_stream(config, world_size):
            of_batch = [by_user[user] for share in shares for user in users(share)]
            labelled = sum(len(row["candidate_item_id"]) for row in of_batch)
            lens = [min(len(row["history_item_id"]), 24) + len(row["candidate_item_id"]) for row in of_batch]
            followed = sum(
                max(0, min(len(row["history_item_id"]), 24) - (not row["candidate_item_id"])) for row in of_batch
            )
            for share in shares:
                assert float(share.labels.next_denominator) == pytest.approx(max(followed, 1) / world_size)
                assert float(share.labels.loss_denominator) == pytest.approx(max(labelled, 1) / world_size)
                retrieval = retrieval_batch(
                    share, num_items=500, num_negatives=2, shared=False, seed=0, world_size=world_size
                )
                assert float(retrieval.loss_denominator) == pytest.approx(max(sum(lens) - len(lens), 1) / world_size)
    assert any(not row["candidate_item_id"] for row in rows)
    assert any(not row["history_item_id"] for row in rows)


@pytest.mark.parametrize("count", [0, 7, None])
def test_drawn_ids_are_those_of_the_global_batch_on_every_rank(config: DataConfig, count: int | None) -> None:
    """Wherever a run was resumed, and on ranks without a sample too."""
    info = dataset_info(config)
    usual = select(info)
    drawing = replace(usual, draw=Draw(name="drawn", num_ids=info.num_items, count=count))
    few = replace(config, global_batch_size=2, num_epochs=1)
    batches = {
        (world_size, rank): list(build_loader(few, split="train", rank=rank, world_size=world_size, selection=drawing))
        for world_size in (1, 3)
        for rank in range(world_size)
    }
    drawn = {place: [batch.inputs.ids_host("drawn").tolist() for batch in of] for place, of in batches.items()}
    alone = drawn.pop((1, 0))
    assert all(others == alone for others in drawn.values())
    every = info.num_items if count is None else count
    assert all(len(ids) == every and set(ids) <= set(range(info.num_items)) for ids in alone)
    if count is None:
        assert all(ids == list(range(info.num_items)) for ids in alone)
    elif count:
        assert len(set(map(tuple, alone))) == len(alone)
    for batch in (batch for of in batches.values() for batch in of):
        ids, inputs = batch.inputs.ids_host("item_id").tolist(), batch.inputs
        events, candidates = (iter(part) for part in (ids[: inputs.action.numel()], ids[inputs.action.numel() :]))
        following = []
        for h, c in zip(inputs.history_lens.tolist(), inputs.num_candidates.tolist(), strict=True):
            own, asked = [next(events) for _ in range(h)], [next(candidates) for _ in range(c)]
            following += [*own, *asked, -1][1 : 1 + h]
        assert batch.labels.next_item_id.tolist() == following
        assert batch.labels.drawn.tolist() == batch.inputs.ids_host("drawn").tolist()
    position = batches[1, 0][2].position
    later = build_loader(few, split="train", rank=0, world_size=1, selection=drawing, position=position)
    assert [batch.inputs.ids("drawn").tolist() for batch in later] == alone[3:]
    plain = build_loader(few, split="train", rank=0, world_size=1, selection=usual)
    for with_draw, without in zip(batches[1, 0], plain, strict=True):
        for feature in list(without.inputs.features.keys()):
            assert torch.equal(with_draw.inputs.ids(feature), without.inputs.ids(feature))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["off", "plain", "load_balanced"])
def test_interrupted_at_random_steps_continues_exactly(config: DataConfig, seed: int, mode: Any) -> None:
    lengths = StochasticLengthConfig(mode=mode, warmup_batches=2, recalibration_batches=3)
    config = replace(config, stochastic_length=lengths, num_epochs=2, global_batch_tokens=150 if seed % 2 else None)
    expected = global_stream(config, 1)
    generator = np.random.default_rng(seed)
    position, seen, tokens = None, [], []
    while len(seen) < len(expected):
        stream = global_stream(config, int(generator.integers(1, 5)), position, int(generator.integers(1, 9)))
        seen += order(stream)
        tokens += [shares[0].global_tokens for shares in stream]
        position = position_from_dict(stream[-1][0].position.as_dict())
    assert seen == order(expected)
    assert tokens == [shares[0].global_tokens for shares in expected]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_reader_process_changes_nothing(config: DataConfig, threads: int) -> None:
    plain = [share for [share] in global_stream(config, 1)]
    read_ahead = [share for [share] in global_stream(replace(config, reader_threads=threads, prefetch_batches=3), 1)]
    assert [users(batch) for batch in read_ahead] == [users(batch) for batch in plain]
    for ours, theirs in zip(read_ahead, plain, strict=True):
        assert ours.position == theirs.position
        torch.testing.assert_close(ours.inputs.features.values(), theirs.inputs.features.values())


def test_batches_equal_a_naive_reading(config: DataConfig, data: tuple[str, Any]) -> None:
    rows = {row["user_id"]: row for row in data[1]["train"]}
    config = replace(config, max_candidates=2)
    for [batch] in global_stream(config, 1):
        chosen, inputs = [rows[user] for user in users(batch)], batch.inputs

        def history(name: str, chosen: list[dict[str, Any]] = chosen) -> list[Any]:
            return [value for row in chosen for value in row[f"history_{name}"][-24:]]

        def candidates(name: str, chosen: list[dict[str, Any]] = chosen) -> list[Any]:
            return [value for row in chosen for value in row[f"candidate_{name}"][:2]]

        expected = history("item_id") + candidates("item_id")
        assert inputs.features["item_id"].values().tolist() == inputs.ids_host("item_id").tolist() == expected
        assert inputs.features["sample.country"].values().tolist() == [row["country"] for row in chosen]
        assert inputs.history_lens.tolist() == [len(row["history_item_id"][-24:]) for row in chosen]
        assert inputs.num_candidates.tolist() == [len(row["candidate_item_id"][:2]) for row in chosen]
        assert inputs.features.lengths().tolist() == bag_lens([len(expected), len(chosen)]).tolist()
        assert inputs.action.tolist() == inputs.action_host.tolist() == history("action")
        assert inputs.timestamp.tolist() == history("timestamp") + candidates("timestamp")
        assert inputs.numbers["watch_time"].tolist() == history("watch_time")
        assert batch.labels.action.tolist() == candidates("action")


def test_a_rank_without_samples_gets_one_that_counts_for_nothing(config: DataConfig) -> None:
    last = global_stream(replace(config, max_samples=17), 3)[-1]
    assert sorted(len(users(share)) for share in last) == [0, 0, 1]
    empty = next(share for share in last if not users(share))
    assert empty.inputs.features.stride() == len(empty.inputs.user_id) == 1
    assert empty.inputs.action.numel() == empty.labels.action.numel() == 0
    assert empty.inputs.ids_host("sample.country").tolist() == [0]
    assert empty.global_samples == 1


def test_evaluation_is_one_pass_in_stored_order_with_full_histories(config: DataConfig, data: tuple[str, Any]) -> None:
    lengths = StochasticLengthConfig(mode="plain", alpha=1.1)
    config = replace(config, stochastic_length=lengths, eval_batch_size=10, balance="none")
    loader = build_loader(config, split="eval", rank=0, world_size=1)
    for _ in range(2):
        batches = list(loader)
        assert [user for batch in batches for user in users(batch)] == [row["user_id"] for row in data[1]["eval"]]
        lens = [length for batch in batches for length in batch.inputs.history_lens.tolist()]
        assert lens == [min(len(row["history_item_id"]), 24) for row in data[1]["eval"]]
    ranks = [list(build_loader(config, split="eval", rank=rank, world_size=4)) for rank in range(4)]
    assert {len(batches) for batches in ranks} == {3}


def test_stored_order_is_the_files(config: DataConfig, data: tuple[str, Any]) -> None:
    stream = global_stream(replace(config, order="stored", num_epochs=1), 1)
    assert [user for [share] in stream for user in users(share)] == [row["user_id"] for row in data[1]["train"]]


def test_token_budget_is_kept_and_nothing_lost(config: DataConfig) -> None:
    stream = global_stream(replace(config, global_batch_tokens=120), 2)
    assert max(shares[0].global_tokens for shares in stream) <= 120
    assert sum(shares[0].global_samples for shares in stream) == 206


def test_neighbouring_rows_stay_together_in_runs(config: DataConfig) -> None:
    stream = [user for [share] in global_stream(replace(config, shuffle_run=4), 1) for user in users(share)]
    neighbours = sum(after - before == 1 for before, after in pairwise(stream))
    assert neighbours > 0.6 * len(stream)


def test_runs_of_neighbours_spare_a_rank_most_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows decoded for each row trained on: at most those of a row group, and far fewer in runs of that size."""
    write_dataset(tmp_path / "data", train=2048, files=4, row_group=16)
    config = DataConfig(path=str(tmp_path / "data"), global_batch_size=256, max_history_len=24, reader_threads=0)
    read, kept = ParquetSource.read, 0
    decoded: dict[int, int] = {}

    def counted(source: ParquetSource, unit: int) -> Samples:
        decoded[run] += int(source.unit_rows[unit])
        return read(source, unit)

    monkeypatch.setattr(ParquetSource, "read", counted)
    for run in (1, 16):
        decoded[run] = 0
        batches = list(build_loader(replace(config, shuffle_run=run), split="train", rank=3, world_size=16))
        kept = sum(len(users(batch)) for batch in batches)
        assert kept == 2048 // 16
    assert decoded[1] <= 16 * kept
    assert decoded[16] < 0.4 * decoded[1]


def test_one_sample_above_the_token_budget_is_a_batch_of_its_own(config: DataConfig) -> None:
    stream = global_stream(replace(config, global_batch_tokens=1, num_epochs=1), 1)
    assert [shares[0].global_samples for shares in stream] == [1] * 103


def test_a_mix_draws_by_weight_and_repeats_each_source(config: DataConfig, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", train=20, first_user=1000)
    config = replace(config, mix_paths=(str(tmp_path / "other"),), mix_weights=(1.0, 3.0), max_samples=400)
    alone, together = global_stream(config, 1), global_stream(config, 3)
    assert order(alone) == order(together)
    stream = [user for [share] in alone for user in users(share)]
    other = [user for user in stream if user >= 1000]
    assert 0.68 < len(other) / len(stream) < 0.82
    for start in range(0, len(other) - 20, 20):
        assert sorted(other[start : start + 20]) == list(range(1000, 1020))


def test_an_interrupted_mix_continues_exactly(config: DataConfig, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", train=20, first_user=1000)
    config = replace(config, mix_paths=(str(tmp_path / "other"),), mix_weights=(1.0, 3.0), max_samples=400)
    expected = order(global_stream(config, 1))
    position, seen = None, []
    for world_size, steps in ((3, 5), (1, 1), (4, 9), (2, None)):
        stream = global_stream(config, world_size, position, steps)
        seen += order(stream)
        position = position_from_dict(json.loads(json.dumps(stream[-1][0].position.as_dict())))
    assert seen == expected


def test_resuming_under_another_order_is_refused(config: DataConfig) -> None:
    position = global_stream(config, 1)[0][0].position
    with pytest.raises(ValueError, match="data position belongs to other data"):
        global_stream(replace(config, seed=4), 1, position)


def test_uneven_parts_resume_with_another_batch_size(config: DataConfig) -> None:
    expected = [user for [share] in global_stream(config, 1) for user in users(share)]
    first = global_stream(config, 1)[:3]
    rest = global_stream(replace(config, global_batch_size=7), 2, first[-1][0].position)
    assert [user for [share] in first for user in users(share)] == expected[:48]
    assert sorted(user for shares in rest for share in shares for user in users(share)) == sorted(expected[48:])


@pytest.mark.parametrize("threads", [0, 1])
def test_an_address_reads_like_a_path(config: DataConfig, threads: int) -> None:
    """Through pyarrow's file systems, which also go to the reader process."""
    address = replace(config, path=f"file://{config.path}", reader_threads=threads)
    assert order(global_stream(address, 1, stop=3)) == order(global_stream(config, 1, stop=3))


def test_a_position_survives_json_and_refuses_other_keys(config: DataConfig) -> None:
    position = global_stream(config, 1, stop=2)[-1][0].position
    assert position_from_dict(json.loads(json.dumps(position.as_dict()))) == position
    with pytest.raises(ValueError, match="data position must have the keys"):
        position_from_dict({"samples": 3})


def test_batches_move_as_one(config: DataConfig) -> None:
    [batch] = global_stream(config, 1, stop=1)[0]
    moved = batch.to(torch.device("meta"))
    for name in ("user_id", "history_lens", "num_candidates", "action", "timestamp"):
        assert getattr(moved.inputs, name).device.type == "meta"
    assert moved.labels.action.device.type == moved.labels.loss_denominator.device.type == "meta"
    assert moved.inputs.features.values().device.type == moved.inputs.numbers["watch_time"].device.type == "meta"
    assert moved.inputs.history_lens_host.device.type == moved.inputs.action_host.device.type == "cpu"
    assert moved.inputs.numbers_host("watch_time").tolist() == batch.inputs.numbers["watch_time"].tolist()
    assert moved.position == batch.position
