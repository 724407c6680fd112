"""The evaluations of a training run: of the evaluation split, and of parts of the data before they are trained on."""

import logging
from pathlib import Path

from pipelines.loader import Loader
from pipelines.position import SourcePosition
from trainer.checkpoint.progress import Progress
from trainer.mesh import Mesh
from trainer.parallelize import ParallelModel
from trainer.recorder import Recorder
from trainer.resolve import Resolved
from trainer.run_dir import JsonLines, RunDir

logger = logging.getLogger(__name__)


class Evaluator:
    """Scores the model between two steps, and writes and shows what it found.  Called by every rank."""

    def __init__(
        self, resolved: Resolved, model: ParallelModel, run: RunDir, mesh: Mesh, *, loader: Loader, recorder: Recorder
    ) -> None:
        self._resolved, self._model, self._run, self._mesh = resolved, model, run, mesh
        self._loader, self._recorder = loader, recorder

    def begin(self, progress: Progress, *, evaluated: bool) -> bool:
        """Before the first step: evaluate if that was due where the run goes on and was not made; meet the next part.

        Returns whether the evaluation split was scored.
        """
        makes_up = progress.step > 0 and not evaluated and self.due(progress.step)
        if makes_up:
            self.evaluate(progress.step)
        self.meet_part(progress)
        return makes_up

    def due(self, step: int) -> bool:
        """Whether the evaluation split is to be scored after this step."""
        every = self._resolved.config.evaluation.every_steps
        return every is not None and step % every == 0

    def look(self, progress: Progress) -> None:
        """Between two steps: score the evaluation split if it is due, and meet a part that comes next."""
        if self.due(progress.step):
            self.evaluate(progress.step)
        if progress.ends_part:
            self.meet_part(progress)

    def evaluate(self, step: int) -> None:
        """Score the evaluation split."""
        metrics = evaluate(self._resolved, self._model, self._run.eval_file, self._mesh, step)
        self._recorder.add_evaluation(metrics, step)

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
            record = {"step": progress.step, "part": parts[part], **found.metrics}
            if JsonLines(self._run.progressive_file).append(record):
                logger.info("part %s, not yet trained on, at step %d:\n%s", parts[part], progress.step, found.table)


def evaluate(resolved: Resolved, model: ParallelModel, file: Path, mesh: Mesh, step: int) -> dict[str, float]:
    """Evaluate, append to `file` unless the step stands there already, and show the result beside the baseline."""
    found = resolved.task.evaluate(model, mesh)
    if mesh.is_first:
        if not JsonLines(file).append({"step": step, **found.metrics}):
            logger.info("%s has a line of step %d already; it stays as it is", file, step)
        logger.info("evaluation at step %d:\n%s", step, found.table)
    return dict(found.metrics)
