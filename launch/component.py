"""What a job is, as TorchX's data: a request to a job description (an AppDef).

The worker command is a module and a list of arguments, never a shell string: `launch.node` runs on every node, finds
the first node and starts the trainer's processes.  `train` is the component that TorchX's own command line takes.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath

import typer
from torchx.specs import AppDef, BindMount, Role, VolumeMount, macros

from launch.paths import is_folder, with_absolute_data
from launch.request import TORCHX, Request, check_effect, takes_request
from launch.resources import requested
from trainer.command_line import WrongUse, run_command
from trainer.recipes import load_recipe
from trainer.typed_values import apply_overrides

logger = logging.getLogger(__name__)

ROLE = "trainer"


def train(*arguments: str) -> AppDef:
    """`python -m trainer train` through a scheduler of TorchX's own, of which it has more than `launch submit`:

    torchx run -s aws_batch launch/component.py:train RECIPE --nodes 2 --procs-per-node 8 --run-dir /shared/first

    Args:
        arguments: RECIPE, then those of `python -m launch submit` but --scheduler and --option.
    """
    jobs: list[AppDef] = []

    @takes_request
    def take(request: Request) -> None:
        try:
            jobs.append(_job_of_torchx(request))
        except ValueError as error:
            raise WrongUse(str(error)) from None

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(take)
    status = run_command(app, [*arguments, "--scheduler", TORCHX])
    if not jobs:
        sys.exit(status)
    logger.warning(
        "TorchX sends this job, which ends with its allocation; a job of `launch submit` continues by itself"
    )
    return jobs[0]


def _job_of_torchx(request: Request) -> AppDef:
    check_effect(request, ("options", "max_restarts"))
    config = apply_overrides(load_recipe(request.recipe), request.overrides)
    in_container = request.image is not None
    return job(with_absolute_data(request, config, runs_here=not in_container, in_container=in_container))


def job(request: Request) -> AppDef:
    """`python -m trainer train` on `nodes` x `procs_per_node` processes.

    Raises:
        ValueError: the machine is unknown or too small, an override or a mount is malformed.
    """
    return AppDef(name=request.job_name, roles=[_role(request)])


def sweep(requests: Sequence[Request], name: str) -> AppDef:
    """Runs that start apart from one another: a role each, alike but for their arguments."""
    return AppDef(name=name, roles=[_role(request) for request in requests])


def _role(request: Request) -> Role:
    trainer = ["-m", "trainer", "train", request.recipe, "--run-dir", str(request.absolute_run_dir)]
    if request.plan is not None:
        trainer += ["--plan", str(Path.cwd() / request.plan)]
    if request.profile is not None:
        trainer += ["--profile", request.profile]
    for override in request.overrides:
        trainer += ["--set", override]
    node = ["-m", "launch.node", "--nodes", str(request.nodes), "--procs-per-node", str(request.procs_per_node)]
    node += ["--node-rank", macros.replica_id, "--first-node-variable", macros.rank0_env]
    data = apply_overrides(load_recipe(request.recipe), request.overrides).data
    return Role(
        name=ROLE,
        image=request.image or "",
        entrypoint=request.interpreter,
        # `$` starts a macro in TorchX's arguments; a doubled one is itself.
        args=[*node, "--", *(argument.replace("$", "$$") for argument in trainer)],
        num_replicas=request.nodes,
        resource=requested(request.machine, procs_per_node=request.procs_per_node),
        max_retries=request.max_retries,
        mounts=mounts_of(request),
        metadata={
            "run_dir": str(request.absolute_run_dir),
            "procs_per_node": request.procs_per_node,
            "max_restarts": request.max_restarts,
            # TorchX writes a job's folder over a role's image where the code goes into a folder.
            "image": request.image,
            # What nodes read from a file system, for checks before the run.
            "data": [path for path in (data.path, *data.mix_paths) if is_folder(path)],
        },
    )


def mounts_of(request: Request) -> list[BindMount | VolumeMount]:
    """The request's mounts in TorchX's terms.

    Raises:
        ValueError: one is malformed.
    """
    return [_mount(mount) for mount in request.mounts]


def _mount(text: str) -> BindMount | VolumeMount:
    """`/SRC:/DST` is a folder of the node, `CLAIM:/DST` a volume; `:ro` after either makes it read-only."""
    source, _, rest = text.partition(":")
    target, colon, mode = rest.partition(":")
    if not source or not PurePath(target).is_absolute() or (colon and mode != "ro"):
        raise ValueError(
            f"--mount {text!r} must be SRC:DST or SRC:DST:ro, with DST an absolute path and SRC an absolute one or "
            "the name of a volume"
        )
    if PurePath(source).is_absolute():
        return BindMount(src_path=source, dst_path=target, read_only=bool(colon))
    if "/" in source:
        raise ValueError(f"--mount {text!r}: {source!r} is a relative path; give an absolute one")
    return VolumeMount(src=source, dst_path=target, read_only=bool(colon))
