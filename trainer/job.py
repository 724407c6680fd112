"""The three jobs behind the command line: train, evaluate, plan.

Each checks everything it can before it changes anything on disk.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from embeddings.machine import Machine
from embeddings.plan import Plan
from embeddings.plan_file import read_plan, write_plan
from embeddings.planner import plan_tables
from embeddings.report import plan_report
from embeddings.sharding import to_sharding_plan
from pipelines.baseline import TrainingRates, baseline_scores, count_rates, join_users
from pipelines.batch import Batch
from pipelines.config import DataConfig
from pipelines.features import DatasetInfo
from pipelines.loader import Loader, build_loader, dataset_info, open_source
from pipelines.overlap import check_overlap
from trainer.assemble import (
    build_model,
    check_lengths,
    lookup_load,
    table_configs,
    tasks_of,
    token_count,
    training_cost,
)
from trainer.checkpoint import Progress, load_tensors, read_progress
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.evaluate import comparison_table, evaluate
from trainer.loop import Feed, ModelBatch, run_steps
from trainer.mesh import Mesh, discover_mesh, joined
from trainer.metrics import score
from trainer.models.transducers import event_choices
from trainer.parallelize import ParallelModel, parallelize
from trainer.preflight import check_fp8, check_kernels, check_packages, device_name, installed_versions
from trainer.recorder import Consumed, Recorder
from trainer.retrieval import evaluate_retrieval, retrieval_table, retriever_batch
from trainer.run_dir import JsonLines, RunDir, locked, write_json
from trainer.run_log import logged
from trainer.typed_values import from_dict, to_dict

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 2**20
"""Items whose counts are added up over ranks in one piece, so that they need little of a GPU's memory."""


def train_job(config: TrainConfig, run_dir: Path, plan_file: Path | None) -> None:
    """Train `config` in `run_dir`, going on from its newest complete checkpoint if it has one."""
    check_packages()
    mesh, run = discover_mesh(), RunDir(run_dir)
    run.check_same_run(to_dict(config))
    info = dataset_info(config.data)
    tasks = tasks_of(config, info)
    check_settings(config, info, mesh)
    plan = make_plan(config, info, machine_of(mesh), plan_file)
    steps = run.complete_steps()
    progress = read_progress(run.checkpoint(steps[-1])) if steps else Progress()
    loader = training_loader(config, info, mesh, progress)
    # Nothing has been written so far: a mistake up to here leaves the run directory as it was.
    # Reading begins while the model is being built.
    sole = locked(run) if mesh.is_first else nullcontext()
    with sole, logged(run, mesh), joined(mesh), closing(iter(loader)) as batches:
        check_kernels(mesh.device, config.model.layers, getattr(torch, config.precision))
        model = build_parallel(config, info, plan, mesh)
        if steps:
            load_tensors(run.checkpoint(progress.step), model.tensors())
        if mesh.is_first:
            write_json(run.config_file, to_dict(config))
            write_plan(run.plan_file, plan)
        total_samples = _total_samples(config, loader)
        announce(config, info, plan, mesh, progress, model, total_samples)
        recorder = Recorder(
            run,
            mesh,
            progress,
            total_samples=total_samples,
            training_flops=training_cost(config, info),
            token_count=token_count(config, info),
        )
        # Cut here, not in the loop: the pipeline looks ahead, and must see where the data ends.
        remaining = None if config.max_steps is None else max(0, config.max_steps - progress.step)
        try:
            run_steps(
                model,
                Feed(
                    islice(batches, remaining),
                    consumption(config, info),
                    functools.partial(for_model, config, info, mesh),
                ),
                progress,
                config=config,
                run=run,
                mesh=mesh,
                recorder=recorder,
                evaluate=lambda step: recorder.add_evaluation(
                    evaluate_and_show(model, config, info, tasks, run, mesh, step), step
                ),
            )
        finally:
            recorder.close()
        logger.info("done after %d steps and %d samples: %s", progress.step, progress.samples, run.path)
        logger.info("next: python -m trainer evaluate %s", run.path)
        logger.info("      tensorboard --logdir %s", run.tensorboard)


def check_settings(config: TrainConfig, info: DatasetInfo, mesh: Mesh) -> None:
    """Refuse with a ValueError what data or machine do not serve, before anything is written."""
    check_lengths(config, info)
    check_overlap(config.overlap, mesh.device)
    if any(layer.fp8 for layer in config.model.layers):
        check_fp8(mesh.device)
    # Read at the end only, when it would be late to miss it.
    open_source(config.data.path, config.data, "eval")


