"""Measure what the planner assumes, on the machine at hand, and write a machine's file.

    python -m embeddings probe --out MACHINE.json                              one process
    torchrun --nproc-per-node 8 -m embeddings probe --out MACHINE.json         exchanges too

What is measured are the steps that the planner estimates, lookup with backward pass and update through the same
modules as in training, so that rates are those that lookups reach and not peaks.  A rate is what makes the kind's own
estimate equal to the time that further ids take, and what many ids take besides is the fixed time of lookups.  Rates
that a job of this size cannot measure keep the data sheet's.  `calibration` says so, and how far the plan of lookups
that no rate is from is off what they take.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from embeddings.config import ComputeKernel, ExchangeConfig, PlacementConfig, TableConfig
from embeddings.hardware import CPU_RATES, MOST, NodeType, Rates, gpu_with_name
from embeddings.kinds.kind import Blocks, Work
from embeddings.kinds.registry import KINDS
from embeddings.machine import Machine
from embeddings.measuring.host import host_memory_gib
from embeddings.measuring.trial import BAG_IDS, OPTIMIZER, Trial, median_ms
from embeddings.planner import plan_tables
from embeddings.planning.problem import BatchLoad

FEW_IDS = BAG_IDS
MANY_IDS = {"cuda": (2**18, 2**20), "cpu": (2**13, 2**16)}
"""Two numbers of ids between whose times a rate is told."""
HOST_IDS = (2**15, 2**17)
"""Two numbers of ids whose rows lie in host memory, so few that a cache has room for all of a step's."""
ROWS = {"cuda": 4_000_000, "cpu": 200_000}
HOT_ROWS = 100_000
"""Rows that are looked up of a cached table: few enough for a cache of a fifth of all rows to hold them all."""
HOT_IDS = (2**15, 2**18)
WIDTH = 128
WIDTHS = (64, 96, 128, 160)
"""Widths of tables, each of which makes a lookup group of its own."""
OTHER_WIDTHS = (64, 192)
OTHER_IDS = {"cuda": 2**19, "cpu": 2**15}
"""Widths of two tables whose lookups try the rates, and the ids that are looked up in each."""
EXCHANGED_BYTES = {"cuda": 2**28, "cpu": 2**24}
COPIED_BYTES = 2**28


def probe() -> NodeType:
    """The node that this process runs on, with the rates that it reaches.  Called by every rank of a job.

    Raises:
        ValueError: more ids took no more time, so that no rate can be told.
    """
    with _joined() as machine:
        device = torch.device(machine.compute_device)
        rates, measured = machine.effective_rates, ["lookups"]
        if machine.world_size > 1:
            link = _exchange_rate(machine.world_size, device)
            across = machine.world_size > machine.local_world_size
            rates = replace(rates, **{"across_nodes" if across else "within_node": link})
            measured.append(f"exchange of {machine.world_size} ranks")
        if device.type == "cuda":
            rates = replace(rates, host_link=_copy_rate())
            measured += ["host link", "host tables"]
        rates = replace(rates, lookup_group_ms=_group_ms(replace(machine, rates=rates)))
        if device.type == "cuda":
            rates = replace(rates, id_ns=_id_ns(replace(machine, rates=rates)))
        rates = replace(rates, device=_lookup_rate(replace(machine, rates=rates), "fused", "device"))
        rates = replace(rates, lookups_ms=_lookups_ms(replace(machine, rates=rates)))
        if device.type == "cuda":
            cache_ms, cache_id_ns = _cache_ms(replace(machine, rates=rates))
            rates = replace(rates, cache_ms=cache_ms, cache_id_ns=cache_id_ns)
            rates = replace(rates, cached=_lookup_rate(replace(machine, rates=rates), "fused_uvm_caching", "cached"))
            rates = replace(rates, uncached=_lookup_rate(replace(machine, rates=rates), "fused_uvm", "uncached"))
        error = _error(replace(machine, rates=rates))
        name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
        return NodeType(
            cpus=os.cpu_count() or 0,
            gpus=torch.cuda.device_count(),
            hbm_gib=machine.hbm_gib,
            host_gib=host_memory_gib(1),
            rates=rates,
            calibration=f"measured on {name} ({', '.join(measured)}; other lookups planned {error:+.0%})",
        )


def machine_file(node: NodeType) -> dict[str, object]:
    """What the file of a machine holds; rates to four digits, which is more than a second measurement repeats."""
    values = {key: value for key, value in asdict(node).items() if value is not None}
    return values | {"rates": {key: float(f"{rate:.4g}") for key, rate in values["rates"].items() if rate is not None}}


