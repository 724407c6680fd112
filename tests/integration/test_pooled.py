"""Tables that give sums: the same training as with rows added up later, and checkpoints that either goes on from."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.training import losses, read_checkpoint, train

COMMON = ("max_steps=6", "checkpoint.every_steps=2", "checkpoint.keep=9", "data.unknown_share=0.05")


def test_pooled_lookups_train_as_single_ones_and_go_on_from_each_other(tmp_path: Path) -> None:
    """Tags of items, many a video: as single lookups, pooled from step 2 on two ranks, single from step 4 on one."""
    single = losses(train(tmp_path / "single", 2, *COMMON))
    expected = read_checkpoint(tmp_path / "single" / "checkpoints" / "step-00000006")
    before = tmp_path / "single"
    for name, ranks, pooled, kind, step in (("pooled", 2, True, "row_wise", 2), ("back", 1, False, "table_wise", 4)):
        run = tmp_path / name
        shutil.copytree(before, run)
        placed = json.dumps({"tag": {"pooled": pooled, "sharding_types": [kind]}})
        more = (f"placement.tables={placed}", "placement.exchange.deduplicate=true")
        found = losses(train(run, ranks, *COMMON, *more, options=("--from-step", str(step))))
        assert found == pytest.approx(single, abs=1e-5)
        tensors = read_checkpoint(run / "checkpoints" / "step-00000006")
        assert tensors.keys() == expected.keys()
        for tensor, value in expected.items():
            torch.testing.assert_close(tensors[tensor], value, rtol=1e-3, atol=1e-5)
        before = run
    config = json.loads((tmp_path / "pooled" / "config.json").read_text())
    assert config["placement"]["tables"]["tag"]["pooled"]
    evaluations = [(tmp_path / name / "eval.jsonl").read_text().splitlines()[-1] for name in ("single", "pooled")]
    one, other = ({k: x for k, x in json.loads(line).items() if x is not None} for line in evaluations)
    assert len(one) > 20 and other == pytest.approx(one, rel=1e-3)
