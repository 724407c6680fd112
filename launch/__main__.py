"""The launcher's command line.  Needs torchx and typer, not torch.

    python -m launch submit RECIPE --scheduler NAME --nodes N --procs-per-node P [--dry-run] [--run-dir DIR] [--set ...]
    python -m launch status|logs|cancel HANDLE
    python -m launch list --scheduler NAME

`submit` checks the recipe and its overrides here, before anything is sent; its last line is the job's handle.  On
local_cwd it shows the job until its end.  Exit status: 0 done, 1 failed, 2 wrong use.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from torchx.specs import AppState, parse_app_handle
from torchx.specs.api import MalformedAppHandleException

from launch import local, records
from launch.components import ROLE
from launch.submit import IN_CONTAINERS, SCHEDULERS, Request, check_options, dry_run, runner, submit
from trainer.command_line import WrongUse, run_command
from trainer.recipes import load_recipe
from trainer.run_dir import RunDir
from trainer.typed_values import apply_overrides, to_dict

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Send training jobs to a scheduler and look after them.  SCHEDULER is one of " + ", ".join(SCHEDULERS) + ".",
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE ...", help="Change the recipe's values.")
]
Handle = Annotated[str, typer.Argument(metavar="HANDLE", help="What `submit` printed last.")]


@app.command("submit")
def submit_(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `python -m trainer recipes` lists.")],
    scheduler: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SCHEDULERS)}.")],
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines.")],
    procs_per_node: Annotated[int, typer.Option(metavar="P", min=1, help="Processes a machine: one a GPU.")],
    run_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/RECIPE.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A sharding plan to use.")] = None,
    set_: Overrides = None,
    machine: Annotated[
        str | None, typer.Option(metavar="NAME", help="Machine type of launch/resources.py; default: P cores, no GPU.")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="IMAGE", help="Container image with the dependencies.")] = None,
    mount: Annotated[list[str] | None, typer.Option(metavar="SRC:DST", help="Mount a folder in the container.")] = None,
    python: Annotated[str | None, typer.Option(metavar="PATH", help="The workers' interpreter.")] = None,
    max_retries: Annotated[int, typer.Option(metavar="N", min=0, help="Restarts after a failure; each resumes.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A scheduler's option, as partition=main.")
    ] = None,
    dry_run_: Annotated[bool, typer.Option("--dry-run", help="Print the job; send and write nothing.")] = False,
) -> None:
    """Train a recipe on a scheduler.  An existing run directory is resumed."""
    try:
        config = apply_overrides(load_recipe(recipe), set_ or [])
        request = Request(
            recipe=recipe,
            scheduler=scheduler,
            nodes=nodes,
            procs_per_node=procs_per_node,
            run_dir=run_dir,
            overrides=tuple(set_ or ()),
            plan=plan,
            machine=machine,
            python=python,
            image=image,
            mounts=tuple(mount or ()),
            max_retries=max_retries,
            options=tuple(option or ()),
        )
        job = request.app()
    except ValueError as error:
        raise WrongUse(str(error)) from None
    if scheduler not in IN_CONTAINERS:
        # What the workers would find out, before anything of the job is written into the directory.
        RunDir(request.absolute_run_dir()).check_same_run(to_dict(config))
    with runner(scheduler) as torchx:
        try:
            check_options(torchx, request)
        except ValueError as error:
            raise WrongUse(str(error)) from None
        if dry_run_:
            print(dry_run(torchx, request, job))
            return
        started = time.time()
        handle = submit(torchx, request, job)
        ended = local.wait(torchx, handle) if scheduler == "local_cwd" else AppState.SUBMITTED
    failed = ended in (AppState.FAILED, AppState.CANCELLED)
    if failed:
        print(f"error: {_failure(request, ended, started)}", file=sys.stderr)
    print(handle)
    raise typer.Exit(int(failed))


@app.command()
def status(handle: Handle) -> None:
    """Print a job's state; exit status 1 if it failed or was cancelled."""
    state = _state(handle)
    print(state.name)
    if state in (AppState.FAILED, AppState.CANCELLED):
        raise typer.Exit(1)