@contextmanager
def _joined() -> Iterator[Machine]:
    """The job's ranks, as torchrun's variables say; one without them."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if cuda else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None
    known = gpu_with_name(torch.cuda.get_device_name()) if cuda else None
    try:
        yield Machine(
            world_size=world_size,
            local_world_size=local_world_size,
            compute_device="cuda" if cuda else "cpu",
            hbm_gib=memory,
            ddr_gib=host_memory_gib(local_world_size),
            rates=CPU_RATES if not cuda else known.rates if known is not None else None,
        )
    finally:
        dist.destroy_process_group()


def _table(width: int, rows: int) -> TableConfig:
    name = f"wide_{width}"
    return TableConfig(name=name, num_embeddings=rows, embedding_dim=width, features=(name,))


def _kind(machine: Machine) -> str:
    return "row_wise" if machine.world_size > 1 else "table_wise"


def _step_ms(
    tables: list[TableConfig], ids: int, machine: Machine, kernel: ComputeKernel, *, hot_rows: int | None = None
) -> float:
    placement = PlacementConfig(sharding_types=(_kind(machine),), compute_kernels=(kernel,))
    trial = Trial(tables, ids, machine=machine, placement=placement, rank=dist.get_rank(), hot_rows=hot_rows)
    return median_ms(trial.step, torch.device(machine.compute_device), prepare=trial.exchange)


def _group_ms(machine: Machine) -> float:
    """What each lookup group adds, of next to no ids."""
    tables = [_table(width, 1000 * machine.world_size) for width in WIDTHS]
    one, all_of_them = (_step_ms(few, FEW_IDS, machine, "fused") for few in (tables[:1], tables))
    # Where one group takes more than its part, the rest is the beginning's.
    return max(all_of_them - one, 0.1 * one) / (len(tables) - 1)


def _lookups_ms(machine: Machine) -> float:
    """What lookups take at all: what so many ids take besides their estimate, as far as it is no group's.

    Next to no ids take less than that on a GPU, whose kernels then do with fewer passes and find rows in its cache.
    """
    rates, few = machine.effective_rates, MANY_IDS[machine.compute_device][0]
    table = _table(WIDTH, ROWS[machine.compute_device])
    estimate = _estimate_ms(machine, table, "fused", "device", rates.device, few) + rates.lookup_group_ms
    return max(_step_ms([table], few, machine, "fused") - estimate, 0.0)


def _id_ns(machine: Machine) -> float:
    """What an id takes besides its row on a GPU: more ids of narrower rows, as many bytes, take longer."""
    few, many = MANY_IDS["cuda"]
    narrow = _step_ms([_table(WIDTH, ROWS["cuda"])], many, machine, "fused")
    wide = _step_ms([_table(WIDTH * many // few, ROWS["cuda"])], few, machine, "fused")
    return max(narrow - wide, 0.0) / (many - few) * 1e6


def _cache_ms(machine: Machine) -> tuple[float, float]:
    """What a cache takes for being asked, in ms at all and in ns an id: lookups that it answers, beside the same ones
    of a table that lies on the device."""
    table = _table(WIDTH, ROWS["cuda"])
    few, many = HOT_IDS
    small, large = (
        _step_ms([table], ids, machine, "fused_uvm_caching", hot_rows=HOT_ROWS)
        - _step_ms([table], ids, machine, "fused", hot_rows=HOT_ROWS)
        for ids in HOT_IDS
    )
    an_id = max(large - small, 0.0) / (many - few)
    return max(small - few * an_id, 0.0), an_id * 1e6


def _lookup_rate(machine: Machine, kernel: ComputeKernel, rate: str) -> float:
    """The value of `rate` with which the estimate of further ids is what they take."""
    table = _table(WIDTH, ROWS[machine.compute_device])
    few, many = MANY_IDS[machine.compute_device] if kernel == "fused" else HOST_IDS
    taken = _step_ms([table], many, machine, kernel) - _step_ms([table], few, machine, kernel)
    rest = _estimate_ms(machine, table, kernel, rate, MOST, many - few)
    of_rate = _estimate_ms(machine, table, kernel, rate, 1.0, many - few) - rest
    if not rest < taken:
        raise ValueError(
            f"{many:,} ids of a {kernel} table took {taken:.3g} ms longer than {few:,}, less than their exchange alone "
            f"({rest:.3g} ms): measure again while nothing else runs on the machine"
        )
    return of_rate / (taken - rest)


def _estimate_ms(
    machine: Machine, table: TableConfig, kernel: ComputeKernel, rate: str, value: float, ids: int
) -> float:
    """What the planner makes of so many ids when a rate has this value."""
    assert machine.rates is not None
    rates: Rates = replace(machine.rates, **{rate: value})
    work = Work(
        table=table,
        optimizer=OPTIMIZER.kind,
        kernel=kernel,
        machine=replace(machine, rates=rates),
        ids=float(ids),
        exchanged_ids=float(ids),
        exchange=ExchangeConfig(),
    )
    kind = KINDS[_kind(machine)]
    blocks: Blocks = kind.cuts(table, machine)[0][0]
    return kind.cost(work, blocks).ms


def _error(machine: Machine) -> float:
    """How far the plan of lookups of which no rate was made is off: planned over taken, less 1."""
    tables, ids = (
        [_table(width, ROWS[machine.compute_device]) for width in OTHER_WIDTHS],
        OTHER_IDS[machine.compute_device],
    )
    plan = plan_tables(
        nn.Module(),
        tables,
        machine=machine,
        placement=PlacementConfig(sharding_types=(_kind(machine),)),
        optimizer=OPTIMIZER,
        load=BatchLoad(samples_per_rank=1, ids_per_sample={table.features[0]: float(ids) for table in tables}),
    )
    return plan.step_ms / _step_ms(tables, ids, machine, "fused") - 1


def _exchange_rate(world_size: int, device: torch.device) -> float:
    """GB/s that a rank sends while all send to all, its own part included, as estimates count."""
    sent = torch.ones(EXCHANGED_BYTES[device.type] // 4 // world_size * world_size, device=device)
    received = torch.empty_like(sent)
    ms = median_ms(lambda: dist.all_to_all_single(received, sent), device)
    return sent.numel() * 4 / ms / 1e6


def _copy_rate() -> float:
    """GB/s from pinned host memory to the device."""
    source = torch.ones(COPIED_BYTES // 4, pin_memory=True)
    target = torch.empty(COPIED_BYTES // 4, device="cuda")
    ms = median_ms(lambda: target.copy_(source, non_blocking=True), torch.device("cuda"))
    return COPIED_BYTES / ms / 1e6
