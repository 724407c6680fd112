"""Where a run's words go: every rank's into its own file, the first rank's also above the progress bar."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.mesh import Mesh
from trainer.preflight import PACKAGES
from trainer.run_dir import RunDir


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.split(".")[0] in PACKAGES or record.levelno >= logging.ERROR


@contextmanager
def logged(run: RunDir, mesh: Mesh) -> Iterator[None]:
    """Log to RUN_DIR/logs for the duration of the block; of libraries, the terminal gets only errors."""
    path = run.log_file(mesh.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [to_file]
    if mesh.is_first:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setFormatter(logging.Formatter("%(message)s"))
        to_terminal.addFilter(_is_ours)
        handlers.append(to_terminal)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)
