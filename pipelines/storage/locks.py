"""A file that one process at a time may hold; the system frees it when the process ends, however it ends."""

import fcntl
import logging
from typing import IO, Any

logger = logging.getLogger(__name__)


def locks(file: IO[Any]) -> bool:
    """Hold an open file, or say that another process does.  Where the file system knows no locks, nobody is kept out,
    which a warning tells."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s cannot be locked (%s): nothing keeps a second process out", file.name, error.strerror)
    return True
