"""The TorchX component: a request to a job description (an AppDef).  It only builds data.

The worker command is a module and a list of arguments, never a shell string: `launch.node` runs on every node, finds
the first node and starts the trainer's processes.
"""

from collections.abc import Sequence
from pathlib import Path, PurePath

from torchx.specs import AppDef, BindMount, Role, VolumeMount, macros

from launch.paths import is_folder
from launch.request import Request
from launch.resources import requested
from trainer.recipes import load_recipe
from trainer.typed_values import apply_overrides

ROLE = "trainer"


def train(request: Request) -> AppDef:
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
