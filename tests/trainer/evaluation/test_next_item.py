"""Rows that are no item's, the unknown one's and those for items to come, are ranked beside none, on cut tables."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.distributed.types import ShardedTensor

from embeddings.tables import table_weights
from pipelines.features import UNKNOWN_ID
from pipelines.reading.loader import dataset_info
from tests.support.distributed import run_ranks
from tests.support.small_data import small_dataset
from trainer.build import build_parallel, machine_of, make_plan
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.recipes import load_recipe
from trainer.resolve import resolve
from trainer.typed_values import apply_overrides

SPARE = 40


def write_row(model: ParallelModel, row: int) -> None:
    """Another row of the items' table, where it lies on this rank."""
    weights = table_weights(model.tables).get("item")
    for shard in weights.local_shards() if isinstance(weights, ShardedTensor) else ():
        place = row - shard.metadata.shard_offsets[0]
        if 0 <= place < len(shard.tensor):
            shard.tensor.detach()[place] = torch.linspace(-9, 9, shard.tensor.shape[1])


def evaluated(path: str) -> list[dict[str, float]]:
    """The model's metrics and popularity's: as it is drawn, with other rows of no item, and with one of an item."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(rank=rank, world_size=world_size, local_world_size=world_size, device=torch.device("cpu"))
    settings = (f"data.path={path}", "data.max_history_len=24", "overlap=plain")
    placement = f"placement.tables={json.dumps({'item': {'sharding_types': ['row_wise']}})}"
    config = apply_overrides(load_recipe("kuairand_retrieval"), [*settings, placement])
    resolved = resolve(config, dataset_info(config.data))
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    used, found = resolved.info.spaces["item"].used, []
    for rows in ([], [UNKNOWN_ID, *range(used, used + SPARE)], [1]):
        for row in rows:
            write_row(model, row)
        measured = resolved.task.evaluate(model, mesh)
        found.append({**measured.metrics, **{f"popularity {name}": x for name, x in measured.baseline.items()}})
    return found


def test_rows_of_no_item_are_ranked_beside_none(tmp_path: Path) -> None:
    data = Path(shutil.copytree(small_dataset(), tmp_path / "data"))
    values = json.loads((data / "dataset.json").read_text())
    values["spaces"]["item"]["rows"] += SPARE
    (data / "dataset.json").write_text(json.dumps(values))
    (drawn, others, of_item), on_second = run_ranks(2, evaluated, str(data))
    assert others == drawn and "popularity mrr" in drawn
    assert of_item["mrr"] != drawn["mrr"] == on_second[0]["mrr"]
