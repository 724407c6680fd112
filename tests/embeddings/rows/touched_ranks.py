"""What the ranks of the tests of touched and of trained rows run."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from embeddings.rows.touched import TouchedRows
from embeddings.rows.trained import TrainedRows
from embeddings.tables import rows_by_feature, table_weights
from tests.embeddings.sharded import LAYOUTS, STEPS, TABLES, global_batch, jagged, shard, tables_of

Shards = list[tuple[str, int, int, list[int], list[int]]]
"""(table, first row, rows, rows of the table that are marked, those after `clear`) of each shard."""


def train_every_layout(folder: str) -> dict[str, tuple[Shards, dict[str, list[int]]]]:
    """After some steps, and evaluations of other rows: this rank's shards; what each feature's ids are replaced by."""
    return {layout: _train(layout, Path(folder)) for layout in LAYOUTS}


def _train(layout: str, folder: Path) -> tuple[Shards, dict[str, list[int]]]:
    _, model, optimizers = shard(layout, folder)
    tables = tables_of(model)
    touched = TouchedRows(tables)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        mine = {feature: samples[rank::ranks] for feature, samples in global_batch(step).items()}
        optimizers.zero_grad()
        torch.stack([rows.values().sum() for rows in rows_by_feature(model(jagged(mine))).values()]).sum().backward()
        optimizers.step()
        others = {feature: samples[rank::ranks] for feature, samples in global_batch(step + 100).items()}
        with torch.no_grad():
            model(jagged(others))
    held = [
        (name, *(box[0] for box in (part.metadata.shard_offsets, part.metadata.shard_sizes)))
        for name, value in table_weights(tables).items()
        if isinstance(value, ShardedTensor)
        for part in value.local_shards()
        if part.tensor.numel()
    ]
    marked = [_rows(touched, name, first) for name, first, _ in held]
    touched.clear()
    shards = [
        (name, first, count, rows, _rows(touched, name, first))
        for (name, first, count), rows in zip(held, marked, strict=True)
    ]
    trained = TrainedRows(tables, optimizers, torch.device("cpu"))
    every = {feature: [[*range(table.num_embeddings)]] for table in TABLES for feature in table.features}
    replaced = trained.replace_unknown(jagged({**every, "noise": [[10**9]]}))
    parts = replaced.values().split(replaced.length_per_key())
    return shards, {name: ids.tolist() for name, ids in zip(replaced.keys(), parts, strict=True)}


def _rows(touched: TouchedRows, table: str, first: int) -> list[int]:
    rows = touched.rows(table, first)
    assert rows is not None, (table, first)
    return (rows + first).tolist()
