"""On GPUs, a run whose steps are replayed is one run: resumed, evaluated in between, under deterministic=true."""

from pathlib import Path

import pytest
import torch

from tests.support.training import TIMEOUT_S, losses, read_lines, start_training, train

# Histories of one length and a candidate each: few sizes, which come again within a few steps.
SETTINGS = (
    "deterministic=true",
    "evaluation.every_steps=4",
    "checkpoint.every_steps=5",
    "precision=bfloat16",
    "data.max_history_len=4",
    "data.max_candidates=1",
)
STEPS, STOP = 12, 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_a_resumed_replayed_run_has_the_bits_of_a_whole_one_and_the_losses_of_a_launched_one(
    ranks: int, tmp_path: Path
) -> None:
    """Where it goes on, a size's first batch is launched again and its second recorded; launched runs do not pad."""
    jobs = [
        start_training(tmp_path / name, ranks, *SETTINGS, f"recorded={recorded}", f"max_steps={steps}")
        for name, recorded, steps in (("whole", "on", STEPS), ("parts", "on", STOP), ("launched", "off", STEPS))
    ]
    for job in jobs:
        output, _ = job.communicate(timeout=TIMEOUT_S)
        assert job.returncode == 0, output[-6000:]
    resumed = train(tmp_path / "parts", ranks, *SETTINGS, "recorded=on", f"max_steps={STEPS}")
    whole, launched = (losses(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "launched"))
    assert losses(resumed) == whole and len(whole) == STEPS
    assert whole == pytest.approx(launched, rel=2e-2)
    for rank in range(ranks):
        log = (tmp_path / "whole" / "logs" / f"rank-{rank}.log").read_text()
        assert "recorded the step of sizes" in log and "recorded the dense update" in log
