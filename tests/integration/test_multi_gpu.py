"""Two GPUs, by NCCL: every placement of tables, shared histories, and runs that change their number of GPUs.

Beside these, all tests that start ranks take a GPU each where there are GPUs (`tests.support.training`).
"""

from pathlib import Path

import pytest
import torch

from tests.support.training import losses, read_checkpoint, read_lines, train

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
