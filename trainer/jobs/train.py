"""Train a run from its start or from a checkpoint.  All that can be checked is checked before anything is written."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from embeddings.plan import Plan
from embeddings.planning.plan_file import write_plan
from embeddings.planning.report import plan_summary
from embeddings.rows.touched import TouchedRows
from pipelines.batches.batch import Batch
from pipelines.overlap import StepPipeline, check_overlap
from pipelines.reading.loader import Loader, build_loader, dataset_info, open_source
from pipelines.selection import unread_columns
from pipelines.storage.source import Source
from trainer.build import agreed_plan, build_parallel, machine_of, make_plan
from trainer.checkpoint.catalogue import Catalogue, Newest, open_catalogue
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.manifest import writing_versions
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.restoring import Restart
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.determinism import make_deterministic
from trainer.evaluator import Evaluator
from trainer.freezing import announce_frozen
from trainer.health.guard import GUARD
from trainer.health.preflight import check_fp8, check_machines, check_packages, device_name, installed_versions
from trainer.health.watchdog import Watchdog
from trainer.labels.running import running_metrics
from trainer.loop import Loop
from trainer.parallel.alike import check_alike
from trainer.parallel.mesh import COLLECTIVE_TIMEOUT, Mesh, discover_mesh, joined
from trainer.parallelize import ParallelModel
from trainer.resolve import Resolved, resolve_again
from trainer.run.going_back import has_gone_back, note_going_back
from trainer.run.run_dir import RunDir, check_nothing_lost, check_still_ours, locked
from trainer.run.run_log import logged
from trainer.run.writing import written
from trainer.steps.feed import Feed
from trainer.steps.left_out import LeftOut, NotFinite
from trainer.steps.optim import settle_schedule
from trainer.steps.recording import check_recorded
from trainer.steps.step_log import StepLog
from trainer.target import parse_target
from trainer.typed_values import differences, to_dict
from trainer.warm_start import WarmStart

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How a training job begins, besides what its configuration says."""

    plan_file: Path | None = None
    """A sharding plan; None makes one."""
    from_step: int | None = None
    """Go back to the checkpoint of this step; None goes on from the newest."""
    init_from: Path | None = None
    """A run to begin with, where there is no checkpoint yet; None begins with initial values."""
    init_only: tuple[str, ...] = ()
    """Patterns of what is taken from it (`trainer.name_patterns`); none for everything."""
    profile: tuple[int, int] | None = None
    """The first step and the number of steps of which a trace is written; None for none."""

    def told(self) -> dict[str, Any]:
        """What all ranks must have been told alike, by the words of the command line."""
        plan = None if self.plan_file is None else hashlib.sha256(self.plan_file.read_bytes()).hexdigest()
        init_from = None if self.init_from is None else str(self.init_from)
        return {
            "--from-step": self.from_step,
            "--init-from": init_from,
            "--init-only": list(self.init_only),
            "--plan": plan,
        }


