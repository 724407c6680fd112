"""What several of these tests read."""

from pathlib import Path

import pytest

from tests.support.distributed import run_ranks
from tests.trainer.checkpoint import ranks


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of two ranks, to be left as they are."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(2, ranks.save, str(folder), "row_wise", (1, 2))
    return folder
