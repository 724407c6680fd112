"""What a run says about its steps: metrics.jsonl, TensorBoard and the progress bar."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from embeddings.hardware import gpu_with_name
from pipelines.storage.columns import IntArray
from pipelines.stream.position import DataPosition
from trainer.checkpoint.progress import Progress
from trainer.checkpoint.restoring import Restart
from trainer.labels.running import RunningMetrics
from trainer.parallel.mesh import Mesh
from trainer.resolve import Resolved
from trainer.run.json_lines import JsonLines
from trainer.run.profiling import StepProfile
from trainer.run.run_dir import RunDir
from trainer.run.writing import written
from trainer.steps.left_out import check_finite
from trainer.steps.optim import GradientNorms

Outcome = tuple[Tensor, GradientNorms]
"""A step's loss on this rank, [] on the device, and the norms of its gradients."""


@dataclass(frozen=True, slots=True)
class Consumed:
    """What the loop must know of a batch once its step is done; host numbers only."""

    position: DataPosition
    """The place in the data behind this batch."""
    samples: int
    """Samples of the global batch."""
    history_lens: IntArray
    """[B] of this rank's samples."""
    num_candidates: IntArray
    """[B] of this rank's samples."""
    channel_history_lens: Mapping[str, IntArray]
    """[B] events of this rank's samples that a channel sees, for channels that do not see all."""
    imbalance: float
    """Largest over mean modelled cost of the ranks."""
    waited_s: float = 0.0
    """Seconds that this rank waited for the batch to be read."""


class StepLog:
    """Writes the logged steps: metrics.jsonl, TensorBoard and the progress bar."""

    def __init__(
        self,
        run: RunDir,
        mesh: Mesh,
        start: Restart,
        resolved: Resolved,
        *,
        total_samples: int | None,
        running: RunningMetrics | None = None,
        profile: tuple[int, int] | None = None,
    ) -> None:
        """`running` are the metrics of the training candidates; `profile`, (step, count), asks for a trace of steps."""
        self._run, self._mesh, self._resolved = run, mesh, resolved
        self._losses = start.losses if resolved.config.deterministic else {}
        self._peak_flops = peak_flops(mesh.device)
        self._profile: StepProfile | None = None
        if profile is not None:
            self._profile = StepProfile(profile, run.profile, rank=mesh.rank, step=start.progress.step)
        self._running = running
        self._lifetime: Tensor | None = None
        if running is not None:
            running.reset()
            self._lifetime = running.state().cpu()
        self._interval = _Interval()
        self._lines = JsonLines(run.metrics_file) if mesh.is_first else None
        self._board: SummaryWriter | None = None
        if mesh.is_first:
            with written(run.tensorboard):
                self._board = SummaryWriter(str(run.tensorboard), purge_step=start.progress.step + 1)
        self._bar = tqdm(
            total=total_samples,
            initial=start.progress.samples,
            unit="sample",
            desc="training",
            disable=not mesh.is_first,
        )

    def count(self, consumed: Consumed, outcome: Outcome | None) -> None:
        """Add one step's work to the interval since the last logged step; the outcome is None where its batch was left
        out."""
        self._interval.add(consumed, outcome)
        self._bar.update(consumed.samples)
        if self._profile is not None:
            self._profile.stepped()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens here takes no time of the steps."""
        if self._mesh.device.type == "cuda":
            # Steps that still run on the device count as time of steps.
            torch.cuda.synchronize(self._mesh.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._interval.start += time.perf_counter() - start

    def log(self, progress: Progress, learning_rate_factor: float) -> None:
        """Log the interval that ends with this step; the loss is of this step only.  Called by every rank.

        Raises:
            NotFinite: the loss or the gradients of a step since the last logged one are not finite.
            FloatingPointError: the loss is not what it was though the run is deterministic.
        """
        # Ranks that share samples would count them several times.
        counts = [
            count / self._mesh.sharing
            for count in (self._interval.flops(self._resolved), self._interval.tokens(self._resolved))
        ]
        counts.append(self._interval.waited_s / self._mesh.world_size)
        running = None if self._running is None else self._running.state()
        losses, norms, (flops, tokens, waited_s, *numbers) = self._over_ranks(counts, progress, running)
        interval, self._interval = self._interval, _Interval()
        # A step whose batch was left out has neither loss nor norm.
        mean_loss, norm = (losses[-1], norms[-1]) if interval.took_last else (math.nan, math.nan)
        if interval.took_last:
            self._check_same(progress.step, mean_loss)
        seconds = time.perf_counter() - interval.start
        record: dict[str, Any] = {
            "step": progress.step,
            "samples": progress.samples,
            "loss": mean_loss,
            "gradient_norm": norm,
            "samples_per_s": interval.samples / seconds,
            "tokens_per_s": tokens / seconds,
            "step_ms": 1e3 * seconds / interval.steps,
            "imbalance": sum(interval.imbalances) / interval.steps,
            "imbalance_by_step": interval.imbalances,
            "data_wait": min(waited_s / seconds, 1.0),
            "learning_rate_factor": learning_rate_factor,
            "time": time.time(),
            "world_size": self._mesh.world_size,
        }
        if self._mesh.device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated(self._mesh.device) / 2**30
            if self._peak_flops is not None:
                record["mfu"] = flops / seconds / self._mesh.world_size / self._peak_flops
        self._write(record | self._measured(torch.tensor(numbers, dtype=torch.float64)))

    def _measured(self, state: Tensor) -> dict[str, float]:
        """The running metrics of the interval, and as lifetime_METRIC/LABEL since this start of the job."""
        if self._running is None or self._lifetime is None:
            return {}
        window, self._lifetime = state - self._lifetime, state
        since = {f"lifetime_{name}": value for name, value in self._running.metrics(state).items()}
        return self._running.metrics(window) | since

    def check_finite(self, progress: Progress) -> None:
        """Look at the steps since the last logged one, up to that of `progress`.  Called by every rank.

        Raises:
            NotFinite: the loss or the gradients of one are not finite.
        """
        self._over_ranks([], progress)

    def _over_ranks(
        self, counts: list[float], progress: Progress, running: Tensor | None = None
    ) -> tuple[list[float], list[float], list[float]]:
        """Sum the interval over ranks: means of losses and of gradients' norms, one a step taken, and sums of `counts`
        and then of the `running` numbers."""
        interval = self._interval
        of_steps = [value for loss, gradients in interval.outcomes for value in (loss, gradients.total)]
        values = torch.stack(of_steps) if of_steps else None
        if values is None and not counts:
            return [], [], []
        sums = torch.tensor(counts, dtype=torch.float64, device=self._mesh.device)
        if values is not None:
            sums = torch.cat([values.double() / self._mesh.world_size, sums])
        if running is not None:
            sums = torch.cat([sums, running])
        dist.all_reduce(sums)  # every rank, on the default group and stream
        # Waits for the device, once for all numbers.
        found, taken = sums.tolist(), len(of_steps)
        losses, norms = found[:taken:2], found[1:taken:2]
        gradients = [gradients for _, gradients in interval.outcomes]
        check_finite(losses, norms, interval.steps_taken(progress), gradients)
        return losses, norms, found[taken:]

    def _check_same(self, step: int, loss: float) -> None:
        """On the first rank, under deterministic=true: a step that is taken again has the loss that it had."""
        before = self._losses.pop(step, loss)
        if before != loss:
            raise FloatingPointError(
                f"deterministic=true, but step {step}, taken again, has the loss {loss!r} where it was {before!r}: "
                "something in this run depends on chance (another kind of machine, a driver, an operation)"
            )

    def _write(self, record: dict[str, Any]) -> None:
        self._bar.set_postfix(loss=f"{record['loss']:.4f}", tokens_per_s=f"{record['tokens_per_s']:.3g}")
        if self._lines is None or self._board is None or not self._lines.append(record):
            return
        with written(self._run.tensorboard):
            for name in sorted(set(record) - {"step", "samples", "time", "world_size", "imbalance_by_step"}):
                self._board.add_scalar(name, record[name], record["step"])
            first = record["step"] + 1 - len(record["imbalance_by_step"])
            for step, imbalance in enumerate(record["imbalance_by_step"], start=first):
                self._board.add_scalar("imbalance_by_step", imbalance, step)

    def add_evaluation(self, metrics: dict[str, float], step: int) -> None:
        """Show an evaluation's numbers in TensorBoard too."""
        if self._board is not None:
            with written(self._run.tensorboard):
                for name, value in metrics.items():
                    self._board.add_scalar(f"eval/{name}", value, step)

    def close(self) -> None:
        """Flush what is buffered."""
        self._bar.close()
        if self._profile is not None:
            self._profile.close()
        if self._board is not None:
            with written(self._run.tensorboard):
                self._board.close()


