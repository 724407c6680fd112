"""From a resolved run to its model: the single-process one, where its tables go, and the parallel one."""

import socket
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from embeddings.hardware import node_type
from embeddings.machine import Machine
from embeddings.measuring.host import host_memory_gib
from embeddings.plan import Plan
from embeddings.planner import problem_of
from embeddings.planning.plan_file import read_plan
from embeddings.planning.solver import solve
from embeddings.tables import build_tables
from trainer.command_line import WrongUse
from trainer.freezing import freeze
from trainer.lookups import lookup_load
from trainer.models.model import Model
from trainer.parallel.mesh import Mesh
from trainer.parallelize import ParallelModel, parallelize
from trainer.resolve import Resolved
from trainer.steps.compilation import compile_before_first_step
from trainer.steps.graphs import Graphs
from trainer.steps.recording import record_steps, will_record


def build_model(resolved: Resolved, device: torch.device) -> Model:
    """The model with its tables on the meta device and its dense parameters on `device`.

    Their values are a function of the run's seed, drawn on the CPU: equal on every rank and every kind of device.
    """
    tables = build_tables(resolved.tables, device=torch.device("meta"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(resolved.config.seed)
        model = resolved.task.build(tables)
    freeze(model, resolved.config.frozen)
    model.tower.to(device)
    model.loss.to(device)
    return model


def machine_of(mesh: Mesh, rates_of: str | None = None) -> Machine:
    """The machines that this job runs on, as the planner sees them; `rates_of` is `placement.machine`.

    Raises:
        WrongUse: there is no such machine type or file, or it is one without GPUs for a job on GPUs, or the reverse.
    """
    try:
        node = None if rates_of is None else node_type(rates_of)
    except ValueError as error:
        raise WrongUse(f"placement.machine: {error}") from None
    if node is not None and bool(node.gpus) != (mesh.device.type == "cuda"):
        raise WrongUse(f"placement.machine={rates_of} has {node.gpus} GPUs, but this job runs on {mesh.device.type}")
    memory = torch.cuda.get_device_properties(mesh.device).total_memory if mesh.device.type == "cuda" else None
    return Machine(
        world_size=mesh.world_size,
        local_world_size=mesh.local_world_size,
        compute_device=mesh.device.type,
        hbm_gib=None if memory is None else memory / 2**30,
        ddr_gib=host_memory_gib(mesh.local_world_size),
        rates=None if node is None else node.rates,
        calibration="" if node is None else node.calibration,
    )


def agreed_machine(machine: Machine, mesh: Mesh) -> Machine:
    """What all ranks have, so that all make the same plan: the least memory of any, and the racks of all.  Called by
    every rank, each with its own machine.

    Raises:
        ValueError: nodes run different numbers of processes.
    """
    mine = (socket.gethostname(), mesh.rack, machine)
    ranks: list[tuple[str, str, Machine]] = [mine] * mesh.world_size
    dist.all_gather_object(ranks, mine)  # every rank
    for host, _, other in ranks:
        if other.local_world_size != ranks[0][2].local_world_size:
            raise ValueError(
                f"node {host} runs {other.local_world_size} processes, node {ranks[0][0]} runs "
                f"{ranks[0][2].local_world_size}: start as many on every node"
            )
    machines = [other for _, _, other in ranks]
    return replace(
        machines[0],
        hbm_gib=min((other.hbm_gib for other in machines if other.hbm_gib is not None), default=None),
        ddr_gib=min(other.ddr_gib for other in machines),
        racks=len({rack for _, rack, _ in ranks}),
    )


def make_plan(resolved: Resolved, machine: Machine, plan_file: Path | None = None) -> Plan:
    """Read the plan of `plan_file`, checked against tables and machine, or make one.  Every rank makes the same."""
    ranks_with_samples = machine.world_size // resolved.config.context_parallel
    load = lookup_load(resolved, ranks_with_samples)
    in_16_bits = machine.compute_device == "cuda" and resolved.config.precision == "bfloat16"
    problem = problem_of(
        # Built to count the memory of the dense parameters.
        build_model(resolved, torch.device("meta")),
        resolved.tables,
        machine=machine,
        placement=resolved.config.placement,
        optimizer=resolved.config.sparse_optimizer,
        load=load,
        activation_bytes=resolved.activation_bytes(load, value_bytes=2 if in_16_bits else 4),
    )
    if plan_file is None:
        return solve(problem)
    try:
        return read_plan(plan_file, problem)
    except ValueError as error:
        raise WrongUse(str(error)) from None


def agreed_plan(plan: Plan, resolved: Resolved, mesh: Mesh, plan_file: Path | None = None) -> Plan:
    """The plan for what all ranks have, where that is not what this one saw alone.  Called by every rank.

    Raises:
        ValueError: nodes run different numbers of processes, or the tables do not fit the smallest node.
    """
    machine = agreed_machine(plan.machine, mesh)
    return plan if machine == plan.machine else make_plan(resolved, machine, plan_file)


def build_parallel(resolved: Resolved, plan: Plan, mesh: Mesh) -> ParallelModel:
    """The model, sharded as `plan` says, with initial values.  Called by every rank, with the same plan."""
    single = build_model(resolved, mesh.device)
    if mesh.device.type == "cuda":
        compile_before_first_step(single)
    recorded = will_record(single, resolved, mesh)
    model = parallelize(single, plan, resolved.config, mesh)
    if recorded:
        record_steps(model, resolved.task.padding, Graphs(must=resolved.config.recorded == "on"))
    return model
