"""What a rank says goes into its own file."""

import logging
from pathlib import Path

import pytest
import torch

from trainer.parallel.mesh import Mesh
from trainer.run.run_dir import RunDir
from trainer.run.run_log import logged

RANK_1 = Mesh(rank=1, world_size=2, local_world_size=2, device=torch.device("cpu"))


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full takes no byte, as a disk without room."""
    log = RunDir(tmp_path).log_file(1)
    log.parent.mkdir()
    log.symlink_to("/dev/full")
    with logged(RunDir(tmp_path), RANK_1):
        for number in range(3):
            logging.getLogger(__name__).info("word %d", number)
    said = capsys.readouterr().err
    assert said.splitlines() == [f"error: {log} misses words from now on: [Errno 28] No space left on device"]
