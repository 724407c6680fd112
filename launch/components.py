"""TorchX components: typed functions from arguments to a job description (an AppDef).  They only build data.

The worker command is a module and a list of arguments, never a shell string: `launch.node` runs on every node, finds
the first node and becomes torchrun, which starts the trainer.
"""

import re
from collections.abc import Sequence
from pathlib import PurePath

from torchx.specs import AppDef, BindMount, Role, macros

from launch.resources import Machine

ROLE = "trainer"


def train(
    recipe: str,
    *,
    run_dir: PurePath,
    nodes: int,
    procs_per_node: int,
    machine: Machine,
    python: str,
    overrides: Sequence[str] = (),
    plan: PurePath | None = None,
    image: str = "",
    mounts: Sequence[str] = (),
    max_retries: int = 0,
) -> AppDef:
    """`python -m trainer train` on `nodes` x `procs_per_node` processes.

    Args:
        recipe: name of the training recipe.
        run_dir: absolute run directory, the same on every node; an existing run in it is resumed.
        nodes: number of machines.
        procs_per_node: processes a machine, one a GPU where there are GPUs.
        machine: what each node must offer.
        python: the interpreter, as named on the node or in the image.
        overrides: `key=value` overrides of the recipe.
        plan: absolute path of a sharding plan to use instead of planning.
        image: container image, where the scheduler runs containers; it holds the dependencies, not this project.
        mounts: `SRC:DST` folders of the node to mount into the container.
        max_retries: how often the scheduler may start the job again after a failure; it then resumes.
    """
    trainer = ["-m", "trainer", "train", recipe, "--run-dir", str(run_dir)]
    if plan is not None:
        trainer += ["--plan", str(plan)]
    for override in overrides:
        trainer += ["--set", override]
    # `$` starts a macro in TorchX's arguments; a doubled one is itself.
    trainer = [argument.replace("$", "$$") for argument in trainer]
    node = ["-m", "launch.node", "--nodes", str(nodes), "--procs-per-node", str(procs_per_node)]
    node += ["--node-rank", macros.replica_id, "--job-id", macros.app_id, "--first-node-variable", macros.rank0_env]
    role = Role(
        name=ROLE,
        image=image,
        entrypoint=python,
        args=[*node, "--", *trainer],
        num_replicas=nodes,
        resource=machine.resource(),
        max_retries=max_retries,
        mounts=[_bind_mount(mount) for mount in mounts],
    )
    return AppDef(name=app_name(recipe), roles=[role])


def app_name(recipe: str) -> str:
    """The recipe's name in the characters that every scheduler takes (Kubernetes is the strictest)."""
    return re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")


def _bind_mount(text: str) -> BindMount:
    source, colon, target = text.partition(":")
    if not (colon and PurePath(source).is_absolute() and PurePath(target).is_absolute()):
        raise ValueError(f"--mount {text!r} must be SRC:DST with two absolute paths")
    return BindMount(src_path=source, dst_path=target)