class _Interval:
    """Work since the last logged step: samples of all ranks, lengths of this one."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.samples = 0
        self.waited_s = 0.0
        self.imbalances: list[float] = []
        self.outcomes: list[Outcome] = []
        """A step that was taken; on the device, where nothing waits for them."""
        self._samples: list[tuple[int, bool]] = []
        self._history_lens: list[IntArray] = []
        self._num_candidates: list[IntArray] = []
        self._channel_history_lens: dict[str, list[IntArray]] = {}

    @property
    def took_last(self) -> bool:
        """Whether the newest batch was not left out."""
        return self._samples[-1][1]

    def add(self, consumed: Consumed, outcome: Outcome | None) -> None:
        self.steps += 1
        self._samples.append((consumed.samples, outcome is not None))
        self.samples += consumed.samples
        self.imbalances.append(consumed.imbalance)
        self.waited_s += consumed.waited_s
        if outcome is None:
            return
        self.outcomes.append(outcome)
        self._history_lens.append(consumed.history_lens)
        self._num_candidates.append(consumed.num_candidates)
        for name, lens in consumed.channel_history_lens.items():
            self._channel_history_lens.setdefault(name, []).append(lens)

    def steps_taken(self, progress: Progress) -> list[tuple[int, int, int]]:
        """(step, first sample, last sample) of each outcome; `progress` is that of the newest step."""
        first, taken = progress.samples - self.samples, []
        for step, (samples, took) in enumerate(self._samples, progress.step - self.steps + 1):
            if took:
                taken.append((step, first, first + samples - 1))
            first += samples
        return taken

    def flops(self, resolved: Resolved) -> float:
        """Model FLOPs of this rank's part, counted for all steps at once, because a count takes as long as a launch."""
        if not self.outcomes:
            return 0.0
        channels = {name: np.concatenate(lens) for name, lens in self._channel_history_lens.items()}
        return float(resolved.training_flops(*self._lens(), channel_history_lens=channels).sum())

    def tokens(self, resolved: Resolved) -> float:
        """Tokens of this rank's part."""
        if not self.outcomes:
            return 0.0
        return float(resolved.token_count(*self._lens()).sum())

    def _lens(self) -> tuple[IntArray, IntArray]:
        return np.concatenate(self._history_lens), np.concatenate(self._num_candidates)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the device by its data sheet, for MFU; None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_with_name(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.bf16_tflops * 1e12
