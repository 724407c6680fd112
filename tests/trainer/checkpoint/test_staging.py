"""The process that writes staged state may die; what it should have written is not lost."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.training import run_training
from trainer.checkpoint.layout import lay_out
from trainer.checkpoint.pieces import written_pieces
from trainer.checkpoint.staging import Staging, WriterGone
from trainer.checkpoint.store import LocalStore

STATE = {"weight": torch.arange(3_000_000, dtype=torch.float32)}


def _staged() -> tuple[Staging, int]:
    layout = lay_out(written_pieces(STATE, 0, 1))
    staging = Staging(layout.num_bytes, 0, torch.device("cpu"))
    staging.fill(layout)
    return staging, layout.num_bytes


def test_another_process_writes_in_place_of_one_that_was_killed(tmp_path: Path) -> None:
    staging, num_bytes = _staged()
    records = []
    for name in ("first", "second"):
        staging._process.kill()
        records.append(staging.write(LocalStore(tmp_path), name, num_bytes))
        assert (tmp_path / name).read_bytes() == STATE["weight"].numpy().tobytes()
    staging.close()
    assert records[0] == records[1]


def test_a_process_that_dies_again_is_the_saves_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, num_bytes = _staged()
    first = staging._process
    first.kill()

    def dies(*arguments: object, **options: object) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    monkeypatch.setattr(staging, "_start", dies)
    with pytest.raises(WriterGone, match="the process that writes checkpoints ended with status 0"):
        staging.write(LocalStore(tmp_path), "file", num_bytes)
    assert staging._process is not first
    staging.close()


def test_memory_that_one_machine_lacks_is_told_before_the_first_step(tmp_path: Path) -> None:
    status, output = run_training(
        tmp_path / "run", 2, "checkpoint.every_steps=null", module="tests.trainer.checkpoint.no_memory"
    )
    assert status != 0
    assert "0.0 GiB are free here; set checkpoint.asynchronous=false" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