def train_job(config: TrainConfig, run_dir: Path, start: Start) -> None:
    """Train `config` in `run_dir`, going on from its newest complete checkpoint if it has one, or that of a step."""
    check_packages()
    if config.deterministic:
        make_deterministic()
    mesh, run = discover_mesh(config.context_parallel), RunDir(run_dir)
    run.check_same_run(to_dict(config))
    resolved, grown = resolve_again(config, dataset_info(config.data), run.saved_vocabularies(), run.path)
    evaluated = check_settings(resolved, mesh)
    plan = make_plan(resolved, machine_of(mesh, config.placement.machine), start.plan_file)
    catalogue = open_catalogue(run, config.checkpoint.store)
    newest = find_newest(run, catalogue, start.from_step)
    check_versions(newest, config)
    warm = warm_start(start, resolved, newest)
    loader = training_loader(resolved, mesh, newest.progress)
    settled = _settle(resolved, loader, newest.progress)
    # Nothing has been written so far: a mistake up to here leaves the run directory as it was.
    GUARD.expect("meeting the other ranks", 2 * COLLECTIVE_TIMEOUT.total_seconds())
    sole = locked(run) if mesh.is_first else nullcontext()
    with sole, logged(run, mesh), joined(mesh) as store, ExitStack() as opened:
        watchdog = opened.enter_context(closing(Watchdog(store, mesh, config.watch)))
        batches = opened.enter_context(closing(iter(loader)))  # read ahead while the model is built
        check_machines(mesh, store, run_dir, config.model.layers, getattr(torch, config.precision))
        left_out = LeftOut(run, config.nonfinite, mesh)
        told = start.told() | {"checkpoint": newest.digest, "left_out": left_out.steps}
        check_alike(mesh, told, resolved, train=loader.contents, eval=evaluated.contents)
        plan = agreed_plan(plan, resolved, mesh, start.plan_file)
        model = build_parallel(settled, plan, mesh)
        checkpointer = Checkpointer(
            run,
            catalogue,
            mesh,
            model.tensors,
            config.checkpoint,
            phase=watchdog.phase,
            grown=grown,
            touched=TouchedRows(model.tables) if config.checkpoint.deltas else None,
            check_ours=partial(check_still_ours, run),
        )
        opened.enter_context(closing(checkpointer))
        restart = checkpointer.restore(newest)
        checkpointer.reserve()
        if warm is not None:
            warm.load(model.tensors(), dist.new_group(backend="gloo"))
        if mesh.is_first:
            warn_of_other_samples(run, resolved, loader)
            write_settings(run, resolved, plan, mesh, start.from_step, data=loader.contents)
            claim_store(run, catalogue, config.checkpoint.store)
        announce(run, resolved, plan, model, mesh)
        if config.nonfinite.policy != "stop" and restart.progress.step == 0:
            # The run may have to go back to before its first step: save the beginning.
            checkpointer.save(restart.progress)
        session = _Session(run, settled, mesh, model, catalogue, checkpointer, watchdog, left_out, start.profile)
        if restart.progress == newest.progress:
            spoilt = session.train(restart, loader, batches)
        else:
            # The newest checkpoint, which `batches` follow, was damaged, and an older one was restored.
            spoilt = session.train_anew(restart)
        while spoilt is not None:
            spoilt = session.train_anew(session.go_back(spoilt))


@dataclass(frozen=True, slots=True)
class _Session:
    """What a job trains with, from whichever checkpoint."""

    run: RunDir
    resolved: Resolved
    """The run, with a schedule that knows its last step."""
    mesh: Mesh
    model: ParallelModel
    catalogue: Catalogue
    checkpointer: Checkpointer
    watchdog: Watchdog
    left_out: LeftOut
    profile: tuple[int, int] | None
    """The first step and the number of steps of which a trace is written."""

    def go_back(self, spoilt: NotFinite) -> Restart:
        """Return to the newest checkpoint, and from now on leave out what has spoilt the model since."""
        # A save that is under way is of a step before the spoilt one, and counts.
        self.checkpointer.wait()
        newest = self.catalogue.newest()
        self.left_out.add(spoilt, newest.progress.step)
        return self.checkpointer.restore(newest)

    def train_anew(self, restart: Restart) -> NotFinite | None:
        """Train from `restart` with a new loader; returns as `train`."""
        loader = training_loader(self.resolved, self.mesh, restart.progress)
        with closing(iter(loader)) as batches:
            return self.train(restart, loader, batches)

    def train(self, restart: Restart, loader: Loader, batches: Iterator[Batch]) -> NotFinite | None:
        """Train on the batches after `restart` to the end; returns what spoilt the model, if something did."""
        config, progress, mesh = self.resolved.config, restart.progress, self.mesh
        total_samples = _total_samples(config, loader)
        announce_resumption(progress, total_samples)
        # Cut here, not in the loop: the pipeline looks ahead, and must see where the data ends.
        remaining = None if config.max_steps is None else max(0, config.max_steps - progress.step)
        feed = Feed(
            islice(batches, remaining),
            self.resolved,
            mesh,
            self.model.unbounded,
            self.watchdog.phase,
            step=progress.step,
            left_out=self.left_out,
        )
        model, running = self.model, running_metrics(self.model.model.loss)
        step_log = StepLog(
            self.run, mesh, restart, self.resolved, total_samples=total_samples, running=running, profile=self.profile
        )
        pipeline = StepPipeline(config.overlap, model.module, model.optimizers, mesh.device, model.loss)
        with closing(step_log), closing(pipeline):
            try:
                loop = Loop(
                    model=model,
                    feed=feed,
                    progress=progress,
                    pipeline=pipeline,
                    config=config,
                    mesh=mesh,
                    step_log=step_log,
                    checkpointer=self.checkpointer,
                    watchdog=self.watchdog,
                    evaluator=Evaluator(self.resolved, model, self.run, mesh, loader=loader, step_log=step_log),
                )
                loop.run(evaluated=restart.evaluated)
            except NotFinite as found:
                return found
        if mesh.is_first:
            # What was written after the last save: an evaluation of it, perhaps the last line of the metrics.
            with written(self.run.path):
                self.run.flush()
        announce_end(self.run, progress)
        return None


