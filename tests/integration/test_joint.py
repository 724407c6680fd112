"""Two heads on one trunk in real jobs: the same on two ranks, on one, and resumed on two that share histories."""

from pathlib import Path

import pytest
import torch

from tests.support.training import losses, read_checkpoint, read_lines, train

STEPS = 6
OVERRIDES = (
    f"max_steps={STEPS}",
    "checkpoint.every_steps=3",
    "model.retrieval.num_negatives=20",
    "model.retrieval.corpus_chunk=1000",
    "model.retrieval.exclude_seen=true",
)


def test_one_rank_and_then_two_that_share_histories_learn_and_measure_what_two_do(tmp_path: Path) -> None:
    together, resumed = tmp_path / "together", tmp_path / "resumed"
    train(together, 2, *OVERRIDES, recipe="kuairand_joint")
    train(resumed, 1, *OVERRIDES, "max_steps=3", recipe="kuairand_joint")
    lines = train(resumed, 2, *OVERRIDES, "context_parallel=2", recipe="kuairand_joint")
    assert losses(lines) == pytest.approx(losses(read_lines(together / "metrics.jsonl")), rel=1e-5)
    wanted, found = (read_checkpoint(run / "checkpoints" / f"step-{STEPS:08d}") for run in (together, resumed))
    assert found.keys() == wanted.keys() and any("similarity" in name or "ranker" in name for name in found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    (expected,), (*_, last) = (read_lines(run / "eval.jsonl") for run in (together, resumed))
    assert {"ne/is_click", "auc/long_view", "hr@10", "ndcg@50", "mrr"} <= expected.keys()
    metrics = {name: value for name, value in expected.items() if value is not None}
    assert {name: last[name] for name in metrics} == pytest.approx(metrics, rel=1e-3, abs=1e-3)
