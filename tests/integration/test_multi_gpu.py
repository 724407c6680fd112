"""Two GPUs, by NCCL: every placement of tables, shared histories, and runs that change their number of GPUs.

Beside these, all tests that start ranks take a GPU each where there are GPUs (`tests.support.training`).
"""

import json
from pathlib import Path

import pytest
import torch

from launch.node import free_port
from tests.support.training import TIMEOUT_S, losses, read_checkpoint, read_lines, start_training, train

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
COMMON = ("checkpoint.every_steps=2", "model.layer.num_heads=2")
STEPS = "max_steps=6"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one GPU."""
    run = tmp_path_factory.mktemp("one") / "run"
    train(run, 1, STEPS, *COMMON)
    return run


@pytest.mark.parametrize(
    "settings",
    [
        ('placement.sharding_types=["table_wise"]',),
        ('placement.sharding_types=["row_wise"]',),
        ('placement.sharding_types=["replicated"]',),
        ('placement.tables={"tag":{"pooled":true,"sharding_types":["row_wise"]}}',),
        ('placement.tables={"tag":{"pooled":true,"sharding_types":["table_wise"]}}',),
        ("overlap=plain",),
        ("recorded=on",),
        ("context_parallel=2",),
    ],
    ids=lambda settings: settings[0],
)
def test_two_gpus_train_and_evaluate_like_one(settings: tuple[str, ...], one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lines = train(run, 2, STEPS, *COMMON, *settings)
    assert losses(lines) == pytest.approx(losses(read_lines(one / "metrics.jsonl")), rel=1e-4)
    (expected,), (found,) = (read_lines(path / "eval.jsonl") for path in (one, run))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith(("ne/", "auc/")):
            assert found[name] == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize(
    ("nodes", "kind", "pooled"),
    [
        (1, "column_wise", False),
        (1, "column_wise", True),
        (2, "table_row_wise", True),
        (2, "grid_shard", True),
    ],
)
def test_tables_cut_by_columns_or_over_nodes_train_like_one(
    nodes: int, kind: str, pooled: bool, tmp_path: Path
) -> None:
    """Nodes are of two GPUs.  Columns cannot be cut under row-wise Adagrad."""
    if torch.cuda.device_count() < 2 * nodes:
        pytest.skip(f"{nodes} nodes need {2 * nodes} GPUs")
    tag = {"embedding_dim": 64, "optimizer": {"kind": "sgd", "learning_rate": 0.05}}
    settings = (STEPS, *COMMON, f"tables={json.dumps({'tag': tag})}")
    placement = f"placement.tables={json.dumps({'tag': {'pooled': pooled, 'sharding_types': [kind]}})}"
    one = train(tmp_path / "one", 1, *settings)
    job = {"WORLD_SIZE": str(2 * nodes), "LOCAL_WORLD_SIZE": "2"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2 * nodes):
        gpus = ",".join(str(gpu) for gpu in range(rank - rank % 2, rank - rank % 2 + 2))
        place = job | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "CUDA_VISIBLE_DEVICES": gpus}
        ranks.append(start_training(tmp_path / "many", 1, *settings, placement, environment=place))
    for process in ranks:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, output[-6000:]
    assert losses(read_lines(tmp_path / "many" / "metrics.jsonl")) == pytest.approx(losses(one), rel=1e-4)
    table = json.loads((tmp_path / "many" / "plan.json").read_text())["tables"]["tag"]
    assert table["sharding_type"] == kind and bool(table["pooled"]) == pooled
    last = Path("checkpoints/step-00000006")
    found, expected = (read_checkpoint(tmp_path / name / last) for name in ("many", "one"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_on_one_gpu_and_on_two_again(one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        lines = train(run, ranks, f"max_steps={steps}", *COMMON)
    assert losses(lines) == pytest.approx(losses(read_lines(one / "metrics.jsonl")), rel=1e-4)
    assert [line["world_size"] for line in lines] == [2, 2, 1, 1, 2, 2]


def test_a_deterministic_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = (*COMMON, "deterministic=true")
    whole = train(tmp_path / "whole", 2, STEPS, *settings)
    train(tmp_path / "parts", 2, "max_steps=4", *settings)
    parts = train(tmp_path / "parts", 2, STEPS, *settings)
    assert losses(parts) == losses(whole)
    left, right = (read_checkpoint(tmp_path / name / "checkpoints" / "step-00000006") for name in ("whole", "parts"))
    assert left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())
