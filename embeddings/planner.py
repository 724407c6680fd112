"""Plan where tables go, for any number of ranks, without a GPU or a process group.

The estimates of time and memory are TorchRec's; the search over placements is `search`'s.  The plan is a pure function
of the arguments, so every rank of a job may make it for itself.
"""

import logging
from collections.abc import Sequence

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingCollection

from embeddings.config import PlacementConfig, SparseOptimizerConfig, TableConfig
from embeddings.costs import Option, table_options
from embeddings.machine import Machine
from embeddings.optimizers import optimizer_of
from embeddings.plan import (
    GIB,
    MAX_COMPARED_TABLES,
    BatchLoad,
    Candidate,
    Plan,
    RankEstimate,
    Reservation,
    TablePlacement,
    shards_of,
    size_text,
)
from embeddings.search import Packer, Packing, best_packing, single_changes

logger = logging.getLogger(__name__)

DENSE_COPIES = 5
"""Float32 copies of each dense parameter: itself, its gradient, DDP's bucket of the gradient, Adam's two moments."""


def plan_tables(
    model: nn.Module,
    tables: Sequence[TableConfig],
    *,
    machine: Machine,
    placement: PlacementConfig,
    optimizer: SparseOptimizerConfig,
    load: BatchLoad,
) -> Plan:
    """The best placement of `tables` found on `machine`.  `model` (meta device is enough) tells the dense memory.

    Raises:
        ValueError: the tables do not fit (the message says what is needed and what would help), or a wrong constraint.
    """
    options = table_options(tables, machine=machine, placement=placement, optimizer=optimizer, load=load)
    reservation = _reservation(model, machine, placement)
    available = int(machine.memory_gib * GIB) - reservation.total_bytes
    if available <= 0:
        raise ValueError(_nothing_left(machine, reservation))
    packer = Packer(
        options,
        world_size=machine.world_size,
        local_world_size=machine.local_world_size,
        memory_bytes=available,
        host_bytes=int(machine.ddr_gib * GIB) if machine.compute_device == "cuda" else 0,
        lookup_group_ms=machine.lookup_group_ms,
    )
    packing = best_packing(packer)
    if packing.rating[0]:
        raise ValueError(_does_not_fit(tables, options, packing, machine, placement, available))
    chosen = [table[index] for table, index in zip(options, packing.choice, strict=True)]
    everywhere = range(machine.world_size)
    placements = {}
    for i, (table, option) in enumerate(zip(tables, chosen, strict=True)):
        ranks = [packing.rank_of[i]] if option.sharding_type == "table_wise" else everywhere
        placements[table.name] = TablePlacement(
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            dtype=table.dtype,
            optimizer=optimizer_of(table, optimizer).kind,
            sharding_type=option.sharding_type,
            kernel=option.kernel,
            shards=shards_of(table, option.sharding_type, ranks),
            candidates=_candidates(packer, packing, i, explain=len(tables) <= MAX_COMPARED_TABLES),
        )
    return Plan(
        machine=machine,
        load=load,
        reservation=reservation,
        tables=placements,
        ranks=_rank_estimates(chosen, packing, machine.world_size),
    )


def dense_bytes(model: nn.Module) -> int:
    """Bytes a rank for the replicated part of `model` while it trains; everything but its embedding collections."""
    sparse = {
        parameter
        for module in model.modules()
        if isinstance(module, EmbeddingCollection)
        for parameter in module.parameters()
    }
    return sum(DENSE_COPIES * 4 * parameter.numel() for parameter in model.parameters() if parameter not in sparse)


def _reservation(model: nn.Module, machine: Machine, placement: PlacementConfig) -> Reservation:
    return Reservation(
        fraction_bytes=int(machine.memory_gib * placement.reserved_fraction * GIB),
        dense_bytes=dense_bytes(model),
        activation_bytes=int(placement.activation_gib * GIB),
    )


