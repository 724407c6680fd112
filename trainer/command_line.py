"""How our command lines answer mistakes: one line and an exit status.  Shared by `trainer` and `launch`; no torch."""

import gc
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from trainer.exit_status import FAILED, STOPPED, WRONG_USE
from trainer.health.fitness import UnfitNodes
from trainer.health.stop_signal import StoppedEarly

SEVERAL = ("--set", "--init-only")
"""Options that take several values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of a `doctor`."""

    ok: bool
    """Whether it lets jobs run."""
    text: str
    """What was found and, where it is not as it must be, what to do."""


def show_findings(findings: Iterable[Finding]) -> None:
    """Print each as it is found; exit status 1 if one keeps jobs from running."""
    status = 0
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'BAD '} {finding.text}", flush=True)
        status = status if finding.ok else FAILED
    raise typer.Exit(status)


class WrongUse(ValueError):
    """The command line names something that does not exist or does not fit; exit status 2."""


def run_command(app: typer.Typer, arguments: list[str]) -> int:
    """Run one command of `app`.  Exit status: 0 done, 1 failed, 2 wrong use, 3 stopped in good order; all but the first
    are said in one line."""
    try:
        _check_encoding([*arguments, os.getcwd()])
        return int(app(_expand(arguments), standalone_mode=False) or 0)
    except (WrongUse, typer.TyperException) as error:
        # Every rank of a job finds the same mistake in its command line; one of them says so.
        if os.environ.get("RANK", "0") == "0":
            _say(error.format_message() if isinstance(error, typer.TyperException) else str(error))
        return WRONG_USE
    except UnfitNodes as error:
        # Every rank has found the same error: one of them prints it.
        if os.environ.get("RANK", "0") == "0":
            _say(str(error))
        return FAILED
    except StoppedEarly as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        # What a user can mend, in one line; anything else is a defect of ours and keeps its traceback.
        _say(str(error))
        return FAILED


@contextmanager
def lasting() -> Iterator[None]:
    """What is made inside, modules above all, stays to the end: Python looks for no garbage among it, now or later.

    Its looks are a fifth of the time that the imports of a training take.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _check_encoding(names: list[str]) -> None:
    """Libraries, and other machines, read names as UTF-8."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not all(name.isascii() for name in names):
        raise WrongUse(
            f"a name here has letters outside of ASCII, and the locale's encoding is {encoding}, which other machines "
            "and libraries do not read: export LC_ALL=C.UTF-8, or choose another name"
        )


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _expand(arguments: list[str]) -> list[str]:
    """Let one option of `SEVERAL` take several values: `--set a=1 b=2` becomes `--set a=1 --set b=2`."""
    expanded: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in SEVERAL else None
        elif option is not None and expanded[-1] != option:
            expanded.append(option)
        expanded.append(argument)
    return expanded


def parse_window(text: str) -> tuple[int, int]:
    """(first step, number of steps) of `STEP:COUNT`.

    Raises:
        WrongUse: it has another form.

    >>> parse_window("100:5")
    (100, 5)
    """
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if found is None:
        raise WrongUse(f"--profile must be STEP:COUNT, two whole numbers above 0, as 100:5, got {text!r}")
    return int(found[1]), int(found[2])
