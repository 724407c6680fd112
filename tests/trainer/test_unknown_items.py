"""Items that come after the training: what a ranker says of them, with and without a trained row for the unknown."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from pipelines.config import DataConfig
from pipelines.overlap import StepPipeline
from pipelines.reading.loader import build_loader, dataset_info
from tests.pipelines.made_up import dataset_json, table_of
from tests.support.distributed import run_ranks
from trainer.build import build_parallel, machine_of, make_plan
from trainer.config import ScheduleConfig, TrainConfig
from trainer.labels.config import LabelConfig
from trainer.models.config import InputConfig
from trainer.parallel.mesh import Mesh
from trainer.recipes import load_recipe
from trainer.resolve import resolve

KNOWN, NEW = range(1, 61), range(61, 91)
CANDIDATES = 8


def write_log(folder: Path, *, new: bool) -> None:
    """Users who nearly always click items of odd ids and hardly ever even ones; `new` items come with evaluation."""
    draw = np.random.default_rng(7)

    def row(user: int, items: np.ndarray) -> dict[str, Any]:
        clicks = (draw.random(len(items)) < np.where(items % 2, 0.95, 0.05)).astype(int)
        parts = {"history": slice(0, -CANDIDATES), "candidate": slice(-CANDIDATES, None)}
        values = {"item_id": items, "action": clicks, "timestamp": 1_700_000_000 + np.arange(len(items))}
        of_parts = {f"{part}_{name}": v[at].tolist() for part, at in parts.items() for name, v in values.items()}
        return {"user_id": user, "country": 1, **of_parts, "history_watch_time": [0] * (len(items) - CANDIDATES)}

    splits = {"train": [row(user, draw.choice(KNOWN, 16)) for user in range(384)], "eval": []}
    for user in range(384, 500):
        items = draw.choice(KNOWN, 16)
        items[-CANDIDATES // 2 :] = draw.choice(NEW if new else KNOWN, CANDIDATES // 2)
        splits["eval"].append(row(user, items))
    for split, rows in splits.items():
        (folder / split).mkdir(parents=True)
        pq.write_table(table_of(rows), folder / split / "part-0.parquet", row_group_size=64)
    (folder / "dataset.json").write_text(json.dumps(dataset_json(splits)))


def configuration(path: str, share: float) -> TrainConfig:
    recipe = replace(load_recipe("kuairand_sample"), schedule=ScheduleConfig())
    data = DataConfig(
        path=path, global_batch_size=32, max_history_len=24, num_epochs=4, reader_threads=0, unknown_share=share
    )
    layer = replace(recipe.model.layer, dropout=0.0, qk_dim=8, value_dim=8)
    inputs = InputConfig(event=("item_id",), candidate=("item_id",), context=(), counts=())
    model = replace(recipe.model, dim=16, layer=layer, input=inputs, labels=(LabelConfig(name="click"),))
    optimizer = replace(recipe.sparse_optimizer, learning_rate=0.1)
    return replace(
        recipe, data=data, model=model, embedding_dim=16, sparse_optimizer=optimizer, overlap="plain", seed=1
    )


def train_and_evaluate(*cases: tuple[str, float]) -> list[tuple[dict[str, float], str]]:
    """What is measured after a training, and the table, for each log and share of ids that are hidden."""
    return [_train_and_evaluate(path, share) for path, share in cases]


def _train_and_evaluate(path: str, share: float) -> tuple[dict[str, float], str]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(rank=rank, world_size=world_size, local_world_size=world_size, device=torch.device("cpu"))
    config = configuration(path, share)
    resolved = resolve(config, dataset_info(config.data))
    model = build_parallel(resolved, make_plan(resolved, machine_of(mesh)), mesh)
    selection = resolved.task.selection
    loader = build_loader(config.data, split="train", rank=rank, world_size=world_size, selection=selection)
    batches = iter(loader)
    pipeline = StepPipeline("plain", model.module, model.optimizers, mesh.device, model.loss)
    for step in range(loader.total_samples // config.data.global_batch_size):
        model.optimizers.set_step(step + 1)
        pipeline.step(batches)
    found = resolved.task.evaluate(model, mesh)
    return dict(found.metrics), found.table


def test_a_trained_unknown_row_says_the_usual_of_new_items(tmp_path: Path) -> None:
    """Nothing tells new items apart, so the best that can be said of them is the usual rate, whose NE is 1 by its
    definition.  A row that was only drawn says something else, and says it as surely as of an item that is known."""
    new, known = str(tmp_path / "new"), str(tmp_path / "known")
    write_log(Path(new), new=True)
    write_log(Path(known), new=False)
    ((drawn, _), (learnt, table), (usual, usual_table)), *_ = run_ranks(
        1, train_and_evaluate, (new, 0.0), (new, 0.05), (known, 0.0)
    )
    assert drawn["unknown_share"] == learnt["unknown_share"] == 0.5
    assert learnt["ne_unknown/click"] < 1.05 < drawn["ne_unknown/click"]
    assert learnt["auc_unknown/click"] == pytest.approx(0.5, abs=0.1)
    assert learnt["ne/click"] < drawn["ne/click"]
    assert "50.00% of the candidates have an item that training has not seen" in table
    assert not [name for name in usual if "unknown" in name] and "has not seen" not in usual_table
    assert usual["auc/click"] > 0.9
    for [(other, _)] in run_ranks(2, train_and_evaluate, (new, 0.05)):
        assert other == pytest.approx(learnt, rel=1e-3, abs=1e-4)
