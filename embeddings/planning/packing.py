"""Dealing blocks of tables out to ranks: what each rank has then, and how good that is.

A placement is rated by (bytes that do not fit, time of the busiest rank, total time, memory of the fullest rank), least
first: the rating of TorchRec's planner with ties broken and the fixed time of each lookup group added.  An option's
blocks either lie on all ranks, which they load alike or nearly so, or are dealt out, largest first, each to the least
loaded rank where it fits (TorchRec's GreedyPerfPartitioner).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.hardware import Rates
from embeddings.kinds.kind import ShardCost
from embeddings.planning.options import Option, cached_groups
from embeddings.planning.problem import Problem

Choice = tuple[int, ...]
"""For each table, the index of its option."""

Loads = npt.NDArray[np.float64]
"""[3, ranks] of each rank: ms a step, bytes of device memory, bytes of host memory."""

Rating = tuple[float, float, float, float]
"""Bytes that do not fit, ms of the busiest rank, ms of all ranks, bytes of the fullest rank."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A choice with a rank for every block that is dealt out."""

    choice: Choice
    """The option of each table."""
    ranks_of: dict[int, tuple[int, ...]]
    """Ranks of the blocks of each table that has some to deal out, by index."""
    rating: Rating
    """How good it is; least is best."""


class Packer:
    """Deals tables out to ranks that are all alike."""

    def __init__(
        self,
        options: Sequence[Sequence[Option]],
        *,
        world_size: int,
        local_world_size: int,
        memory_bytes: int,
        host_bytes: int,
        rates: Rates,
    ) -> None:
        self.options = options
        self.memory_bytes = memory_bytes
        self.world_size = world_size
        self._ranks_a_node = local_world_size
        # Ties go to the same place of another node, so that tables spread over nodes and their host memory.
        self._ranks = sorted(range(world_size), key=lambda rank: (rank % local_world_size, rank))
        self.host_bytes = host_bytes
        self._rates = rates
        self.room = world_size * memory_bytes, world_size * host_bytes
        """Bytes of device memory and of host memory, of all ranks."""

    def pack(self, choice: Choice) -> Packing:
        """Deal out `choice` by time, which balances better; if that does not fit, by size, which fits more."""
        by_time = sorted(self._pieces(choice), key=lambda p: (-p[2].ms, -p[2].memory_bytes, p[0], p[1]))
        packing = self._deal(choice, by_time)
        if not packing.rating[0] or not self._has_room(choice):
            return packing
        return min(packing, self.pack_by_size(choice), key=lambda packing: packing.rating)

    def pack_by_size(self, choice: Choice) -> Packing:
        """Deal out `choice`, the largest first."""
        pieces = self._pieces(choice)
        return self._deal(
            choice, sorted(pieces, key=lambda p: (-p[2].memory_bytes - p[2].host_bytes, -p[2].ms, p[0], p[1]))
        )

    def _pieces(self, choice: Choice) -> list[tuple[int, int, ShardCost]]:
        """(table, number of the block, cost) of every block that is dealt out, of those on nodes each node's first one,
        which is the largest there."""
        return [
            (i, number, cost)
            for i, option in enumerate(choice)
            for number, cost in enumerate(self.options[i][option].pieces)
            if not (self.options[i][option].kind.on_nodes and number % self._ranks_a_node)
        ]

    def _has_room(self, choice: Choice) -> bool:
        """Whether all ranks' memory together would hold the tables."""
        totals = [self.options[i][index].total_bytes for i, index in enumerate(choice)]
        device, host = map(sum, zip(*totals, strict=True))
        return device <= self.room[0] and host <= self.room[1]

    def estimate(self, choice: Choice, ranks_of: dict[int, tuple[int, ...]]) -> Packing:
        """A placement that is given, rated."""
        return self._rated(choice, ranks_of, self._loads(choice, ranks_of))

    def loads(self, packing: Packing) -> Loads:
        """The time and memory that each rank has been given so far."""
        return self._loads(packing.choice, packing.ranks_of)

    def _loads(self, choice: Choice, ranks_of: dict[int, tuple[int, ...]]) -> Loads:
        loads = self._spread_loads(choice)
        for i, ranks in ranks_of.items():
            for rank, cost in zip(ranks, self.options[i][choice[i]].pieces, strict=True):
                loads[:, rank] += _load(cost)
        return loads

    def _spread_loads(self, choice: Choice) -> Loads:
        """What the tables that lie on all ranks load each of them with."""
        # Differences between neighbouring ranks: a table touches as many entries as it has different blocks.
        ms, memory, host = [0.0] * (self.world_size + 1), [0] * (self.world_size + 1), [0] * (self.world_size + 1)
        for i, index in enumerate(choice):
            option = self.options[i][index]
            if option.pieces:
                continue
            start = 0
            for count, cost in option.runs:
                for place, sign in ((start, 1), (start + count, -1)):
                    ms[place] += sign * cost.ms
                    memory[place] += sign * cost.memory_bytes
                    host[place] += sign * cost.host_bytes
                start += count
        return np.cumsum(np.array([ms, memory, host], dtype=np.float64)[:, :-1], axis=1)

    def _deal(self, choice: Choice, order: Sequence[tuple[int, int, ShardCost]]) -> Packing:
        """Give each block of `order` to the least loaded rank where it fits; else to the one with most room.

        Blocks of one table go to different ranks; those on nodes follow the largest one of their node.
        """
        loads = self._spread_loads(choice)[:, self._ranks]
        ms, memory, host = loads
        places_of = {i: [-1] * len(self.options[i][choice[i]].pieces) for i, _, _ in order}
        for i, number, cost in order:
            option, places = self.options[i][choice[i]], places_of[i]
            if option.kind.on_nodes:
                end = number + self._ranks_a_node
                places[number:end] = self._node_with_room(cost, [place for place in places if place >= 0], loads)
                for place, block in zip(places[number:end], option.pieces[number:end], strict=True):
                    loads[:, place] += _load(block)
                continue
            place = int(ms.argmin())
            fits = memory[place] <= self.memory_bytes - cost.memory_bytes
            if not fits or host[place] > self.host_bytes - cost.host_bytes or place in places:
                place = self._place_with_room(cost, [place for place in places if place >= 0], loads)
            places[number] = place
            ms[place] += cost.ms
            memory[place] += cost.memory_bytes
            host[place] += cost.host_bytes
        ranks_of = {i: tuple(self._ranks[place] for place in places) for i, places in places_of.items()}
        return self._rated(choice, ranks_of, loads)

    def _place_with_room(self, cost: ShardCost, taken: list[int], loads: Loads) -> int:
        """The column with the least time, none of `taken`, where a block fits; else the one with most room."""
        ms, memory, host = loads
        room = (memory <= self.memory_bytes - cost.memory_bytes) & (host <= self.host_bytes - cost.host_bytes)
        free = np.ones(len(ms), dtype=bool)
        free[taken] = False
        room &= free
        order = np.where(room, ms, math.inf) if room.any() else np.where(free, memory + host, math.inf)
        return int(order.argmin())

    def _node_with_room(self, cost: ShardCost, taken: list[int], loads: Loads) -> list[int]:
        """The columns of the node whose busiest rank has least time, none of `taken`, where a block fits on every rank;
        else of the one with most room."""
        nodes = self.world_size // self._ranks_a_node
        ms, memory, host = (load.reshape(-1, nodes) for load in loads)
        room = (memory <= self.memory_bytes - cost.memory_bytes) & (host <= self.host_bytes - cost.host_bytes)
        free = np.ones(nodes, dtype=bool)
        free[[place % nodes for place in taken]] = False
        fits = room.all(axis=0) & free
        order = np.where(fits, ms.max(axis=0), math.inf) if fits.any() else (memory + host).max(axis=0)
        return list(range(int(np.where(free, order, math.inf).argmin()), self.world_size, nodes))

    def _rated(self, choice: Choice, ranks_of: dict[int, tuple[int, ...]], loads: Loads) -> Packing:
        ms, memory, host = loads
        excess = np.maximum(memory - self.memory_bytes, 0).sum() + np.maximum(host - self.host_bytes, 0).sum()
        groups = {self.options[i][index].group for i, index in enumerate(choice)}
        busiest = float(ms.max()) + self._rates.fixed_ms(len(groups), cached_groups(groups))
        # Exact, so that it does not depend on how a processor adds up.
        return Packing(choice, ranks_of, (float(excess), busiest, math.fsum(ms), float(memory.max())))


def _load(cost: ShardCost) -> tuple[float, float, float]:
    """A block's entries of `Loads`."""
    return cost.ms, float(cost.memory_bytes), float(cost.host_bytes)


def make_packer(problem: Problem, options: Sequence[Sequence[Option]]) -> Packer:
    """The packer of a problem, whose tables have these options."""
    return Packer(
        options,
        world_size=problem.machine.world_size,
        local_world_size=problem.machine.local_world_size,
        memory_bytes=problem.available_bytes,
        host_bytes=problem.host_bytes,
        rates=problem.machine.effective_rates,
    )
