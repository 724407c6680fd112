"""A job as asked for: its fields, stated once.  `submit` and `sweep` take them as options, the component as data."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

TORCHX = "torchx run"
"""In place of a scheduler's name: one of TorchX's own, which `torchx run -s` names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A job as asked for on the command line; each field's help says what it is."""

    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `python -m trainer recipes` lists.")]
    scheduler: Annotated[
        str, typer.Option(metavar="NAME", help="local_cwd (this machine), slurm, kubernetes or local_docker.")
    ]
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines.")]
    procs_per_node: Annotated[int, typer.Option(metavar="P", min=1, help="Processes a machine: one a GPU.")]
    run_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: runs/RECIPE.  In containers: a path under a --mount.")
    ] = None
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE ...", help="Change the recipe's values.")
    ] = field(default_factory=list)
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A sharding plan to use.")] = None
    profile: Annotated[
        str | None,
        typer.Option(metavar="STEP:COUNT", help="Write a trace of COUNT steps from STEP on, for Chrome and Perfetto."),
    ] = None
    machine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Machine type of embeddings/hardware.py, or a .json file; default: P cores."),
    ] = None
    python: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The workers' interpreter; default: this one, in images `python`."),
    ] = None
    image: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Image with the dependencies, not the project; on slurm for pyxis."),
    ] = None
    mounts: Annotated[
        list[str],
        typer.Option(
            "--mount", metavar="SRC:DST[:ro]", help="SRC: a folder of the node, or on kubernetes a volume claim's name."
        ),
    ] = field(default_factory=list)
    max_retries: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="New starts after failures without a new checkpoint; a failure after a new one does not count.",
        ),
    ] = 0
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Slurm: how many of the starts happen inside an allocation before a new one."
        ),
    ] = 1
    options: Annotated[
        list[str],
        typer.Option("--option", metavar="KEY=VALUE", help="A scheduler's option; on slurm any option of sbatch."),
    ] = field(default_factory=list)

    @property
    def absolute_run_dir(self) -> Path:
        """The run directory as every worker sees it."""
        return Path.cwd() / (self.run_dir or Path("runs", self.recipe))

    @property
    def interpreter(self) -> str:
        """What the workers run: a path on the nodes, or a name in the image."""
        return self.python or ("python" if self.image else sys.executable)

    @property
    def job_name(self) -> str:
        """Recipe and run, in the characters that every scheduler takes (Kubernetes is the strictest)."""
        run = self.absolute_run_dir.name
        words = run if run.startswith(self.recipe) else f"{self.recipe}-{run}"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:40].strip("-")


def check_effect(request: Request, without: Sequence[str]) -> None:
    """Make sure that no field is given that would change nothing.

    Args:
        request: the job.
        without: names of fields that mean nothing to its scheduler.

    Raises:
        ValueError: one is given.
    """
    for entry in fields(Request):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.name in without and getattr(request, entry.name) != default:
            option = "--" + {"mounts": "mount", "options": "option"}.get(entry.name, entry.name).replace("_", "-")
            raise ValueError(f"{option} has no effect with scheduler {request.scheduler}: leave it out")


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a function of (request, ...): the request's fields become its options."""
    hints = get_type_hints(Request, include_extras=True)
    of_request = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(entry.default, entry.default_factory),
            annotation=hints[entry.name],
        )
        for entry in fields(Request)
    ]
    of_command = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "request"
    ]

    @wraps(command)
    def with_request(**values: Any) -> None:
        given = {parameter.name: values.pop(parameter.name) for parameter in of_request}
        command(Request(**given), **values)

    parameters = [*of_request, *of_command]
    vars(with_request).pop("__wrapped__")
    with_request.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(with_request)["__signature__"] = inspect.Signature(parameters)
    return with_request


def _default(value: Any, factory: Any) -> Any:
    if factory is not MISSING:
        return factory()
    return inspect.Parameter.empty if value is MISSING else value
