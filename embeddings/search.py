"""The search for a placement: which table goes whole to one rank, which is cut over all, and who holds what.

A plan is rated by (bytes that do not fit, time of the busiest rank, total time, memory of the fullest rank), least
first: the rating of TorchRec's planner with ties broken and the fixed time of each lookup group added.  Row-wise tables
load all ranks alike; the others are then dealt out, largest first, each to the least loaded rank where it fits
(TorchRec's GreedyPerfPartitioner).  The choice between the two is searched in three steps: cut the m heaviest tables,
for well-spread m; move the coldest tables to a slower kernel as long as memory is short; then change single tables
while that helps.

Everything is deterministic, so every rank of a job finds the same plan.  Planning 1,000 tables for 1,024 ranks takes
seconds, because a row-wise table costs three numbers here, not 1,024 shards.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.costs import Option

MAX_SINGLE_CHANGES = 512
"""Single-table changes tried; bounds the time for thousands of tables."""

Choice = tuple[int, ...]
"""For each table, the index of its option."""

Rating = tuple[int, float, float, int]
"""Bytes that do not fit, ms of the busiest rank, ms of all ranks, bytes of the fullest rank."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A choice with a rank for every table-wise table."""

    choice: Choice
    """The option of each table."""
    rank_of: dict[int, int]
    """Rank of each table-wise table, by index."""
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
        lookup_group_ms: float,
    ) -> None:
        self.options = options
        self._world_size = world_size
        self._local_world_size = local_world_size
        self._memory_bytes = memory_bytes
        self._host_bytes = host_bytes
        self._lookup_group_ms = lookup_group_ms

    def pack(self, choice: Choice) -> Packing:
        """The better of two ways to deal out `choice`: by size, which fits more, and by time, which balances better."""
        ms, memory, host = self._row_wise_loads(choice)
        whole = [i for i, option in enumerate(choice) if self.options[i][option].sharding_type == "table_wise"]
        costs = {i: self.options[i][choice[i]].largest for i in whole}
        by_size = sorted(whole, key=lambda i: (-costs[i].memory_bytes - costs[i].host_bytes, -costs[i].ms, i))
        by_time = sorted(whole, key=lambda i: (-costs[i].ms, -costs[i].memory_bytes, i))
        orders = [by_size] if by_size == by_time else [by_size, by_time]
        packings = [self._deal(choice, order, ms.copy(), memory.copy(), host.copy()) for order in orders]
        return min(packings, key=lambda packing: packing.rating)

    def _row_wise_loads(self, choice: Choice) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Time, memory and host memory of each rank from the row-wise tables."""
        # Differences between neighbouring ranks: a table touches as many entries as it has different blocks.
        ms = np.zeros(self._world_size + 1)
        memory = np.zeros(self._world_size + 1, dtype=np.int64)
        host = np.zeros(self._world_size + 1, dtype=np.int64)
        for i, option in enumerate(choice):
            if self.options[i][option].sharding_type == "table_wise":
                continue
            start = 0
            for count, cost in self.options[i][option].blocks:
                for difference, value in ((ms, cost.ms), (memory, cost.memory_bytes), (host, cost.host_bytes)):
                    difference[start] += value
                    difference[start + count] -= value
                start += count
        return np.cumsum(ms[:-1]), np.cumsum(memory[:-1]), np.cumsum(host[:-1])

    def _deal(
        self,
        choice: Choice,
        order: Sequence[int],
        ms: NDArray[np.float64],
        memory: NDArray[np.int64],
        host: NDArray[np.int64],
    ) -> Packing:
        """Give each table of `order` to the least loaded rank where it fits; else to the one with most room."""
        local = self._local_world_size
        # Ties go to the same place of another node, so that tables spread over nodes and their host memory.
        heap = [(float(ms[rank]), rank % local, rank) for rank in range(self._world_size)]
        heapq.heapify(heap)
        rank_of = {}
        for i in order:
            cost = self.options[i][choice[i]].largest
            passed = []
            while heap:
                entry = heapq.heappop(heap)
                rank = entry[2]
                if (
                    memory[rank] + cost.memory_bytes <= self._memory_bytes
                    and host[rank] + cost.host_bytes <= self._host_bytes
                ):
                    break
                passed.append(entry)
            else:
                rank = min(range(self._world_size), key=lambda rank: (memory[rank] + host[rank], rank))
                entry = next(candidate for candidate in passed if candidate[2] == rank)
                passed.remove(entry)
            rank_of[i] = rank
            ms[rank] += cost.ms
            memory[rank] += cost.memory_bytes
            host[rank] += cost.host_bytes
            heapq.heappush(heap, (float(ms[rank]), rank % local, rank))
            for entry in passed:
                heapq.heappush(heap, entry)
        excess = np.maximum(memory - self._memory_bytes, 0).sum() + np.maximum(host - self._host_bytes, 0).sum()
        groups = {(option.embedding_dim, option.sharding_type, option.kernel) for option in self._chosen(choice)}
        busiest = float(ms.max()) + len(groups) * self._lookup_group_ms
        return Packing(choice, rank_of, (int(excess), busiest, float(ms.sum()), int(memory.max())))

    def _chosen(self, choice: Choice) -> list[Option]:
        return [table[index] for table, index in zip(self.options, choice, strict=True)]


def best_packing(packer: Packer) -> Packing:
    """The best placement found.  It does not fit if its rating begins with more than 0 bytes."""
    allowed = [_fastest_kernels(table) for table in packer.options]
    best = _best_cut(packer, allowed)
    if best.rating[0]:
        best = min(best, _best_with_slower_kernels(packer, allowed), key=lambda packing: packing.rating)
    return _change_single_tables(packer, best)


def _fastest_kernels(table: Sequence[Option]) -> dict[str, int]:
    """For each sharding type, the index of its fastest option."""
    indices = range(len(table))
    types = dict.fromkeys(option.sharding_type for option in table)
    return {
        kind: min((i for i in indices if table[i].sharding_type == kind), key=lambda i: (table[i].largest.ms, i))
        for kind in types
    }


def _best_cut(packer: Packer, allowed: Sequence[dict[str, int]]) -> Packing:
    """The best of the choices that cut the m heaviest tables and leave the rest whole."""
    free = [i for i, kinds in enumerate(allowed) if len(kinds) == 2]
    base = [next(iter(kinds.values())) for kinds in allowed]

    def cut(order: Sequence[int], count: int) -> Packing:
        choice = list(base)
        for position, i in enumerate(order):
            choice[i] = allowed[i]["row_wise" if position < count else "table_wise"]
        return packer.pack(tuple(choice))

    def whole(i: int) -> Option:
        return packer.options[i][allowed[i]["table_wise"]]

    orders = (
        sorted(free, key=lambda i: (-whole(i).largest.ms, i)),
        sorted(free, key=lambda i: (-whole(i).largest.memory_bytes, i)),
    )
    packings = []
    for order in orders:
        found = {count: cut(order, count) for count in _spread_counts(len(free))}
        step = max(1, len(free) // 16)
        while step >= 1:
            best = min(found, key=lambda count: (found[count].rating, count))
            for count in (best - step, best + step):
                if 0 <= count <= len(free) and count not in found:
                    found[count] = cut(order, count)
            step = step // 2
        packings.append(min(found.values(), key=lambda packing: packing.rating))
    return min(packings, key=lambda packing: packing.rating)


def _spread_counts(largest: int) -> list[int]:
    """All of 0 to `largest` if few, else about forty of them, dense at the low end."""
    if largest <= 32:
        return list(range(largest + 1))
    counts = {*range(9), largest, *(largest * i // 16 for i in range(17))}
    count = 8
    while count < largest:
        counts.add(count)
        count = count * 3 // 2
    return sorted(counts)


def _best_with_slower_kernels(packer: Packer, allowed: list[dict[str, int]]) -> Packing:
    """As few tables as needed on kernels with less device memory, first those with most bytes for their time."""
    options = packer.options
    order = sorted(
        range(len(options)),
        key=lambda i: (-max(_bytes_per_ms(options[i][index]) for index in allowed[i].values()), i),
    )
    while True:
        slower = [
            {kind: _next_kernel(table, index) for kind, index in kinds.items()}
            for table, kinds in zip(options, allowed, strict=True)
        ]
        best = _best_cut(packer, slower)
        if best.rating[0]:
            if slower == allowed:
                return best
            allowed = slower
            continue
        low, high = 0, len(order)
        while low + 1 < high:
            middle = (low + high) // 2
            moved = set(order[:middle])
            packing = _best_cut(packer, [slower[i] if i in moved else allowed[i] for i in range(len(order))])
            low, high, best = (middle, high, best) if packing.rating[0] else (low, middle, packing)
        return best


def _bytes_per_ms(option: Option) -> float:
    return option.largest.memory_bytes / max(option.largest.ms, 1e-9)


def _next_kernel(table: Sequence[Option], index: int) -> int:
    """The option of the same sharding type with the next smaller device memory; `index` itself if there is none."""
    now = table[index]
    smaller = [
        i
        for i, option in enumerate(table)
        if option.sharding_type == now.sharding_type and option.largest.memory_bytes < now.largest.memory_bytes
    ]
    return max(smaller, key=lambda i: (table[i].largest.memory_bytes, -i), default=index)


def _change_single_tables(packer: Packer, packing: Packing) -> Packing:
    """Give single tables another option, heaviest first, as long as a round of it improves the rating."""
    order = sorted(range(len(packer.options)), key=lambda i: (-packer.options[i][packing.choice[i]].largest.ms, i))
    tries, improved = 0, True
    while improved and tries < MAX_SINGLE_CHANGES:
        improved = False
        for i in order:
            for candidate in single_changes(packer, packing, i):
                tries += 1
                if candidate.rating < packing.rating:
                    packing, improved = candidate, True
            if tries >= MAX_SINGLE_CHANGES:
                break
    return packing


def single_changes(packer: Packer, packing: Packing, table: int) -> Iterable[Packing]:
    """The packings in which only `table` has another option; table-wise tables are dealt out anew."""
    for option in range(len(packer.options[table])):
        if option != packing.choice[table]:
            yield packer.pack((*packing.choice[:table], option, *packing.choice[table + 1 :]))
