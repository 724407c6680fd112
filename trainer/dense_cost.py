"""What a run took on GPUs besides its tables, and from it what the same model takes on others: memory and time.

A run's peak of memory is its tables, its dense parameters and, for the rest, what a step holds: activations, batches
in the pipeline, buffers.  A step's time is that of the tables and, for the rest, the dense model's.  The rest of the
memory grows with the tokens of a rank's step, the rest of the time with their FLOPs, at the rate that the run reached.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embeddings.plan import Plan
from embeddings.planning.plan_file import parse_plan
from embeddings.planning.problem import GIB
from pipelines.reading.loader import dataset_info
from trainer.command_line import WrongUse
from trainer.resolve import Resolved, resolve
from trainer.run.json_lines import whole_lines
from trainer.run.run_dir import RunDir
from trainer.typed_values import differences, to_dict


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCost:
    """What the dense model takes of a rank in a step."""

    activation_gib: float
    """Memory beside parameters and tables."""
    step_ms: float
    """Time beside the tables'."""

    def describe(self, plan: Plan, run: Path) -> str:
        """For people, beside a plan."""
        return (
            f"a whole step, as {run} took it: {plan.step_ms + self.step_ms:.3g} ms = {plan.step_ms:.3g} ms of tables "
            f"+ {self.step_ms:.3g} ms of dense model; {self.activation_gib:.2f} GiB of activations a rank: train with "
            f"--set placement.activation_gib={self.activation_gib:.2f}"
        )


def dense_cost(run_dir: Path, resolved: Resolved, world_size: int) -> DenseCost:
    """What the dense model of `resolved` takes on so many ranks, by a run of the same model.

    Raises:
        WrongUse: it is no run on GPUs with a plan and a logged step, or of another model; or its peak is not above what
            its plan says of tables and parameters.
    """
    run = RunDir(run_dir)
    ran = run.trained_config()
    if not run.plan_file.is_file():
        raise WrongUse(f"{run_dir} holds no plan.json: name a run directory that `train` made")
    lines, _ = whole_lines(run.metrics_file)
    records = [record for record in map(json.loads, lines) if "peak_gib" in record]
    if not records:
        raise WrongUse(f"{run_dir} has logged no peak_gib: name a run on GPUs that has logged a step")
    try:
        plan = parse_plan(run.plan_file)
    except ValueError as error:
        raise WrongUse(str(error)) from None
    for key, old, new in differences(to_dict(ran)["model"], to_dict(resolved.config)["model"]):
        raise WrongUse(
            f"{run_dir} trained another model, with model.{key}={old} instead of {new}: name one of the same"
        )
    held = (plan.ranks[0].memory_bytes if plan.ranks else 0) + plan.reservation.dense_bytes
    peak = max(record["peak_gib"] for record in records)
    if peak * GIB <= held:
        raise WrongUse(
            f"{run_dir} peaked at {peak:.2f} GiB, not above the {held / GIB:.2f} GiB of tables and parameters in its "
            "plan.json: it is not the plan that the run had"
        )
    step_ms = statistics.median(record["step_ms"] for record in records)
    tokens, flops = _work(resolve(ran, dataset_info(ran.data)), records[-1]["world_size"])
    more_tokens, more_flops = _work(resolved, world_size)
    return DenseCost(
        activation_gib=(peak - held / GIB) * more_tokens / tokens,
        step_ms=max(step_ms - plan.step_ms, 0.0) * more_flops / flops,
    )


def _work(resolved: Resolved, world_size: int) -> tuple[float, float]:
    """Tokens and FLOPs of a rank's step, from the mean sample of the training split."""
    split, config = resolved.info.splits["train"], resolved.config
    samples = max(1, split.samples)
    history = np.array([round(min(split.history_events / samples, config.data.max_history_len))])
    candidates = np.array([round(split.candidates / samples)])
    samples_per_rank = config.data.global_batch_size / world_size
    tokens = float(resolved.token_count(history, candidates)[0])
    return samples_per_rank * tokens, samples_per_rank * float(resolved.training_flops(history, candidates)[0])