def evaluate_job(run_dir: Path, step: int | None) -> None:
    """Score a checkpoint of `run_dir` on the evaluation split, on any number of ranks."""
    check_packages()
    mesh, run = discover_mesh(), RunDir(run_dir)
    saved = run.saved_config()
    if saved is None:
        raise WrongUse(f"{run_dir} holds no config.json: name a run directory that `train` made")
    config = from_dict(TrainConfig, saved)
    step = run.step_to_load(step)
    info = dataset_info(config.data)
    plan = make_plan(config, info, machine_of(mesh), None)
    with logged(run, mesh), joined(mesh):
        model = build_parallel(config, info, plan, mesh)
        load_tensors(run.checkpoint(step), model.tensors())
        evaluate_and_show(model, config, info, tasks_of(config, info), run, mesh, step)


def plan_job(
    config: TrainConfig, *, world_size: int, local_world_size: int | None, hbm_gib: float | None, out: Path | None
) -> None:
    """Plan the recipe's tables for GPUs that need not be here; print the plan and, with `out`, write it."""
    if local_world_size is None:
        local_world_size = max(size for size in range(1, 9) if world_size % size == 0)
    try:
        machine = Machine(
            world_size=world_size,
            local_world_size=local_world_size,
            compute_device="cuda",
            hbm_gib=80.0 if hbm_gib is None else hbm_gib,
        )
    except ValueError as error:
        raise WrongUse(str(error)) from None
    plan = make_plan(config, dataset_info(config.data), machine, None)
    print(plan_report(plan))
    if out is not None:
        write_plan(out, plan)
        print(f"written to {out}; use it with: python -m trainer train {config.name} --plan {out}")


def machine_of(mesh: Mesh) -> Machine:
    """The machines that this job runs on, as the planner sees them."""
    memory = torch.cuda.get_device_properties(mesh.device).total_memory if mesh.device.type == "cuda" else None
    return Machine(
        world_size=mesh.world_size,
        local_world_size=mesh.local_world_size,
        compute_device=mesh.device.type,
        hbm_gib=None if memory is None else memory / 2**30,
    )


def make_plan(config: TrainConfig, info: DatasetInfo, machine: Machine, plan_file: Path | None) -> Plan:
    """Read the plan of `plan_file`, checked against tables and machine, or make one.  Every rank makes the same."""
    tables = table_configs(config, info)
    if plan_file is not None:
        try:
            return read_plan(plan_file, tables=tables, machine=machine)
        except ValueError as error:
            raise WrongUse(str(error)) from None
    model = build_model(config, info, tables, torch.device("meta"))
    return plan_tables(
        model,
        tables,
        machine=machine,
        placement=config.placement,
        optimizer=config.sparse_optimizer,
        load=lookup_load(config, info, machine.world_size),
    )


def build_parallel(config: TrainConfig, info: DatasetInfo, plan: Plan, mesh: Mesh) -> ParallelModel:
    """The model of `config`, sharded as `plan` says, with initial values.  Called by every rank."""
    tables = table_configs(config, info)
    model = build_model(config, info, tables, mesh.device)
    return parallelize(model, to_sharding_plan(plan, model), config, mesh)


def training_loader(config: TrainConfig, info: DatasetInfo, mesh: Mesh, progress: Progress) -> Loader:
    """This rank's parts of the global batches that come after `progress`."""
    return build_loader(
        config.data,
        split="train",
        rank=mesh.rank,
        world_size=mesh.world_size,
        position=progress.position,
        cost=training_cost(config, info, config.data.attention_cost),
        pin_memory=mesh.device.type == "cuda",
    )


def for_model(config: TrainConfig, info: DatasetInfo, mesh: Mesh, batch: Batch) -> ModelBatch:
    """A training batch in the form that the model reads."""
    if config.model.retrieval is None:
        return batch
    return retriever_batch(batch, config, info.num_items, mesh, train=True)


def _total_samples(config: TrainConfig, loader: Loader) -> int | None:
    """Samples of the whole run, for the progress bar; None for a stream without a known end."""
    limits = [loader.total_samples, config.max_steps and config.max_steps * config.data.global_batch_size]
    return min((limit for limit in limits if limit is not None), default=None)