def _candidates(packer: Packer, packing: Packing, table: int, *, explain: bool) -> tuple[Candidate, ...]:
    """The choice for `table` first, then its alternatives by the plan's time with them."""
    alternatives = {other.choice[table]: other for other in single_changes(packer, packing, table)} if explain else {}
    candidates = []
    for index, option in enumerate(packer.options[table]):
        other = packing if index == packing.choice[table] else alternatives.get(index)
        candidates.append(
            Candidate(
                sharding_type=option.sharding_type,
                kernel=option.kernel,
                table_ms=option.largest.ms,
                table_bytes=option.largest.memory_bytes,
                plan_ms=None if other is None or other.rating[0] else other.rating[1],
            )
        )
    chosen = candidates.pop(packing.choice[table])
    # Without a plan's time an alternative does not fit, or was not tried: last.
    order = sorted(candidates, key=lambda c: (c.plan_ms is None, c.plan_ms or 0.0, c.table_ms))
    return (chosen, *order)


def _rank_estimates(chosen: Sequence[Option], packing: Packing, world_size: int) -> tuple[RankEstimate, ...]:
    sums = [[0, 0, 0, 0] for _ in range(world_size)]
    times = [0.0] * world_size
    for i, option in enumerate(chosen):
        rank = packing.rank_of.get(i, 0)
        for count, cost in option.blocks:
            for _ in range(count):
                parts = (cost.weight_bytes, cost.optimizer_bytes, cost.io_bytes, cost.host_bytes)
                for j, part in enumerate(parts):
                    sums[rank][j] += part
                times[rank] += cost.ms
                rank += 1
    return tuple(
        RankEstimate(weight_bytes=w, optimizer_bytes=o, io_bytes=io, host_bytes=host, step_ms=ms)
        for (w, o, io, host), ms in zip(sums, times, strict=True)
    )


def _nothing_left(machine: Machine, reservation: Reservation) -> str:
    return (
        f"no memory is left for tables on {machine.describe()}: placement.reserved_fraction takes "
        f"{size_text(reservation.fraction_bytes)}, the dense model {size_text(reservation.dense_bytes)}, "
        f"placement.activation_gib {size_text(reservation.activation_bytes)}; lower them, or take more memory"
    )


def _does_not_fit(
    tables: Sequence[TableConfig],
    options: Sequence[Sequence[Option]],
    packing: Packing,
    machine: Machine,
    placement: PlacementConfig,
    available: int,
) -> str:
    """One line: the need, the tables behind it, and the fixes in order of effort."""
    chosen = [table[index] for table, index in zip(options, packing.choice, strict=True)]
    needs = [_total_bytes(option) for option in chosen]
    largest = sorted(range(len(tables)), key=lambda i: (-needs[i], i))[:3]
    names = ", ".join(f"{tables[i].name} {size_text(needs[i])} ({chosen[i].sharding_type})" for i in largest)
    total, room = sum(needs), available * machine.world_size
    fixes = []
    stuck = [
        tables[i].name
        for i, table in enumerate(options)
        if {option.sharding_type for option in table} == {"table_wise"}
        and min(option.largest.memory_bytes for option in table) > available
    ]
    if stuck:
        fixes.append(f"allow row_wise for {', '.join(stuck[:3])}, too large for one rank (placement.tables)")
    fixes.append(f"use more ranks (at least {_ranks_needed(needs, available, machine)})")
    fixes.append(f"use ranks with more memory (at least {_gib_needed(packing, machine, placement, available):.0f} GiB)")
    if machine.compute_device == "cuda" and "fused_uvm_caching" not in placement.compute_kernels:
        fixes.append("keep cold rows in host memory (add fused_uvm_caching to placement.compute_kernels)")
    fixes.append("lower placement.reserved_fraction or placement.activation_gib")
    return (
        f"the tables do not fit on {machine.describe()}: they need {size_text(total)} in all and "
        f"{size_text(packing.rating[3])} on the fullest rank, {size_text(room)} in all and "
        f"{size_text(available)} a rank are available; largest: {names}; fixes: {'; or '.join(fixes)}"
    )


def _total_bytes(option: Option) -> int:
    return sum(count * cost.memory_bytes for count, cost in option.blocks)


def _ranks_needed(needs: Sequence[int], available: int, machine: Machine) -> int:
    """Whole nodes whose memory holds all tables if it could be divided at will."""
    nodes = -(-sum(needs) // (available * machine.local_world_size))
    return max(int(nodes) * machine.local_world_size, machine.world_size + machine.local_world_size)


def _gib_needed(packing: Packing, machine: Machine, placement: PlacementConfig, available: int) -> float:
    """Memory a rank with which the fullest rank of the best placement found would fit, a GiB to spare."""
    return machine.memory_gib + (packing.rating[3] - available) / GIB / (1 - placement.reserved_fraction) + 1
