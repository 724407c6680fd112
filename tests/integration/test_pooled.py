"""Tables that give sums, however cut: the same training as with rows added up later, checkpoints that any of them goes
on from, and as many bytes between ranks as the plan says."""

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from launch.node import free_port
from pipelines.overlap import StepPipeline
from tests.support.small_data import small_dataset
from tests.support.training import SMALL, losses, read_checkpoint, read_lines
from trainer.command_line import run_command
from trainer.commands import app

STEPS = 10
# Tags of items, many a video, wide enough to be cut into columns, which takes another optimizer than the default.
TAG = {"embedding_dim": 64, "optimizer": {"kind": "adagrad", "learning_rate": 0.05}}
COMMON = (
    *SMALL,
    f"max_steps={STEPS}",
    "checkpoint.every_steps=2",
    "checkpoint.keep=9",
    "data.unknown_share=0.05",
    f"tables={json.dumps({'tag': TAG})}",
    "placement.exchange.deduplicate=true",
    # A step's ids travel in that step.
    "overlap=plain",
)
RUNS = {
    "single": (1, 1, 0),
    "row_wise": (1, 2, 2),
    "table_row_wise": (2, 2, 4),
    "grid_shard": (2, 2, 6),
    "single again": (1, 1, 8),
}
"""Nodes, ranks of each, and the step of the run before that each goes on from; named as the table is cut where it is
pooled."""


def _rank(rank: int, nodes: int, ranks_a_node: int, port: int, run: Path, arguments: list[str]) -> None:
    """Train as one rank; writes the bytes that it hands to exchanges in steps."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes * ranks_a_node),
        "LOCAL_RANK": str(rank % ranks_a_node),
        "LOCAL_WORLD_SIZE": str(ranks_a_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    sent: list[int] = []
    exchange, step = dist.all_to_all_single, StepPipeline.step

    def counted(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        sent.append(input.nbytes)
        return exchange(output, input, *rest, **named)

    def counting(pipeline: Any, batches: Any) -> Any:
        with mock.patch.object(dist, "all_to_all_single", counted):
            return step(pipeline, batches)

    with mock.patch.object(StepPipeline, "step", counting):
        assert run_command(app, ["train", "kuairand_sample", "--run-dir", str(run), *arguments]) == 0
    (run / f"sent-{rank}").write_text(str(sum(sent)))


def _train_all(_: int, folder: Path, data: Path) -> None:
    """Each run after the other, in processes forked from this one, which has imported the trainer."""
    before = None
    for name, (nodes, ranks_a_node, step) in RUNS.items():
        kinds = {} if "single" in name else {"pooled": True, "sharding_types": [name]}
        settings = [*COMMON, f"data.path={data}", f"placement.tables={json.dumps({'tag': kinds} if kinds else {})}"]
        if before is not None:
            shutil.copytree(folder / before, folder / name)
        arguments = [*(["--from-step", str(step)] if step else []), "--set", *settings]
        mp.start_processes(
            _rank,
            (nodes, ranks_a_node, free_port(), folder / name, arguments),
            nprocs=nodes * ranks_a_node,
            start_method="fork",
        )
        before = name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs."""
    folder = tmp_path_factory.mktemp("pooled")
    # Two nodes of one machine would share its GPUs.
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        mp.spawn(_train_all, (folder, small_dataset()))
    return folder


def test_each_run_trains_as_the_one_with_single_lookups(folder: Path) -> None:
    last = f"checkpoints/step-{STEPS:08d}"
    single, expected = losses(read_lines(folder / "single/metrics.jsonl")), read_checkpoint(folder / "single" / last)
    assert len(single) == STEPS
    for name in RUNS:
        assert losses(read_lines(folder / name / "metrics.jsonl")) == pytest.approx(single, abs=1e-5), name
        tensors = read_checkpoint(folder / name / last)
        assert tensors.keys() == expected.keys()
        for tensor, value in expected.items():
            torch.testing.assert_close(tensors[tensor], value, rtol=1e-3, atol=1e-5)
        evaluations = [(folder / run / "eval.jsonl").read_text().splitlines()[-1] for run in ("single", name)]
        one, other = ({k: x for k, x in json.loads(line).items() if x is not None} for line in evaluations)
        assert len(one) > 20 and other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in RUNS if "single" not in name])
def test_plan_has_the_table_so_and_says_the_bytes_that_ranks_send(folder: Path, name: str) -> None:
    plan = json.loads((folder / name / "plan.json").read_text())
    assert plan["tables"]["tag"]["sharding_type"] == name and plan["tables"]["tag"]["pooled"]
    nodes, ranks_a_node, step = RUNS[name]
    sent = [int(Path(folder, name, f"sent-{rank}").read_text()) for rank in range(nodes * ranks_a_node)]
    # The plan is of mean samples, cut at the mean history; these are the log's next few.
    assert sum(sent) / len(sent) / (STEPS - step) == pytest.approx(plan["sent_bytes"], rel=0.15)