@app.command()
def logs(
    handle: Handle,
    rank: Annotated[
        int | None, typer.Option(metavar="R", min=0, help="A rank's own log, from the run directory.")
    ] = None,
    node: Annotated[int | None, typer.Option(metavar="K", min=0, help="A node's output, from the scheduler.")] = None,
) -> None:
    """Print a job's log: rank 0's, unless --rank or --node says otherwise."""
    if rank is not None and node is not None:
        raise WrongUse("--rank and --node name two different logs: give one")
    record = records.find(handle)
    if node is None:
        if record is None:
            raise WrongUse(f"{handle} was not submitted from this checkout: only --node works")
        _show(Path(record.run_dir, "logs", f"rank-{rank or 0}.log"))
        return
    scheduler, _, app_id = _parse(handle)
    if scheduler == "local_cwd":
        raise WrongUse("a local job's output went to the terminal of its submit command: --rank shows a rank's log")
    if scheduler == "slurm":
        if record is None:
            raise WrongUse(f"{handle} was not submitted from this checkout: its output's place is not known")
        for stream in ("out", "err"):
            _show(Path(record.job_dir, f"slurm-{app_id}-{ROLE}-{node}.{stream}"))
        return
    with runner(scheduler) as torchx:
        for line in torchx.log_lines(handle, ROLE, node):
            print(line, end="")


@app.command()
def cancel(handle: Handle) -> None:
    """End a job.  Its last checkpoint stays; submitting again resumes it."""
    scheduler, _, _ = _parse(handle)
    if scheduler == "local_cwd":
        local.cancel(_local_record(handle))
        return
    with runner(scheduler) as torchx:
        torchx.cancel(handle)


@app.command("list")
def list_(scheduler: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(SCHEDULERS)}.")]) -> None:
    """List jobs, one a line: handle and state.  Local ones are those submitted from this checkout."""
    if scheduler not in SCHEDULERS:
        raise WrongUse(f"unknown scheduler {scheduler!r}: known are {', '.join(SCHEDULERS)}")
    if scheduler == "local_cwd":
        for record in records.load():
            if record.handle.startswith("local_cwd://"):
                print(f"{record.handle}  {local.state(record).name}")
        return
    with runner(scheduler) as torchx:
        for job in torchx.list(scheduler):
            print(f"{job.app_handle}  {job.state.name}")


def _state(handle: str) -> AppState:
    scheduler, _, _ = _parse(handle)
    if scheduler == "local_cwd":
        return local.state(_local_record(handle))
    with runner(scheduler) as torchx:
        found = torchx.status(handle)
    if found is None:
        raise ValueError(f"{scheduler} knows no job {handle}")
    return found.state


def _local_record(handle: str) -> records.JobRecord:
    record = records.find(handle)
    if record is None:
        raise ValueError(f"no local job {handle} was submitted from this checkout")
    return record


def _parse(handle: str) -> tuple[str, str, str]:
    try:
        scheduler, session, app_id = parse_app_handle(handle)
    except MalformedAppHandleException:
        scheduler = session = app_id = ""
    if scheduler not in SCHEDULERS:
        raise WrongUse(f"{handle!r} is no job handle: expected SCHEDULER://SESSION/ID as `submit` prints it")
    return scheduler, session, app_id


def _show(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the job has not started there, or has no such rank or node")
    print(path.read_text(errors="replace"), end="")


def _failure(request: Request, state: AppState, started: float) -> str:
    run_dir = request.absolute_run_dir()
    if state == AppState.CANCELLED:
        return "the job was interrupted; the same command resumes it from its last checkpoint"
    log = local.failing_log(run_dir, since=started)
    return f"the job failed; see {log}" if log else "the job failed; its processes have said why above"


def show_own_messages() -> None:
    """Print this package's log messages; libraries' only from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("launch").setLevel(logging.INFO)


if __name__ == "__main__":
    show_own_messages()
    sys.exit(run_command(app, sys.argv[1:]))
