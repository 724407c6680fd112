"""What ranks send each other: each id once trains the same, halved values round as stated, bytes are as planned."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.config import ExchangeConfig, PlacementConfig, SparseOptimizerConfig, TableConfig, TableConstraint
from embeddings.lookups.exchange import Codec, distinct_ids
from embeddings.machine import Machine
from embeddings.planner import plan_tables
from embeddings.planning.problem import BatchLoad
from embeddings.sharding import shard_tables
from embeddings.tables import rows_by_feature
from tests.embeddings import sharded
from tests.support.distributed import run_ranks

ONCE = ExchangeConfig(deduplicate=True)
ROUNDED = {
    "rounded": ExchangeConfig(deduplicate=True, rows="float16", gradients="bfloat16"),
    "never widened": ExchangeConfig(rows="bfloat16", gradients="bfloat16"),
}


@pytest.mark.parametrize("seed", range(8))
def test_every_id_is_found_again_among_its_tables_distinct_ones(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bags, features_of_tables = 1 + seed, [2, 1, 1, 3]
    lengths = torch.randint(0, 5, (sum(features_of_tables), bags), generator=generator)
    # A table without any ids.
    lengths[2] = 0
    ids = torch.randint(0, 7, (int(lengths.sum()),), generator=generator)
    found, spread, places = distinct_ids(ids, lengths, features_of_tables)
    torch.testing.assert_close(found[places], ids)
    assert spread.shape == lengths.shape
    of_tables = found.split([int(part.sum()) for part in spread.split(features_of_tables)])
    given = ids.split([int(part.sum()) for part in lengths.split(features_of_tables)])
    for distinct, mine, part in zip(of_tables, given, spread.split(features_of_tables), strict=True):
        assert distinct.tolist() == sorted(set(mine.tolist()))
        assert part.max() - part.min() <= 1


def test_an_id_that_is_in_no_table_does_not_become_another_tables() -> None:
    ids = torch.tensor([3, 10**9, 3])
    found, _, places = distinct_ids(ids, torch.tensor([[2], [1]]), [1, 1])
    assert found.tolist() == [3, 10**9, 3] and places.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("name", "rounding"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_values_are_rounded_as_the_setting_says(name: str, rounding: float) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3.5, 4, 1000)
    codec = Codec(getattr(torch, name), torch.float32)
    sent = codec.encode(values)
    assert sent.numel() == codec.calc_quantized_size(values.numel())
    returned = codec.decode(sent)
    assert returned.dtype == torch.float32
    assert ((returned - values).abs() <= rounding * values.abs() + (2**-25 if name == "float16" else 0)).all()


def test_rows_are_given_in_16_bits_where_nothing_is_added_up_in_them() -> None:
    narrow = {"rows": "bfloat16", "gradients": "bfloat16"}
    changes: list[dict[str, Any]] = [{}, {"rows": "float16"}, {"gradients": "float32"}, {"deduplicate": True}]
    given = [ExchangeConfig(**dict[str, Any](narrow | change)).given_as for change in changes]
    assert given == ["bfloat16", "float32", "float32", "float32"]


def test_wrong_types_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"placement.exchange.gradients must be one of float32, bfloat16, got 'float16'"
    ):
        ExchangeConfig(**dict[str, Any](gradients="float16"))


def trained(folder: Path, layouts: tuple[str, ...]) -> dict[str, Any]:
    """Layouts with every id sent once, then one with rounded rows and gradients."""
    results = {layout: sharded.train(layout, folder, save=False, exchange=ONCE) for layout in layouts}
    return results | {name: sharded.train("row_wise", folder, save=False, exchange=ROUNDED[name]) for name in ROUNDED}


def check_trained(results: list[dict[str, Any]], layouts: tuple[str, ...]) -> None:
    """What the ranks return of `trained` equals the unsharded tables."""
    state, outputs = sharded.oracle()
    for layout in (*layouts, *ROUNDED):
        final = sharded.whole([rank[layout]["final"] for rank in results])
        # Of the rounded: four steps of a rate of up to 0.3, each with a gradient that is off by up to 2^-8.
        exact = 5e-3 if layout in ROUNDED else 1e-6
        for name, value in state.items():
            tolerance = max(exact, 1e-3 if value.dtype == torch.float16 else 0)
            torch.testing.assert_close(final[name], value, rtol=10 * tolerance, atol=tolerance)
        for feature, values in outputs[-1].items():
            samples: list[Tensor] = [torch.empty(0)] * sharded.GLOBAL_SAMPLES
            for rank, result in enumerate(results):
                samples[rank :: len(results)] = result[layout]["outputs"][-1][feature]
            tolerance = max(exact, 1e-3 if feature == "brand" else 0)
            # Sums of pooled tables travel in full, and so do rows of tables that stay whole.
            kinds = {torch.bfloat16, torch.float32} if layout == "never widened" else {torch.float32}
            assert {sample.dtype for sample in samples} <= kinds
            found = torch.cat([sample.float() for sample in samples])
            torch.testing.assert_close(found, values, rtol=10 * tolerance, atol=tolerance)


def test_two_ranks_train_as_the_unsharded_tables(tmp_path: Path) -> None:
    layouts = ("row_wise", "table_wise", "column_wise")
    check_trained(run_ranks(2, trained, tmp_path, layouts), layouts)


TABLES = (
    TableConfig(name="item", num_embeddings=4000, embedding_dim=64, features=("item", "candidate")),
    TableConfig(
        name="wide",
        num_embeddings=500,
        embedding_dim=128,
        features=("wide",),
        optimizer=SparseOptimizerConfig(kind="sgd"),
    ),
    TableConfig(
        name="word",
        num_embeddings=700,
        embedding_dim=64,
        features=sharded.POOLED,
        optimizer=SparseOptimizerConfig(kind="sgd"),
        pooled="sample",
    ),
)
NODE = 2
"""Ranks of a node, where a kind takes several."""
IDS = 3200
BAG = 32


def skewed(rank: int) -> dict[str, list[list[int]]]:
    """Ids in bags, few of them often."""
    generator = torch.Generator().manual_seed(rank)
    batch = {}
    for table in TABLES:
        for feature in table.features:
            ids = (torch.rand(IDS, generator=generator) ** 3 * table.num_embeddings).long()
            batch[feature] = [bag.tolist() for bag in ids.split(BAG)]
    return batch


def distinct_parts() -> dict[str, float]:
    """Of rank 0."""
    batch = skewed(0)
    flat = {table.name: [i for name in table.features for bag in batch[name] for i in bag] for table in TABLES}
    return {name: len(set(ids)) / len(ids) for name, ids in flat.items()}


def planned_and_sent(kind: str, exchange: ExchangeConfig) -> tuple[float, float]:
    """Bytes that the plan says a rank sends, and those that this one hands to exchanges."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = sharded.Model(TABLES)
    plan = plan_tables(
        model,
        TABLES,
        machine=Machine(
            world_size=world_size,
            local_world_size=NODE if kind in sharded.ON_NODES else world_size,
            compute_device="cpu",
        ),
        placement=PlacementConfig(
            sharding_types=("row_wise" if kind in sharded.ON_NODES else kind, "table_wise"),
            exchange=exchange,
            tables={"word": TableConstraint(sharding_types=(kind,))},
        ),
        optimizer=SparseOptimizerConfig(),
        load=BatchLoad(
            samples_per_rank=1,
            ids_per_sample={feature: float(IDS) for table in TABLES for feature in table.features},
            bags_per_sample=dict.fromkeys(sharded.POOLED, IDS / BAG),
            distinct=distinct_parts(),
        ),
    )
    module, optimizers = shard_tables(
        model, plan, optimizer=SparseOptimizerConfig(), device=torch.device("cpu"), seed=0
    )
    sent = 0
    exchanged = dist.all_to_all_single

    def counted(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        nonlocal sent
        sent += input.nbytes
        return exchanged(output, input, *rest, **named)

    with mock.patch.object(dist, "all_to_all_single", counted):
        rows = rows_by_feature(module(sharded.jagged(skewed(rank))))
        torch.stack([value.values().sum() for value in rows.values()]).sum().backward()
        optimizers.step()
    return plan.sent_bytes, sent


def trained_and_sent(folder: Path, layouts: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Both, by layouts and by ways to exchange."""
    os.environ["LOCAL_WORLD_SIZE"] = str(NODE)
    return trained(folder, layouts), {
        "in full": planned_and_sent("row_wise", ExchangeConfig()),
        "once": planned_and_sent("row_wise", ONCE),
        "rounded": planned_and_sent("row_wise", ExchangeConfig(rows="float16", gradients="bfloat16")),
        "columns": planned_and_sent("column_wise", ONCE),
        **{kind: planned_and_sent(kind, ExchangeConfig()) for kind in sharded.ON_NODES},
    }


def test_four_ranks_train_as_the_unsharded_tables_and_send_as_many_bytes_as_planned(tmp_path: Path) -> None:
    results = run_ranks(4, trained_and_sent, tmp_path, ("row_wise",))
    check_trained([rank[0] for rank in results], ("row_wise",))
    mean = {way: sum(rank[1][way][1] for rank in results) / len(results) for way in results[0][1]}
    for way, sent in mean.items():
        assert results[0][1][way][0] == pytest.approx(sent, rel=0.05), way
    assert mean["once"] < mean["in full"] / 1.4 and mean["rounded"] < mean["in full"] / 1.8
