"""The commands of `python -m trainer`: what each takes, and what does its work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.reading.reader_server import reader_server
from trainer.checkpoint import listing
from trainer.checkpoint.catalogue import open_catalogue
from trainer.command_line import WrongUse, lasting, parse_window, show_findings
from trainer.config import TrainConfig
from trainer.health.guard import GUARD, IDLE_S, IMPORTS_S
from trainer.health.stop_signal import STOP
from trainer.recipes import load_recipe, recipe_summaries
from trainer.report.page import write_report
from trainer.run.run_dir import RunDir
from trainer.typed_values import apply_overrides

if TYPE_CHECKING:
    from trainer.export.description import Export

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, evaluate and plan Longview models.",
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `recipes` lists.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE ...", help="Change values of the recipe, for example data.num_epochs=3."),
]


@app.command()
def recipes() -> None:
    """List the recipes."""
    for name, summary in recipe_summaries().items():
        print(f"{name:<20} {summary}")


@app.command()
def train(
    recipe: Recipe,
    run_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: runs/RECIPE.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A sharding plan that `plan --out` wrote.")] = None,
    from_step: Annotated[
        int | None,
        typer.Option(metavar="N", help="Go back to the checkpoint of step N; later ones are set aside."),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Start from what this run has learnt: rows of tables by key, dense weights, optimizers.",
        ),
    ] = None,
    init_only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES ...", help="Take only tensors of these names, as 'tables/*'; OLD=NEW gives a new name."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="STEP:COUNT", help="Write a trace of COUNT steps from STEP on, for Chrome and Perfetto."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Train a recipe, or resume if the run directory holds a checkpoint."""
    config = _resolve(recipe, set_)
    window = None if profile is None else parse_window(profile)
    GUARD.expect("its imports", IMPORTS_S, idle_s=IDLE_S)
    if config.data.reader_threads:
        reader_server()
    # torch takes seconds to import; a wrong recipe or key is answered before.
    with lasting():
        from trainer.jobs.train import Start, train_job

    GUARD.expect("its checks", config.watch.first_s)
    train_job(
        config,
        run_dir or Path("runs", recipe),
        Start(
            plan_file=plan,
            from_step=from_step,
            init_from=init_from,
            init_only=tuple(init_only or ()),
            profile=window,
        ),
    )
    STOP.ignore()


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory with a complete checkpoint.")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Default: the newest complete checkpoint.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE ...", help="Other data of the same vocabularies: data.path=data/today."
        ),
    ] = None,
) -> None:
    """Score a checkpoint on the evaluation split, of the run's data or of later data."""
    from trainer.jobs.evaluate import evaluate_job

    evaluate_job(run_dir, step, set_ or [])


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help="Run directories.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
) -> None:
    """Show runs on one page: curves, evaluations, plan, configuration; it loads nothing from elsewhere."""
    write_report(run_dirs, out)
    print(out)


@app.command()
def checkpoints(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with its checksum.")] = False,
    pin: Annotated[int | None, typer.Option(metavar="N", help="Never delete the checkpoint of step N.")] = None,
    unpin: Annotated[int | None, typer.Option(metavar="N", help="Undo --pin for the checkpoint of step N.")] = None,
) -> None:
    """List the complete checkpoints of a run; exit status 1 if one is damaged."""
    run = RunDir(run_dir)
    catalogue = open_catalogue(run, run.config_of_run().get("checkpoint", {}).get("store"))
    for step, pinned in ((pin, True), (unpin, False)):
        if step is not None:
            listing.pin(catalogue, step, pinned)
    lines, fine = listing.list_checkpoints(catalogue, verify=verify)
    print(*lines, sep="\n")
    if not fine:
        raise typer.Exit(1)


KeysOf = Annotated[
    str | None, typer.Option(metavar="DIR", help="The data set whose keys the tables have, if it has moved.")
]


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory with a complete checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Default: the newest complete checkpoint.")] = None,
    data: KeysOf = None,
) -> None:
    """Write dense weights as safetensors and tables as Parquet by key."""
    from trainer.export.write import export_run

    exported = export_run(run_dir, out, step=step, data=data)
    print(f"step {exported.step} of {run_dir}: {_counted(exported)} in {out}")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote, edited or not.")],
    out: Annotated[Path, typer.Option(metavar="RUN_DIR", help="A new run directory.")],
    data: KeysOf = None,
) -> None:
    """Make a run at step 0 from an export; its optimizers start afresh."""
    from trainer.export.read import import_run

    imported = import_run(folder, out, data=data)
    print(f"{_counted(imported)} in {out}; next: python -m trainer evaluate {out}")


def _counted(exported: "Export") -> str:
    return f"{len(exported.tables)} tables, {len(exported.dense)} dense tensors"


@app.command()
def doctor() -> None:
    """Say what this machine has and what prevents training on it; exit status 1 if something does."""
    from trainer.health.doctor import look_at_machine

    show_findings(look_at_machine())


@app.command()
def plan(
    recipe: Recipe,
    world_size: Annotated[int, typer.Option(metavar="W", min=1, help="Processes of the job.")],
    local_world_size: Annotated[
        int | None,
        typer.Option(metavar="L", min=1, help="Processes a machine; default: the most up to 8 that divide W."),
    ] = None,
    hbm_gib: Annotated[float | None, typer.Option(metavar="G", help="Memory of a GPU in GiB; default: 80.")] = None,
    host_gib: Annotated[float | None, typer.Option(metavar="G", help="Host memory a rank, GiB; default: 128.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan here, for train --plan.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="A run of the same model on GPUs: counts its activations, predicts steps."
        ),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Plan where the recipe's tables go on a cluster, without a GPU, and explain the plan."""
    config = _resolve(recipe, set_)
    from trainer.jobs.plan import plan_job

    plan_job(
        config,
        world_size=world_size,
        local_world_size=local_world_size,
        hbm_gib=hbm_gib,
        host_gib=host_gib,
        out=out,
        like=like,
    )


def _resolve(recipe: str, overrides: list[str] | None) -> TrainConfig:
    try:
        return apply_overrides(load_recipe(recipe), overrides or [])
    except ValueError as error:
        raise WrongUse(str(error)) from None
