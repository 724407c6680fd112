"""What the launcher asks of a scheduler.

A scheduler here is a TorchX scheduler (it turns an AppDef into its own request and sends it) that also answers these
questions.  `launch.schedulers.known` lists them; adding one means one file and one line there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torchx.schedulers.api import AppDryRunInfo
from torchx.specs import AppState, CfgVal, runopts
from torchx.specs.api import InvalidRunConfigException

from launch.records import JobRecord
from launch.request import Request
from launch.workspace import ROOT
from trainer.command_line import Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """What a scheduler knows of a job; an empty text is what it does not know."""

    state: AppState
    """The job's state in TorchX's terms."""
    reason: str = ""
    """Why it waits, failed or cannot start, in the scheduler's words with ours where they explain more."""
    nodes: str = ""
    """The nodes that it runs or ran on."""
    time_left: str = ""
    """Until the scheduler ends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedJob:
    """A job as `launch list` shows it."""

    app_id: str
    """The job's name at the scheduler."""
    state: AppState
    """The job's state in TorchX's terms."""
    record: JobRecord | None
    """What we noted when we submitted it; None where only the scheduler knows it."""


class Scheduler(Protocol):
    """A TorchX scheduler with what the launcher needs besides."""

    backend: str
    """The scheduler's name on the command line."""
    needs_image: ClassVar[bool]
    """Whether its jobs run in containers, with paths of their own; they have no folder in the run directory."""
    has_arrays: ClassVar[bool]
    """Whether one request may hold many runs that start apart from one another."""
    without_effect: ClassVar[tuple[str, ...]]
    """Fields of a request that mean nothing to it, and are refused."""

    def check(self, request: Request) -> dict[str, CfgVal]:
        """The request's options in TorchX's form; ValueError for what this scheduler cannot do."""

    def record_of(self, app_id: str) -> JobRecord | None:
        """The record of a job that another checkout submitted; None where nothing leads to it."""

    def status(self, app_id: str, record: JobRecord | None) -> JobStatus | None:
        """What is known of a job; None where nothing remembers it."""

    def output(self, app_id: str, record: JobRecord | None, node: int) -> Iterator[str]:
        """Lines of what a node of the job printed.

        Raises:
            ValueError: there is no such output, or it is not known where.
        """

    def cancel_job(self, app_id: str, record: JobRecord | None) -> None:
        """Ask the job to end; it saves its state first."""

    def jobs(self) -> Sequence[ListedJob]:
        """Our jobs that are remembered here or there, oldest first."""

    def schedule(self, dryrun_info: AppDryRunInfo[Any]) -> str:
        """TorchX's: send the request, return the job's name."""

    def close(self) -> None:
        """TorchX's: give back what the scheduler holds."""

    def doctor(self) -> Iterator[Finding]:
        """What there is, and what is missing for jobs to run."""


@runtime_checkable
class Foreground(Scheduler, Protocol):
    """A scheduler whose jobs run in the caller's folder and end with the command that sent them."""

    def wait(self, app_id: str, record: JobRecord) -> int:
        """Wait for a job's end; returns its exit status.  To be called with signals held."""


def options_from(request: Request, *, parse: Callable[[str, str], dict[str, CfgVal]]) -> dict[str, CfgVal]:
    """The command line's options over those of .torchxconfig: of the caller's folder before that of the checkout.

    Args:
        request: holds the command line's options and the scheduler's name.
        parse: checks one key and its value.

    Raises:
        ValueError: an option is not KEY=VALUE, or `parse` refuses it.
    """
    options: dict[str, CfgVal] = {}
    for folder in (ROOT, Path.cwd()):
        for key, value in _config_file(folder / ".torchxconfig", request.scheduler).items():
            options |= parse(key, value)
    for option in request.options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise ValueError(f"--option {option!r} is not KEY=VALUE")
        options |= parse(key, value)
    return options


def resolve_options(known: runopts, options: dict[str, CfgVal], scheduler: str) -> dict[str, CfgVal]:
    """TorchX's defaults for what is not given.

    Raises:
        ValueError: an option that must be given is not.
    """
    try:
        return dict(known.resolve(options))
    except InvalidRunConfigException as error:
        raise ValueError(f"{scheduler}: {' '.join(str(error).split())} (give it with --option)") from None


def parser_of(known: runopts, scheduler: str) -> Callable[[str, str], dict[str, CfgVal]]:
    """Checks an option against those that TorchX's scheduler has."""

    def parse(key: str, value: str) -> dict[str, CfgVal]:
        if known.get(key) is None:
            names = ", ".join(sorted(name for name, _ in known))
            raise ValueError(f"--option {key}={value} is unknown to {scheduler}, which has: {names}")
        return dict(known.cfg_from_str(f"{key}={value}"))

    return parse


def _config_file(path: Path, section: str) -> Mapping[str, str]:
    config = ConfigParser(interpolation=None)
    config.read(path)
    return dict(config.items(section)) if config.has_section(section) else {}
