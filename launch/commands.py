"""The commands of `python -m launch`: what each prints, and its exit status."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torchx.specs import AppState, CfgVal, is_terminal, parse_app_handle
from torchx.specs.api import MalformedAppHandleException

from launch import logs as job_logs
from launch import records, signals
from launch.paths import with_absolute_data
from launch.progress import progress_lines
from launch.records import JobRecord
from launch.request import Request, takes_request
from launch.schedulers.known import SCHEDULERS
from launch.schedulers.protocol import Foreground, JobStatus, Scheduler
from launch.submit import SESSION, check, connected, no_other_job
from launch.sweep import runs_of
from trainer.command_line import WrongUse, show_findings
from trainer.exit_status import FAILED, STOPPED
from trainer.recipes import load_recipe
from trainer.run.run_dir import RunDir
from trainer.typed_values import apply_overrides, to_dict

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Send training jobs to a scheduler and look after them.  SCHEDULER is one of " + ", ".join(SCHEDULERS) + ".",
)

Handle = Annotated[
    str, typer.Argument(metavar="HANDLE", help="What `submit` printed last; or a run directory: its newest job.")
]
SchedulerName = Annotated[str, typer.Option("--scheduler", metavar="NAME", help=f"One of {', '.join(SCHEDULERS)}.")]


@app.command("submit")
@takes_request
def submit_(
    request: Request,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job; send and write nothing.")] = False,
) -> None:
    """Train a recipe on a scheduler.  An existing run directory is resumed."""
    with _wrong_use(), connected(request.scheduler) as connection:
        request, options = _checked(connection.scheduler, request)
        if dry_run:
            print(connection.dry_run(request, options))
            return
    with connected(request.scheduler) as connection:
        alone = no_other_job(connection.scheduler, [request], request.absolute_run_dir)
        if isinstance(connection.scheduler, Foreground):
            with signals.held():
                with alone:
                    record = connection.submit(request, options)
                status = connection.scheduler.wait(_app_id(record.handle), record)
            _say_how_it_ended(record, status)
            print(record.handle)
            raise typer.Exit(status)
        with alone:
            print(connection.submit(request, options).handle)


@app.command()
@takes_request
def sweep(
    request: Request,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job; send and write nothing.")] = False,
) -> None:
    """Train a recipe with every combination of values, as --set model.dim=256,512 seed=0..4, each in a run directory
    of its own below --run-dir (default: runs/RECIPE-sweep).  On slurm the runs are one job array."""
    with _wrong_use(), connected(request.scheduler) as connection:
        scheduler = connection.scheduler
        if isinstance(scheduler, Foreground):
            raise ValueError("a sweep of local jobs would run one after the other: submit each run by itself")
        requests = []
        for run in runs_of(request):
            checked, options = _checked(scheduler, run)
            requests.append(checked)
        # The folder above the runs holds the code of all of them.
        base = replace(request, run_dir=requests[0].absolute_run_dir.parent, overrides=[])
        if dry_run:
            print(connection.dry_run_of_sweep(requests, base, options))
            return
    with connected(request.scheduler) as connection, no_other_job(scheduler, requests, base.absolute_run_dir):
        if connection.scheduler.has_arrays:
            sent = connection.sweep(requests, base, options)
        else:
            sent = [connection.submit(run, options) for run in requests]
        for record in sent:
            print(f"{record.handle}  {record.run_dir}")


def _checked(scheduler: Scheduler, request: Request) -> tuple[Request, dict[str, CfgVal]]:
    """(the request with paths as its nodes see them, its scheduler's options), checked as far as this machine can.

    Raises:
        ValueError: it is malformed, the scheduler cannot do it, or its run directory is another run's.
    """
    config = apply_overrides(load_recipe(request.recipe), request.overrides)
    in_container = request.image is not None
    request = with_absolute_data(
        request, config, runs_here=isinstance(scheduler, Foreground), in_container=in_container
    )
    options = check(scheduler, request)
    if not scheduler.needs_image:
        # What the workers would find out, before anything of the job is written into the directory.
        RunDir(request.absolute_run_dir).check_same_run(to_dict(config))
    return request, options


@app.command()
def status(handle: Handle) -> None:
    """Print a job's state, why, where and how far it is; exit status 1 if it failed or was cancelled."""
    with _job(handle) as (scheduler, handle, record):
        found = _found(scheduler, handle, record)
    print(found.state.name)
    for name, value in (("reason", found.reason), ("nodes", found.nodes), ("time left", found.time_left)):
        if value:
            print(f"{name}: {value}")
    if record is not None:
        print("\n".join(progress_lines(record)))
        fault = None
        if found.state == AppState.FAILED:
            fault = job_logs.first_failure(record, job_logs.last_start(record))
        if fault is not None:
            print(f"first failure: {fault}")
    if found.state in (AppState.FAILED, AppState.CANCELLED):
        raise typer.Exit(FAILED)


@app.command()
def logs(
    handle: Handle,
    rank: Annotated[int | None, typer.Option(metavar="R", min=0, help="A rank's log of this job.")] = None,
    node: Annotated[int | None, typer.Option(metavar="K", min=0, help="A node's output of this job.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All ranks' logs of this job, each line with its rank.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Keep printing until the job ends.")] = False,
) -> None:
    """Print a job's log: of the rank that failed first, or rank 0's if none did."""
    if (rank is not None) + (node is not None) + every > 1:
        raise WrongUse("--rank, --node and --all name different logs: give one")
    with _job(handle) as (scheduler, handle, record):
        if record is None or scheduler.needs_image:
            if rank is not None or every:
                raise WrongUse(
                    "the run directory, which holds ranks' logs, is not on this machine: give --node instead"
                )
            _show_output(scheduler, handle, record, node or 0, follow=follow)
            return
        if node is not None:
            _show_output(scheduler, handle, record, node, follow=follow)
            return
        run, span = RunDir(Path(record.run_dir)), job_logs.span_of(record)
        if every:
            chosen = job_logs.ranks(run)
            _show(run, chosen, span, prefixed=True)
        elif rank is not None or follow:
            chosen = [rank or 0]
            if not follow or run.log_file(chosen[0]).is_file():
                _show(run, chosen, span, prefixed=False)
        else:
            _show_what_matters(record, _found(scheduler, handle, record))
            return
        if follow:
            _follow(scheduler, handle, record, None if every else chosen[0])


@app.command()
def cancel(handle: Handle) -> None:
    """End a job.  It saves its state first; submitting again resumes it."""
    with _job(handle) as (scheduler, handle, record):
        scheduler.cancel_job(_app_id(record.handle if record else handle), record)


@app.command("list")
def list_(scheduler: SchedulerName) -> None:
    """List our jobs: handle, state, recipe and run.  Local ones are those submitted from this checkout."""
    with _wrong_use(), connected(scheduler) as connection:
        for job in connection.scheduler.jobs():
            words = f"{scheduler}://{SESSION}/{job.app_id}  {job.state.name}"
            print(f"{words}  {job.record.recipe}  {job.record.run_dir}" if job.record else words)


@app.command()
def doctor(scheduler: SchedulerName) -> None:
    """Say what a scheduler offers and what prevents jobs from running; exit status 1 if something does."""
    with _wrong_use(), connected(scheduler) as connection:
        show_findings(connection.scheduler.doctor())


@contextmanager
def _wrong_use() -> Iterator[None]:
    """A mistake in what was asked for is wrong use; a scheduler that does not answer is a failure."""
    try:
        yield
    except ValueError as error:
        raise WrongUse(str(error)) from None


@contextmanager
def _job(named: str) -> Iterator[tuple[Scheduler, str, JobRecord | None]]:
    """(scheduler, handle, what is noted of it in its run directory, by this checkout, or where the scheduler leads to)
    of the job of a handle, or of a run directory's newest one."""
    record = None
    if "://" not in named and Path(named).is_dir():
        record = next(reversed(records.of_run(Path(named).absolute())), None)
        if record is None:
            raise WrongUse(f"no job was submitted in {named}: name the run directory of one, or its handle")
    handle = record.handle if record else named
    try:
        name, _, _ = parse_app_handle(handle)
    except MalformedAppHandleException:
        name = ""
    if name not in SCHEDULERS:
        raise WrongUse(
            f"{handle!r} is no run directory and no handle of a job: expected SCHEDULER://SESSION/ID, as `submit` "
            "prints it"
        )
    with connected(name) as connection:
        scheduler = connection.scheduler
        yield scheduler, handle, record or records.find(handle) or scheduler.record_of(_app_id(handle))


def _app_id(handle: str) -> str:
    return handle.rpartition("/")[2]


def _found(scheduler: Scheduler, handle: str, record: JobRecord | None) -> JobStatus:
    """The state of the job, or of the one that went on from it."""
    found = scheduler.status(_app_id(record.handle if record else handle), record)
    if found is None:
        where = (
            "no local job of that name was submitted from this checkout" if isinstance(scheduler, Foreground) else ""
        )
        raise ValueError(f"{scheduler.backend} knows no job {handle}{': ' if where else ''}{where}")
    return found


def _show_output(scheduler: Scheduler, handle: str, record: JobRecord | None, node: int, *, follow: bool) -> None:
    job_logs.follow_text(
        lambda: "".join(scheduler.output(_app_id(handle), record, node)),
        lambda: not follow or is_terminal(_found(scheduler, handle, record).state),
        lambda text: print(text, end="", flush=True),
    )


def _show(run: RunDir, chosen: list[int], span: job_logs.Span, *, prefixed: bool) -> bool:
    """Print these ranks' lines of a job; returns whether there are any."""
    shown = False
    for rank in chosen:
        for line in job_logs.rank_lines(run, rank, span):
            print(f"[{rank}] {line}" if prefixed else line, end="")
            shown = True
    return shown


def _show_what_matters(record: JobRecord, found: JobStatus) -> None:
    """The first failure and the log of the rank that had it; of a job that has not failed, rank 0's log."""
    run = RunDir(Path(record.run_dir))
    fault = None
    if found.state == AppState.FAILED:
        fault = job_logs.first_failure(record, job_logs.last_start(record))
    rank = fault.rank if fault and fault.rank is not None else 0
    shown = rank in job_logs.ranks(run) and _show(run, [rank], job_logs.span_of(record), prefixed=False)
    if not shown and fault is None:
        why = f" ({found.reason})" if found.reason else ""
        raise ValueError(f"{record.handle} is {found.state.name}{why} and has written no log in {run.path / 'logs'}")
    if fault is not None:
        print(f"first failure: {fault}")


def _follow(scheduler: Scheduler, handle: str, record: JobRecord, rank: int | None) -> None:
    run = RunDir(Path(record.run_dir))

    def paths() -> list[Path]:
        return [run.log_file(known) for known in job_logs.ranks(run) if rank in (None, known)]

    def show(path: Path, text: str) -> None:
        prefix = f"[{path.stem.removeprefix('rank-')}] " if rank is None else ""
        print("".join(prefix + line for line in text.splitlines(keepends=True)), end="", flush=True)

    job_logs.follow(paths, lambda: is_terminal(_found(scheduler, handle, record).state), show)


def _say_how_it_ended(record: JobRecord, status: int) -> None:
    if status == STOPPED:
        print("the job stopped in good order; the same command resumes it from its last checkpoint", file=sys.stderr)
    elif status:
        fault = job_logs.first_failure(record, job_logs.span_of(record))
        log = RunDir(Path(record.run_dir)).log_file(fault.rank) if fault and fault.rank is not None else None
        print(
            f"error: the job failed; {f'see {log}' if log else 'its processes have said why above'}",
            file=sys.stderr,
        )


def show_own_messages() -> None:
    """Print this package's log messages; libraries' only from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("launch").setLevel(logging.INFO)
