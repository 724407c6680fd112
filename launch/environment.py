"""Is the interpreter that runs this new enough for a job, and has it the packages?  Standard library only, in words
that an old one understands, so that it can say what is missing.

PYTHON -m launch.environment [PACKAGE ...]
"""

import importlib.util
import socket
import sys

from trainer.exit_status import WRONG_USE

FIT = 7
"""The exit status of one that is: that of a script in its place, which passes none on, is 0."""
LEAST = (3, 11)
"""The oldest version of Python that setup.py allows."""

NEEDED = ("numpy", "pyarrow", "torch", "torchrec", "torchx", "typer")
"""Enough to tell an environment of this project from any other."""


def check_environment(needed: "tuple[str, ...]" = NEEDED) -> None:
    """Make sure that the packages are there, without importing them, which takes seconds.

    Raises:
        ValueError: some are not, or the interpreter is too old; names them.
    """
    version = tuple(sys.version_info[:2])
    if version < LEAST:
        raise ValueError(
            f"{sys.executable} on {socket.gethostname()} is Python {version[0]}.{version[1]}: name one of "
            f"{LEAST[0]}.{LEAST[1]} or newer with --python"
        )
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{sys.executable} on {socket.gethostname()} has no {', '.join(missing)}: name an interpreter with "
            "--python whose environment has the packages of requirements/"
        )


if __name__ == "__main__":
    try:
        check_environment(tuple(sys.argv[1:]) or NEEDED)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    sys.exit(FIT)
