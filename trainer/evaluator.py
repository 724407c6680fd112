"""The evaluations of a training run: of the evaluation split, and of parts of the data before they are trained on."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.reading.loader import Loader
from pipelines.stream.position import SourcePosition
from trainer.checkpoint.progress import Progress
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.resolve import Resolved
from trainer.run.json_lines import JsonLines, read_records
from trainer.run.run_dir import RunDir
from trainer.steps.step_log import StepLog
from trainer.target import parse_target

logger = logging.getLogger(__name__)


class Evaluator:
    """Scores the model between two steps, and writes and shows what it found.  Called by every rank."""

    def __init__(
        self, resolved: Resolved, model: ParallelModel, run: RunDir, mesh: Mesh, *, loader: Loader, step_log: StepLog
    ) -> None:
        self._resolved, self._model, self._run, self._mesh = resolved, model, run, mesh
        self._loader, self._step_log = loader, step_log
        target = resolved.config.evaluation.target
        self._target = None if target is None else parse_target(target)
        self.reached = False
        """Whether the newest evaluation has reached `evaluation.target`; the same on every rank."""

    def begin(self, progress: Progress, *, evaluated: bool) -> bool:
        """Before the first step: evaluate if that was due where the run goes on and was not made; meet the next part.

        Returns whether the evaluation split needs no other look before training ends.
        """
        makes_up = progress.step > 0 and not evaluated and self.due(progress.step)
        if makes_up:
            self.evaluate(progress.step)
        elif self._target is not None and self.due(progress.step):
            records = read_records(self._run.eval_file)
            self._reach(next((each for each in records if each["step"] == progress.step), {}))
        self.meet_part(progress)
        return makes_up or self.reached

    def due(self, step: int) -> bool:
        """Whether the evaluation split is to be scored after this step."""
        config = self._resolved.config.evaluation
        return config.every_steps is not None and step % config.every_steps == 0 and step >= config.first_step

    def look(self, progress: Progress) -> None:
        """Between two steps: score the evaluation split if it is due, and meet a part that comes next."""
        if self.due(progress.step):
            self.evaluate(progress.step)
        if self.meets_part(progress):
            self.meet_part(progress)

    def meets_part(self, progress: Progress) -> bool:
        """Whether a part of the data has ended, so that the next one may have to be scored.

        The loop does not look in vain: of the first looks the watchdog learns how long one may take.
        """
        return self._resolved.config.evaluation.progressive and progress.ends_part

    def evaluate(self, step: int) -> None:
        """Score the evaluation split."""
        metrics = evaluate_and_show(self._resolved, self._model, self._run.eval_file, self._mesh, step)
        self._step_log.add_evaluation(metrics, step)
        self._reach(metrics)

    def _reach(self, metrics: Mapping[str, float | None]) -> None:
        """Take note of what was found; the first rank's word counts."""
        if self._target is None:
            return
        reached = torch.tensor(float(self._target.reached(metrics)), device=self._mesh.device)
        dist.broadcast(reached, 0)  # every rank
        self.reached = bool(reached)
        if self.reached and self._mesh.is_first:
            logger.info("evaluation.target=%s is reached", self._resolved.config.evaluation.target)

    def meet_part(self, progress: Progress) -> None:
        """With `evaluation.progressive`: score the part of the data that comes next, if none of it was trained on."""
        config, parts = self._resolved.config, self._resolved.info.parts
        if not config.evaluation.progressive or progress.position is None:
            return
        part, sources = self._loader.part_of(progress.position), progress.position.sources
        begun = part < len(sources) and sources[part] != SourcePosition()
        if begun or part >= len(parts):
            return
        found = self._resolved.task.evaluate(self._model, self._mesh, part)
        if self._mesh.is_first:
            record = {"step": progress.step, "part": parts[part], **found.record()}
            if JsonLines(self._run.progressive_file).append(record):
                logger.info("part %s, not yet trained on, at step %d:\n%s", parts[part], progress.step, found.table)


def evaluate_and_show(resolved: Resolved, model: ParallelModel, file: Path, mesh: Mesh, step: int) -> dict[str, float]:
    """Evaluate, append to `file` unless it has that step already, and show the result beside the baseline."""
    found = resolved.task.evaluate(model, mesh)
    if mesh.is_first:
        if not JsonLines(file).append({"step": step, **found.record()}):
            logger.info("%s keeps the line that it has of step %d, perhaps of earlier data", file, step)
        logger.info("evaluation at step %d on %s:\n%s", step, resolved.config.data.path, found.table)
    return dict(found.metrics)
