"""Plan a recipe's tables for a cluster that need not be here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from embeddings.hardware import node_type
from embeddings.machine import Machine, cluster
from embeddings.planning.plan_file import write_plan
from embeddings.planning.report import plan_report
from pipelines.reading.loader import dataset_info
from trainer.build import make_plan
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.dense_cost import dense_cost
from trainer.resolve import resolve


def plan_job(
    config: TrainConfig,
    *,
    world_size: int,
    local_world_size: int | None,
    hbm_gib: float | None,
    host_gib: float | None,
    out: Path | None,
    like: Path | None = None,
) -> None:
    """Plan the recipe's tables for GPUs that need not be here; print the plan and, with `out`, write it.

    `like` is a run of the same model on GPUs, which tells the activations and the time of the dense model.
    """
    given: dict[str, Any] = {"local_world_size": local_world_size, "hbm_gib": hbm_gib, "ddr_gib": host_gib}
    stated = {name: value for name, value in given.items() if value is not None}
    try:
        if config.placement.machine is not None:
            machine = cluster(node_type(config.placement.machine), world_size)
            # Nodes of so many ranks, as somebody states them, are whole ones.
            machine = replace(machine, **stated, whole_node=machine.whole_node if local_world_size is None else None)
        else:
            local = max(size for size in range(1, 9) if world_size % size == 0)
            usual: dict[str, Any] = {"local_world_size": local, "hbm_gib": 80.0, "ddr_gib": 128.0}
            machine = Machine(world_size=world_size, compute_device="cuda", **{**usual, **stated})
    except ValueError as error:
        of = f"placement.machine={config.placement.machine}: " if config.placement.machine is not None else ""
        raise WrongUse(f"{of}{error}") from None
    resolved = resolve(config, dataset_info(config.data))
    if like is None:
        plan = make_plan(resolved, machine)
        print(plan_report(plan))
    else:
        if config.placement.activation_gib is not None:
            raise WrongUse("placement.activation_gib states what --like measures: leave one of them out")
        dense = dense_cost(like, resolved, world_size)
        placement = replace(config.placement, activation_gib=round(dense.activation_gib, 2))
        plan = make_plan(replace(resolved, config=replace(config, placement=placement)), machine)
        print(plan_report(plan) + "\n\n" + dense.describe(plan, like))
    if out is not None:
        write_plan(out, plan)
        print(f"written to {out}; use it with: python -m trainer train {config.name} --plan {out}")
