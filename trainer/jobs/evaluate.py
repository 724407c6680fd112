"""Score a checkpoint of a run, on the data that it was trained on or on later data."""

from pathlib import Path

import torch.distributed as dist

from pipelines.reading.loader import dataset_info, open_source
from trainer.build import agreed_plan, build_parallel, machine_of, make_plan
from trainer.checkpoint.catalogue import Catalogue, Checkpoint, open_catalogue
from trainer.checkpoint.loading import load_checkpoint
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.evaluator import evaluate_and_show
from trainer.health.preflight import check_packages
from trainer.parallel.alike import check_alike
from trainer.parallel.mesh import discover_mesh, joined
from trainer.resolve import resolve_again
from trainer.run.run_dir import CHANGEABLE, RunDir
from trainer.run.run_log import logged
from trainer.typed_values import apply_overrides, differences, to_dict


def evaluate_job(run_dir: Path, step: int | None, overrides: list[str]) -> None:
    """Score a checkpoint of `run_dir` on the evaluation split, on any number of ranks.

    `overrides` may name other data of the same vocabularies: what came in after the training.
    """
    check_packages()
    mesh, run = discover_mesh(), RunDir(run_dir)
    trained = run.trained_config()
    config = _overridden(trained, overrides)
    catalogue = open_catalogue(run, config.checkpoint.store)
    checkpoint = catalogue.choose(step)
    resolved, grown = resolve_again(config, dataset_info(config.data), run.saved_vocabularies(), run.path)
    evaluated = open_source(config.data, resolved.info, "eval", resolved.task.selection)
    plan = make_plan(resolved, machine_of(mesh, config.placement.machine))
    file = run.eval_file if config.data.path == trained.data.path else run.eval_file_of(config.data.path)
    with logged(run, mesh), joined(mesh):
        checkpoint = _of_all_ranks(checkpoint, catalogue)
        check_alike(mesh, {"checkpoint": checkpoint.digest}, resolved, eval=evaluated.contents)
        model = build_parallel(resolved, agreed_plan(plan, resolved, mesh), mesh)
        group = dist.new_group(backend="gloo")
        load_checkpoint(catalogue, checkpoint, model.tensors(), group, grown)
        evaluate_and_show(resolved, model, file, mesh, checkpoint.step)


def _of_all_ranks(checkpoint: Checkpoint, catalogue: Catalogue) -> Checkpoint:
    """The checkpoint that the first rank has chosen, since training may have written a newer one meanwhile.  Called by
    every rank."""
    step = [checkpoint.step]
    dist.broadcast_object_list(step, 0)  # every rank
    return checkpoint if checkpoint.step == step[0] else catalogue.choose(step[0])


def _overridden(trained: TrainConfig, overrides: list[str]) -> TrainConfig:
    """A run's configuration with what an evaluation may change; raises WrongUse for anything else."""
    try:
        config = apply_overrides(trained, overrides)
    except ValueError as error:
        raise WrongUse(str(error)) from None
    for key, _, new in differences(to_dict(trained), to_dict(config)):
        if not key.startswith(CHANGEABLE):
            raise WrongUse(f"--set {key}={new} would make another model of it: an evaluation may change the data alone")
    return config
