"""Where a run's log goes: every rank's into a file of its own, the first rank's also above the progress bar."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from trainer.health.fitness import OURS
from trainer.parallel.mesh import Mesh
from trainer.run.run_dir import RunDir
from trainer.run.writing import written

logger = logging.getLogger(__name__)


class _Terminal(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record to standard error."""
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """A rank's file.  Where it cannot be written any longer, that is said once, and the run goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._told = False

    def handleError(self, record: logging.LogRecord | None) -> None:
        """Called while the error is being handled."""
        if not self._told:
            self._told = True
            print(f"error: {self.baseFilename} misses words from now on: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """What the file does not take is lost."""
        try:
            super().close()
        except OSError:
            self.handleError(None)


def _for_terminal(record: logging.LogRecord) -> bool:
    """Ours, and libraries' errors; tracebacks are for the file, the command line says what went wrong in one line."""
    return not record.exc_info and (record.name.split(".")[0] in OURS or record.levelno >= logging.ERROR)


@contextmanager
def _instead_of_all(handlers: list[logging.Handler]) -> Iterator[None]:
    """Log to these handlers alone, whatever handlers libraries have set up on import: of the root logger, and in torch
    of some 30 loggers of its own."""
    root = logging.getLogger()
    others = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger) and each.handlers]
    before = [(each, each.handlers, each.propagate) for each in (root, *others)]
    for each in others:
        each.handlers, each.propagate = [], True
    root.handlers = handlers
    try:
        yield
    finally:
        for each, own, propagates in before:
            each.handlers, each.propagate = own, propagates


@contextmanager
def logged(run: RunDir, mesh: Mesh) -> Iterator[None]:
    """Log to RUN_DIR/logs for the duration of the block; of libraries, the terminal gets only errors."""
    path = run.log_file(mesh.rank)
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _LogFile(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [to_file]
    if mesh.is_first:
        to_terminal = _Terminal()
        to_terminal.setFormatter(logging.Formatter("%(message)s"))
        to_terminal.addFilter(_for_terminal)
        handlers.append(to_terminal)
    logging.getLogger().setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        with _instead_of_all(handlers):
            try:
                yield
            except Exception:
                # The launcher shows the log of the first rank that holds an error.
                logger.exception("rank %d stops", mesh.rank)
                raise
    finally:
        for handler in handlers:
            handler.close()
        logging.captureWarnings(False)
