"""What a rank says goes into its own file."""

import logging
from dataclasses import replace
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


def test_what_libraries_say_goes_to_the_file_and_only_their_errors_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch gives loggers of its own a handler that writes to the terminal."""
    library, handler = logging.getLogger("a_library.part"), logging.StreamHandler()
    library.addHandler(handler)
    library.propagate = False
    try:
        with logged(RunDir(tmp_path), replace(RANK_1, rank=0)):
            library.warning("only a warning")
            library.error("an error")
        assert (library.handlers, library.propagate) == ([handler], False)
    finally:
        library.removeHandler(handler)
    assert capsys.readouterr().err.split() == ["an", "error"]
    said = RunDir(tmp_path).log_file(0).read_text()
    assert "WARNING a_library.part: only a warning" in said and "ERROR a_library.part: an error" in said
