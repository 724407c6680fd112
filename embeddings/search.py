"""The search for a placement: which option each table gets, and which rank each of its blocks.

A placement is rated by (bytes that do not fit, time of the busiest rank, total time, memory of the fullest rank), least
first: the rating of TorchRec's planner with ties broken and the fixed time of each lookup group added.  An option's
blocks either lie on all ranks, which they load alike or nearly so, or are dealt out, largest first, each to the least
loaded rank where it fits (TorchRec's GreedyPerfPartitioner).

The choice of options is searched in three steps.  For every set of kinds, as a kind in use costs a fixed time: spread
the m heaviest tables over all ranks and deal out the rest, for well-spread m.  As long as memory is short: move the
coldest tables to a slower kernel.  Then: change single tables while that helps.

Everything is deterministic, so every rank of a job finds the same plan.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from embeddings.hardware import Rates
from embeddings.kinds.kind import ShardCost
from embeddings.options import Option
from embeddings.problem import Problem

MAX_SINGLE_CHANGES = 512
"""Single-table changes tried, for up to 1,000 tables; fewer for more, in proportion."""

REFINED = 2
"""Sets of kinds that are searched finely, the best ones of a coarse search."""

Choice = tuple[int, ...]
"""For each table, the index of its option."""

Rating = tuple[int, float, float, int]
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


@dataclass(slots=True)
class Loads:
    """What each rank has so far."""

    ms: list[float]
    """Time a step."""
    memory: list[int]
    """Device memory, in bytes."""
    host: list[int]
    """Host memory, in bytes."""

    def copy(self) -> "Loads":
        """The same, to be changed."""
        return Loads(self.ms.copy(), self.memory.copy(), self.host.copy())

    def add(self, rank: int, cost: ShardCost) -> None:
        """Give a rank one more block."""
        self.ms[rank] += cost.ms
        self.memory[rank] += cost.memory_bytes
        self.host[rank] += cost.host_bytes


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
        self._world_size = world_size
        self._local_world_size = local_world_size
        self._host_bytes = host_bytes
        self._rates = rates

    def pack(self, choice: Choice) -> Packing:
        """Deal out `choice` by time, which balances better; if that does not fit, by size, which fits more."""
        loads = self._spread_loads(choice)
        pieces = [
            (i, number, cost)
            for i, option in enumerate(choice)
            for number, cost in enumerate(self.options[i][option].pieces)
        ]
        by_time = sorted(pieces, key=lambda p: (-p[2].ms, -p[2].memory_bytes, p[0], p[1]))
        packing = self._deal(choice, by_time, loads.copy())
        if not packing.rating[0]:
            return packing
        by_size = sorted(pieces, key=lambda p: (-p[2].memory_bytes - p[2].host_bytes, -p[2].ms, p[0], p[1]))
        return min(packing, self._deal(choice, by_size, loads), key=lambda packing: packing.rating)

    def estimate(self, choice: Choice, ranks_of: dict[int, tuple[int, ...]]) -> Packing:
        """A placement that is given, rated."""
        return self._rated(choice, ranks_of, self._loads(choice, ranks_of))

    def loads(self, packing: Packing) -> Loads:
        """What each rank has."""
        return self._loads(packing.choice, packing.ranks_of)

    def _loads(self, choice: Choice, ranks_of: dict[int, tuple[int, ...]]) -> Loads:
        loads = self._spread_loads(choice)
        for i, ranks in ranks_of.items():
            for rank, cost in zip(ranks, self.options[i][choice[i]].pieces, strict=True):
                loads.add(rank, cost)
        return loads

    def _spread_loads(self, choice: Choice) -> Loads:
        """What the tables that lie on all ranks load each of them with."""
        # Differences between neighbouring ranks: a table touches as many entries as it has different blocks.
        ms, memory, host = [0.0] * (self._world_size + 1), [0] * (self._world_size + 1), [0] * (self._world_size + 1)
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
        return Loads(*(list(accumulate(differences[:-1])) for differences in (ms, memory, host)))  # type: ignore[arg-type]  # in this order

    def _deal(self, choice: Choice, order: Sequence[tuple[int, int, ShardCost]], loads: Loads) -> Packing:
        """Give each block of `order` to the least loaded rank where it fits; else to the one with most room.

        Blocks of one table go to different ranks.
        """
        local = self._local_world_size
        # Ties go to the same place of another node, so that tables spread over nodes and their host memory.
        ms, memory, host = loads.ms, loads.memory, loads.host
        heap = [(ms[rank], rank % local, rank) for rank in range(self._world_size)]
        heapq.heapify(heap)
        ranks_of = {i: [-1] * len(self.options[i][choice[i]].pieces) for i, _, _ in order}
        for i, number, cost in order:
            size, passed = cost.memory_bytes, []
            while heap:
                entry = heapq.heappop(heap)
                rank = entry[2]
                if (
                    memory[rank] + size <= self.memory_bytes
                    and host[rank] + cost.host_bytes <= self._host_bytes
                    and rank not in ranks_of[i]
                ):
                    break
                passed.append(entry)
            else:
                free = [entry for entry in passed if entry[2] not in ranks_of[i]]
                entry = min(free, key=lambda entry: (memory[entry[2]] + host[entry[2]], entry[2]))
                rank = entry[2]
                passed.remove(entry)
            ranks_of[i][number] = rank
            ms[rank] += cost.ms
            memory[rank] += size
            host[rank] += cost.host_bytes
            heapq.heappush(heap, (ms[rank], rank % local, rank))
            for entry in passed:
                heapq.heappush(heap, entry)
        return self._rated(choice, {i: tuple(ranks) for i, ranks in ranks_of.items()}, loads)

    def _rated(self, choice: Choice, ranks_of: dict[int, tuple[int, ...]], loads: Loads) -> Packing:
        excess = sum(memory - self.memory_bytes for memory in loads.memory if memory > self.memory_bytes)
        excess += sum(host - self._host_bytes for host in loads.host if host > self._host_bytes)
        groups = {self.options[i][index].group for i, index in enumerate(choice)}
        busiest = max(loads.ms) + self._rates.lookups_ms + len(groups) * self._rates.lookup_group_ms
        return Packing(choice, ranks_of, (excess, busiest, sum(loads.ms), max(loads.memory)))


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


def best_packing(packer: Packer) -> Packing:
    """The best placement found.  It does not fit if its rating begins with more than 0 bytes."""
    return _change_single_tables(packer, _best_start(packer))


def fits(packer: Packer) -> bool:
    """Whether `best_packing` finds a placement that fits, without making it good."""
    start = _best_start(packer)
    return not start.rating[0] or not _change_single_tables(packer, start).rating[0]


def _best_start(packer: Packer) -> Packing:
    allowed = [_fastest_kernels(table) for table in packer.options]
    best = _best_choice(packer, allowed)
    if best.rating[0]:
        best = min(best, _best_with_slower_kernels(packer, allowed), key=lambda packing: packing.rating)
    return best


def _fastest_kernels(table: Sequence[Option]) -> list[int]:
    """For each kind and number of blocks, the index of its fastest option."""
    best: dict[tuple[str, int], int] = {}
    for i, option in enumerate(table):
        way = (option.kind.name, len(option.pieces))
        if way not in best or option.largest.ms < table[best[way]].largest.ms:
            best[way] = i
    return list(best.values())


def _best_choice(packer: Packer, allowed: Sequence[Sequence[int]]) -> Packing:
    """The best of the choices that spread the m heaviest tables and deal out the rest, over all sets of kinds."""
    kinds = sorted({packer.options[i][index].kind.name for i, indices in enumerate(allowed) for index in indices})
    sets = [set(names) for size in range(1, len(kinds) + 1) for names in combinations(kinds, size)]
    searches: dict[tuple[tuple[int, int], ...], _SpreadSearch] = {}
    for names in sets:
        search = _SpreadSearch(packer, [_two_ways(packer, i, indices, names) for i, indices in enumerate(allowed)])
        searches.setdefault(search.ways, search)
    ranked = sorted(searches.values(), key=lambda search: search.coarse().rating)
    found = [search.fine() for search in ranked[:REFINED]]
    return min(found, key=lambda packing: packing.rating)


def _two_ways(packer: Packer, table: int, indices: Sequence[int], names: set[str]) -> tuple[int, int]:
    """Of a table's allowed options of some kinds, the best on all ranks and the best to deal out; one twice if only it
    is there, and of any kind where it has none of these."""
    options = packer.options[table]
    mine = [i for i in indices if options[i].kind.name in names] or list(indices)
    spread = [i for i in mine if options[i].kind.everywhere]
    dealt = [i for i in mine if not options[i].kind.everywhere]

    def by_time(i: int) -> tuple[bool, float, int]:
        too_large = options[i].largest.memory_bytes > packer.memory_bytes
        return too_large, sum(count * cost.ms for count, cost in options[i].runs), i

    best_spread = min(spread or dealt, key=lambda i: (by_time(i)[0], options[i].largest.ms, i))
    return best_spread, min(dealt or spread, key=by_time) if dealt else best_spread


class _SpreadSearch:
    """How many of the tables to spread, heaviest first, when each has one option of either way."""

    def __init__(self, packer: Packer, ways: Sequence[tuple[int, int]]) -> None:
        self.ways = tuple(ways)
        self._packer = packer
        free = [i for i, (spread, dealt) in enumerate(ways) if spread != dealt]
        dealt = {i: packer.options[i][ways[i][1]].largest for i in free}
        by_time = sorted(free, key=lambda i: (-dealt[i].ms, i))
        by_size = sorted(free, key=lambda i: (-dealt[i].memory_bytes, i))
        self._orders = (by_time,) if by_time == by_size else (by_time, by_size)
        self._found: list[dict[int, Packing]] = [{} for _ in self._orders]

    def coarse(self) -> Packing:
        """The best of a few numbers of tables."""
        largest = len(self._orders[0])
        for number in range(len(self._orders)):
            for count in {0, largest, 1, largest // 8, largest // 4, largest // 2} & set(range(largest + 1)):
                self._try(number, count)
            if not self._best().rating[0]:
                # The order by size is for what does not fit otherwise.
                break
        return self._best()

    def fine(self) -> Packing:
        """The best of well-spread numbers and, step by step, of their neighbours."""
        largest = len(self._orders[0])
        for number, found in enumerate(self._found):
            if not found:
                continue
            for count in _spread_counts(largest):
                self._try(number, count)
            step = max(1, largest // 16)
            while step >= 1:
                best = min(found, key=lambda count: (found[count].rating, count))
                for count in (best - step, best + step):
                    if 0 <= count <= largest:
                        self._try(number, count)
                step = step // 2
        return self._best()

    def _try(self, number: int, count: int) -> None:
        if count in self._found[number]:
            return
        choice = [dealt for _, dealt in self.ways]
        for i in self._orders[number][:count]:
            choice[i] = self.ways[i][0]
        self._found[number][count] = self._packer.pack(tuple(choice))

    def _best(self) -> Packing:
        return min((packing for found in self._found for packing in found.values()), key=lambda packing: packing.rating)


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


def _best_with_slower_kernels(packer: Packer, allowed: list[list[int]]) -> Packing:
    """As few tables as needed on kernels with less device memory, first those with most bytes for their time."""
    options = packer.options
    order = sorted(
        range(len(options)), key=lambda i: (-max(_bytes_per_ms(options[i][index]) for index in allowed[i]), i)
    )
    while True:
        slower = [
            list(dict.fromkeys(_next_kernel(table, index) for index in indices))
            for table, indices in zip(options, allowed, strict=True)
        ]
        best = _best_choice(packer, slower)
        if best.rating[0]:
            if slower == allowed:
                return best
            allowed = slower
            continue
        low, high = 0, len(order)
        while low + 1 < high:
            middle = (low + high) // 2
            moved = set(order[:middle])
            packing = _best_choice(packer, [slower[i] if i in moved else allowed[i] for i in range(len(order))])
            low, high, best = (middle, high, best) if packing.rating[0] else (low, middle, packing)
        return best


def _bytes_per_ms(option: Option) -> float:
    return option.largest.memory_bytes / max(option.largest.ms, 1e-9)


def _next_kernel(table: Sequence[Option], index: int) -> int:
    """The option of the same kind and blocks with the next smaller device memory; `index` itself if there is none."""
    now = table[index]
    smaller = [
        i
        for i, option in enumerate(table)
        if (option.kind, len(option.pieces)) == (now.kind, len(now.pieces))
        and option.largest.memory_bytes < now.largest.memory_bytes
    ]
    return max(smaller, key=lambda i: (table[i].largest.memory_bytes, -i), default=index)


def _change_single_tables(packer: Packer, packing: Packing) -> Packing:
    """Give single tables another option, heaviest first, as long as a round of it improves the rating."""
    order = sorted(range(len(packer.options)), key=lambda i: (-packer.options[i][packing.choice[i]].largest.ms, i))
    limit = min(MAX_SINGLE_CHANGES, MAX_SINGLE_CHANGES * 1000 // len(order))
    tries, improved = 0, True
    while improved and tries < limit:
        improved = False
        for i in order:
            for candidate in single_changes(packer, packing, i):
                tries += 1
                if candidate.rating < packing.rating:
                    packing, improved = candidate, True
            if tries >= limit:
                break
    return packing


def single_changes(packer: Packer, packing: Packing, table: int) -> Iterable[Packing]:
    """The packings in which only `table` has another option; blocks are dealt out anew."""
    for option in range(len(packer.options[table])):
        if option != packing.choice[table]:
            yield packer.pack((*packing.choice[:table], option, *packing.choice[table + 1 :]))