def find_newest(run: RunDir, catalogue: Catalogue, from_step: int | None) -> Newest:
    """What the run goes on from; refused where what it has saved is gone."""
    if from_step is not None and not has_gone_back(run, from_step):
        return catalogue.back_to(from_step)
    newest = catalogue.newest()
    if newest.checkpoint is None:
        check_nothing_lost(run, catalogue.store.address)
    return newest


def warn_of_other_samples(run: RunDir, resolved: Resolved, loader: Loader) -> None:
    """Tell where the samples are not those of the start before: of as many in another order nothing else would."""
    # What cannot be read is written anew.
    with suppress(WrongUse):
        before = str(run.saved_environment().get("data", ""))
        if not loader.contents.startswith(before):
            logger.warning(
                "the training samples in %s were written anew since this run last read them; if they are others, or "
                "lie in another order, some are trained on twice and others never",
                resolved.config.data.path,
            )


def write_settings(
    run: RunDir, resolved: Resolved, plan: Plan, mesh: Mesh, from_step: int | None, *, data: str
) -> None:
    """Write what the run is made of: its configuration, what its ids mean, its plan, what it runs on, and where it has
    gone back to."""
    note_going_back(run, from_step)
    run.save_config(to_dict(resolved.config), resolved.meanings())
    write_plan(run.plan_file, plan)
    run.save_environment(f"{mesh.world_size} x {device_name(mesh.device)}", installed_versions(), data)


def claim_store(run: RunDir, catalogue: Catalogue, address: str | None) -> None:
    """If checkpoints are stored outside of the run's directory, keep other runs from using that store."""
    if address is not None:
        identity = run.identity()
        assert identity is not None, "its configuration is written"
        catalogue.claim(identity)


def warm_start(start: Start, resolved: Resolved, newest: Newest) -> WarmStart | None:
    """What another run offers, where one was named and this run has no checkpoint of its own yet."""
    if start.init_from is None:
        if start.init_only:
            raise WrongUse("--init-only has no effect without --init-from RUN_DIR")
        return None
    warm = WarmStart(start.init_from, resolved.config.data.path, resolved.info, start.init_only)
    if newest.checkpoint is not None:
        logger.info("--init-from %s has no effect: the run has a checkpoint and resumes from it", start.init_from)
        return None
    return warm


def check_settings(resolved: Resolved, mesh: Mesh) -> Source:
    """Refuse with a ValueError what the machine does not serve, or data that only the end of the run would miss;
    returns what evaluations read."""
    config = resolved.config
    resolved.task.check_training_data()
    if config.evaluation.target is not None:
        check_measured("evaluation.target", parse_target(config.evaluation.target).metric, resolved)
    if config.checkpoint.keep_best is not None:
        if config.evaluation.every_steps is None:
            raise ValueError("checkpoint.keep_best has no effect without evaluation.every_steps: set it")
        check_measured("checkpoint.keep_best", config.checkpoint.keep_best.partition(":")[2], resolved)
    check_overlap(config.overlap, mesh.device)
    check_recorded(resolved, mesh)
    if any(layer.fp8 for layer in config.model.layers):
        check_fp8(mesh.device)
    return open_source(config.data, resolved.info, "eval", resolved.task.selection)