def consumption(config: TrainConfig, info: DatasetInfo) -> Callable[[Batch], Consumed]:
    """What the loop notes of a batch: little, for it delays the launch of a step."""
    choices = event_choices(config.model, info.actions)
    selective = {name: choice for name, choice in choices.items() if not choice.selects_all}

    def describe(batch: Batch) -> Consumed:
        return Consumed(
            position=batch.position,
            samples=batch.global_samples,
            # Copies: views would keep the whole batch's memory.
            history_lens=batch.history_lens_host.numpy().copy(),
            num_candidates=batch.num_candidates_host.numpy().copy(),
            channel_history_lens={name: choice.history_lens(batch).numpy() for name, choice in selective.items()},
            imbalance=batch.imbalance,
        )

    return describe


def evaluate_and_show(
    model: ParallelModel,
    config: TrainConfig,
    info: DatasetInfo,
    tasks: tuple[str, ...],
    run: RunDir,
    mesh: Mesh,
    step: int,
) -> dict[str, float]:
    """Evaluate, append to eval.jsonl unless the step stands there already, and show the result beside the baseline."""
    on_gpu = mesh.device.type == "cuda"
    batches = build_loader(config.data, split="eval", rank=mesh.rank, world_size=mesh.world_size, pin_memory=on_gpu)
    if config.model.retrieval is not None:
        metrics, popularity = evaluate_retrieval(model, batches, config, info.num_items, mesh)
        table = retrieval_table(metrics, popularity)
    else:
        metrics = evaluate(model, batches, tasks, mesh)
        baseline = baseline_metrics(config.data, tasks, mesh)
        table = comparison_table(metrics, baseline, tasks) if mesh.is_first else ""
    if mesh.is_first:
        if not JsonLines(run.eval_file).append({"step": step, **metrics}):
            logger.info("%s has a line of step %d already; it stays as it is", run.eval_file, step)
        logger.info("evaluation at step %d:\n%s", step, table)
    return metrics


@functools.cache
def baseline_metrics(config: DataConfig, tasks: tuple[str, ...], mesh: Mesh) -> dict[str, float]:
    """What the rates of items and users in the training split predict, on the first rank; nothing on the others.

    Every rank reads its share of the split, once: the result is the same at every evaluation of a run.
    """
    mine = count_rates(config, tasks, mesh.rank, mesh.world_size)
    for values in (mine.items.positive, mine.items.count):
        _add_on_first(values, mesh)
    parts = [mine.users] * mesh.world_size if mesh.is_first else None
    dist.gather_object(mine.users, parts)  # every rank
    if parts is None:
        return {}
    baseline = baseline_scores(config, tasks, TrainingRates(mine.items, join_users(parts)))
    scores, labels, users = (torch.from_numpy(x) for x in (baseline.scores, baseline.labels, baseline.user_id))
    return score(scores.double(), labels.double(), users, tasks)


def _add_on_first(values: npt.NDArray[np.float64], mesh: Mesh) -> None:
    """Add up all ranks' arrays in the first one's, by way of the device that they communicate through, in pieces."""
    for first in range(0, len(values), ROWS_AT_A_TIME):
        piece = torch.from_numpy(values[first : first + ROWS_AT_A_TIME]).to(mesh.device, copy=True)
        dist.reduce(piece, 0)  # every rank
        values[first : first + ROWS_AT_A_TIME] = piece.cpu().numpy()


def announce(
    config: TrainConfig,
    info: DatasetInfo,
    plan: Plan,
    mesh: Mesh,
    progress: Progress,
    model: ParallelModel,
    total_samples: int | None,
) -> None:
    """Log what this run is made of."""
    logger.info("recipe %s on %d x %s", config.name, mesh.world_size, device_name(mesh.device))
    logger.info("versions %s", ", ".join(f"{name} {version}" for name, version in installed_versions().items()))
    logger.info("data %s (%s)", config.data.path, info.name)
    logger.info("dense parameters %s", f"{sum(parameter.numel() for parameter in model.dense.parameters()):,}")
    logger.info("%s", plan_report(plan))
    if progress.step:
        logger.info("resuming after step %d and %d samples", progress.step, progress.samples)
        if total_samples is not None and progress.samples >= total_samples:
            logger.info("nothing is left to train: to go on, raise data.num_epochs, data.max_samples or max_steps")