def check_measured(setting: str, metric: str, resolved: Resolved) -> None:
    """Refuse with a ValueError a setting that names a metric which no evaluation measures."""
    if metric not in resolved.task.measured:
        raise ValueError(f"{setting}: evaluations measure {', '.join(resolved.task.measured)}, and not {metric}")


def check_versions(newest: Newest, config: TrainConfig) -> None:
    """Refuse to go on under other versions where the run promises the same bits."""
    if newest.checkpoint is None or not config.deterministic:
        return
    for key, old, new in differences(dict(newest.checkpoint.manifest.versions), writing_versions()):
        raise ValueError(
            f"deterministic=true, but the checkpoint of step {newest.checkpoint.step} was written with {key} {old} and "
            f"this is {new}: go on with the versions that wrote it"
        )


def training_loader(resolved: Resolved, mesh: Mesh, progress: Progress) -> Loader:
    """This rank's parts of the global batches that come after `progress`."""
    return build_loader(
        resolved.config.data,
        split="train",
        rank=mesh.data_rank,
        world_size=mesh.data_ranks,
        position=progress.position,
        selection=resolved.task.selection,
        cost=resolved.balanced_cost,
        pin_memory=mesh.device.type == "cuda",
        info=resolved.info,
    )


def _total_samples(config: TrainConfig, loader: Loader) -> int | None:
    """Samples of the whole run, for the progress bar; None for a stream without a known end."""
    limits = [loader.total_samples, config.max_steps and config.max_steps * config.data.global_batch_size]
    return min((limit for limit in limits if limit is not None), default=None)


def _settle(resolved: Resolved, loader: Loader, progress: Progress) -> Resolved:
    """The run with a schedule that knows its end.  Raises ValueError if steps are left that would learn nothing."""
    config = resolved.config
    last_step = config.max_steps
    # With global_batch_tokens nobody knows how many samples a batch will hold, and so how many steps there are.
    if config.data.global_batch_tokens is None:
        steps = progress.step + loader.steps_left
        last_step = steps if last_step is None else min(steps, last_step)
    schedule = settle_schedule(config.schedule, last_step=last_step, done=progress.step)
    return replace(resolved, config=replace(config, schedule=schedule))


def announce(run: RunDir, resolved: Resolved, plan: Plan, model: ParallelModel, mesh: Mesh) -> None:
    """Log what this run is made of."""
    logger.info("recipe %s on %d x %s", resolved.config.name, mesh.world_size, device_name(mesh.device))
    logger.info("versions %s", ", ".join(f"{name} {version}" for name, version in installed_versions().items()))
    logger.info("data %s (%s)", resolved.config.data.path, resolved.info.name)
    unread = unread_columns(resolved.task.selection, resolved.info)
    if unread:
        logger.info("columns of the data that are not read: %s", ", ".join(unread))
    logger.info("dense parameters %s", f"{sum(parameter.numel() for parameter in model.tower.parameters()):,}")
    announce_frozen(model.model)
    logger.info("%s\nwhy, and each rank's memory: python -m embeddings %s", plan_summary(plan), run.plan_file)


def announce_end(run: RunDir, progress: Progress) -> None:
    """Log what was done and what may come next."""
    logger.info("done after %d steps and %d samples: %s", progress.step, progress.samples, run.path)
    logger.info("next: python -m trainer evaluate %s\n      tensorboard --logdir %s", run.path, run.tensorboard)


def announce_resumption(progress: Progress, total_samples: int | None) -> None:
    """Log where a resumed run goes on."""
    if not progress.step:
        return
    logger.info("resuming after step %d and %d samples", progress.step, progress.samples)
    if total_samples is not None and progress.samples >= total_samples:
        logger.info("nothing is left to train: to train further, raise data.num_epochs, data.max_samples or max_steps")
