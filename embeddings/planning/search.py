"""The search for a placement: which option each table gets.  `packing` gives its blocks their ranks and rates it.

The choice of options is searched in three steps.  For every set of kinds, as a kind in use costs a fixed time: spread
the m heaviest tables over all ranks and deal out the rest, for well-spread m.  If that does not fit: the same with the
coldest tables on a slower kernel, as few as needed.  Then: change single tables, and pairs of few, while that helps.

Everything is deterministic, so every rank of a job finds the same plan.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, islice, pairwise, product

from embeddings.planning.options import Option
from embeddings.planning.packing import Choice, Packer, Packing, Rating

MAX_SINGLE_CHANGES = 512
"""Single-table changes tried, for up to 1,000 tables and 1,000 blocks dealt out; fewer for more, in proportion."""

MAX_PAIRED_TABLES, MAX_PAIR_CHANGES = 32, 512
"""Up to so many tables, two are changed at once: one to a faster option, another to one that makes room for it; and how
often that is tried."""

MAX_SEARCHED_TABLES = 1000
"""Up to so many tables, what a few packings find no room for is searched for."""

MAX_REFINED_TABLES = 1000
"""Tables of all sets of kinds together that are searched finely: the best sets of a coarse search, two in any case."""

_LARGE_PARTS = (1 / 16, 1 / 4, 0.0)
"""Parts of a rank's memory: where tables hardly fit, a block that takes more than one of them counts as large."""
_TIMES_THE_LEAST = (math.inf, 2.0)
"""What smaller blocks may take, of the least memory that the table can take on all ranks together."""
_FILLED = (1.0, 0.9)
"""Parts of all device memory that tables stay in while some go to host memory: blocks never fill all ranks alike."""

Allowed = Sequence[Sequence[int]]
"""For each table, the indices of the options that it may have."""


def _rating(packing: Packing) -> Rating:
    return packing.rating


def _best(packings: Iterable[Packing]) -> Packing:
    return min(packings, key=_rating)


def best_packing(packer: Packer) -> Packing:
    """The best placement found.  It does not fit if its rating begins with more than 0 bytes."""
    if not _could_fit(packer):
        return _tightest(packer)
    found = _fitting(packer)
    if found is not None:
        allowed, fitting = found
        return _changed(packer, min(_best_choice(packer, allowed), fitting, key=_rating))
    tightest = _tightest(packer)
    if tightest.rating[0] and len(packer.options) > MAX_SEARCHED_TABLES:
        return tightest
    return _changed(packer, min(tightest, *_best_of_levels(packer), key=_rating))


def fits(packer: Packer) -> bool:
    """Whether there is a placement that fits, as far as a few packings tell: `best_packing` then finds one."""
    return _could_fit(packer) and not _tightest(packer).rating[0]


def _could_fit(packer: Packer) -> bool:
    return _may_fit(packer, [range(len(table)) for table in packer.options])


def _best_of_levels(packer: Packer) -> list[Packing]:
    return [_best_choice(packer, allowed) for allowed in _levels(packer)]


def _fitting(packer: Packer) -> tuple[Allowed, Packing] | None:
    """Options of which some choice fits, and that: those of the fastest kernels, for as many tables as possible."""
    levels = list(_levels(packer))
    fitting = _first_fit(packer, levels[0])
    if fitting is not None:
        return levels[0], fitting
    mixed = (_as_few_as_needed(packer, faster, slower) for faster, slower in pairwise(levels))
    return next((allowed for allowed in mixed if allowed is not None), None)


def _levels(packer: Packer) -> Iterable[Allowed]:
    """Options of every table on its fastest kernels, on the next slower ones with less device memory, and so on."""
    allowed = [_fastest_kernels(table) for table in packer.options]
    while True:
        yield allowed
        slower = [
            list(dict.fromkeys(_next_kernel(table, index) for index in indices))
            for table, indices in zip(packer.options, allowed, strict=True)
        ]
        if slower == allowed:
            return
        allowed = slower


def _tightest(packer: Packer) -> Packing:
    """The placement that leaves least over of what fits, by a few packings: the coldest tables on their slowest kernel
    as far as device memory is short, tables that are large beside a rank's memory on all ranks, the others dealt out by
    size, so that they fill what is left to within one of them."""
    levels = list(_levels(packer))
    tried: list[Packing] = []
    for choice in _tight_choices(packer, levels[0], levels[-1]):
        tried.append(packer.pack_by_size(choice))
        if not tried[-1].rating[0]:
            break
    return _best(tried)


def _tight_choices(packer: Packer, fastest: Allowed, slowest: Allowed) -> list[Choice]:
    """For tables on these kernels, the coldest on the slower ones as far as device memory is short."""
    parts = _FILLED if fastest != slowest else _FILLED[:1]
    tries = product(_TIMES_THE_LEAST, parts, _LARGE_PARTS)
    return list(dict.fromkeys(_tight_choice(packer, (fastest, slowest), *each) for each in tries))


def _tight_choice(packer: Packer, levels: tuple[Allowed, Allowed], times: float, filled: float, large: float) -> Choice:
    choice, slowest = (
        [_tight_option(packer, i, indices, large, times) for i, indices in enumerate(allowed)] for allowed in levels
    )
    device_bytes = sum(table[index].total_bytes[0] for table, index in zip(packer.options, choice, strict=True))
    room = filled * packer.room[0]
    for i in _coldest_first(packer, levels[0]) if device_bytes > room else ():
        if device_bytes > room:
            table = packer.options[i]
            device_bytes -= table[choice[i]].total_bytes[0] - table[slowest[i]].total_bytes[0]
            choice[i] = slowest[i]
    return tuple(choice)


def _tight_option(packer: Packer, table: int, indices: Sequence[int], large_part: float, times: float) -> int:
    """The option of a table that can be dealt out with least memory; where its block is large beside a rank's memory,
    the one with the smallest block, without those that waste memory: replicas are small, but there is one a rank."""
    options = packer.options[table]
    dealt = [index for index in indices if options[index].pieces]
    if dealt:
        index = min(dealt, key=lambda index: (sum(options[index].total_bytes), index))
        block = options[index].largest
        if block.memory_bytes <= large_part * packer.memory_bytes and block.host_bytes <= large_part * max(
            packer.host_bytes, 0
        ):
            return index
    most = times * min(sum(options[index].total_bytes) for index in indices)

    def by_block(index: int) -> tuple[bool, bool, int, int]:
        block, total = options[index].largest, sum(options[index].total_bytes)
        return block.memory_bytes > packer.memory_bytes, total > most, block.memory_bytes, block.host_bytes

    return min(indices, key=by_block)


def _fastest_kernels(table: Sequence[Option]) -> list[int]:
    """For each kind and number of blocks, the index of its fastest option."""
    best: dict[tuple[str, int], int] = {}
    for i, option in enumerate(table):
        way = (option.kind.name, len(option.pieces))
        if way not in best or option.largest.ms < table[best[way]].largest.ms:
            best[way] = i
    return list(best.values())


def _best_choice(packer: Packer, allowed: Allowed) -> Packing:
    """The best of the choices that spread the m heaviest tables and deal out the rest, over all sets of kinds."""
    return _best(packing for search in _most_promising(packer, _searches(packer, allowed)) for packing in search.fine())


def _most_promising(packer: Packer, searches: "Iterable[_SpreadSearch]") -> "list[_SpreadSearch]":
    number = max(2, MAX_REFINED_TABLES // len(packer.options))
    return sorted(searches, key=lambda search: _best(search.coarse()).rating)[:number]


def _first_fit(packer: Packer, allowed: Allowed) -> Packing | None:
    """The first of these choices that fits; None if none does."""
    if not _may_fit(packer, allowed):
        return None
    tight = (packer.pack_by_size(choice) for choice in _tight_choices(packer, allowed, allowed))
    fitting = next((packing for packing in tight if not packing.rating[0]), None)
    if fitting is not None or len(allowed) > MAX_SEARCHED_TABLES:
        return fitting
    searches = []
    for search in _searches(packer, allowed):
        searches.append(search)
        for packing in search.coarse():
            if not packing.rating[0]:
                return packing
    tries = chain.from_iterable(search.fine() for search in _most_promising(packer, searches))
    return next((packing for packing in tries if not packing.rating[0]), None)


def _may_fit(packer: Packer, allowed: Allowed) -> bool:
    """Whether all ranks' memory together would hold the tables."""
    device, host, both = _needs(packer, allowed)
    device_room, host_room = packer.room
    return device <= device_room and host <= host_room and both <= device_room + host_room


def _needs(packer: Packer, allowed: Allowed) -> tuple[int, int, int]:
    """Bytes of device memory, of host memory and of both, of all ranks, that the tables need at least."""
    sizes = [[packer.options[i][index].total_bytes for index in indices] for i, indices in enumerate(allowed)]
    device = sum(min(size[0] for size in table) for table in sizes)
    host = sum(min(size[1] for size in table) for table in sizes)
    return device, host, sum(min(map(sum, table)) for table in sizes)


def _searches(packer: Packer, allowed: Allowed) -> "Iterator[_SpreadSearch]":
    """For every set of kinds, how many tables to spread; once for sets that come to the same."""
    kinds = sorted({packer.options[i][index].kind.name for i, indices in enumerate(allowed) for index in indices})
    seen = set()
    for names in chain.from_iterable(combinations(kinds, size) for size in range(1, len(kinds) + 1)):
        ways = tuple(_two_ways(packer, i, indices, set(names)) for i, indices in enumerate(allowed))
        if ways not in seen:
            seen.add(ways)
            yield _SpreadSearch(packer, ways)


def _two_ways(packer: Packer, table: int, indices: Sequence[int], names: set[str]) -> tuple[int, int]:
    """The best of a table's options on all ranks and the best to deal out, among its allowed ones of some kinds; one of
    them twice if only it is there, and of any kind where the table has none of these."""
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
    """How many of the tables to spread, those first of which that saves a rank most, when each has one option of either
    way."""

    def __init__(self, packer: Packer, ways: Sequence[tuple[int, int]]) -> None:
        self._ways = ways
        self._packer = packer
        free = [i for i, (spread, dealt) in enumerate(ways) if spread != dealt]
        dealt = {i: packer.options[i][ways[i][1]].largest for i in free}
        saved = {i: dealt[i].ms - packer.options[i][ways[i][0]].largest.ms for i in free}
        by_time = sorted(free, key=lambda i: (-saved[i], i))
        by_size = sorted(free, key=lambda i: (-dealt[i].memory_bytes, i))
        self._orders = (by_time,) if by_time == by_size else (by_time, by_size)
        self._found: list[dict[int, Packing]] = [{} for _ in self._orders]

    def coarse(self) -> Iterable[Packing]:
        """A few numbers of tables, in either order; the order by size is for what does not fit otherwise."""
        largest = len(self._orders[0])
        for found, order in zip(self._found, self._orders, strict=True):
            for count in sorted({0, min(1, largest), largest // 8, largest // 4, largest // 2, largest}):
                yield self._try(found, order, count)
            if not _best(found.values()).rating[0]:
                return

    def fine(self) -> Iterable[Packing]:
        """Well-spread numbers and, step by step, the neighbours of the best."""
        largest = len(self._orders[0])
        for found, order in zip(self._found, self._orders, strict=True):
            if not found:
                continue
            for count in _spread_counts(largest):
                yield self._try(found, order, count)
            step = max(1, largest // 16)
            while step >= 1:
                best = min(found, key=lambda count: (found[count].rating, count))
                for count in (best - step, best + step):
                    if 0 <= count <= largest:
                        yield self._try(found, order, count)
                step = step // 2

    def _try(self, found: dict[int, Packing], order: Sequence[int], count: int) -> Packing:
        if count not in found:
            choice = [dealt for _, dealt in self._ways]
            for i in order[:count]:
                choice[i] = self._ways[i][0]
            found[count] = self._packer.pack(tuple(choice))
        return found[count]


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


def _as_few_as_needed(packer: Packer, faster: Allowed, slower: Allowed) -> tuple[Allowed, Packing] | None:
    """`faster`, but `slower` for as few tables as needed to fit, first those with most bytes for their time, and what
    fits; None where no number of them was found."""
    order = _coldest_first(packer, faster)

    def mixed(count: int) -> Allowed:
        moved = set(order[:count])
        return [slower[i] if i in moved else faster[i] for i in range(len(order))]

    # The more tables move, the less device memory is needed and the more host memory.
    counts, (device_room, host_room) = range(len(order) + 1), packer.room
    first = bisect_left(counts, True, key=lambda count: _needs(packer, mixed(count))[0] <= device_room)
    end = bisect_left(counts, True, key=lambda count: _needs(packer, mixed(count))[1] > host_room)
    tried = [first + (end - 1 - first) * quarters // 4 for quarters in (4, 3, 2, 1, 0)] if first < end else []
    packed = ((count, _first_fit(packer, mixed(count))) for count in tried)
    high, found = next(((count, packing) for count, packing in packed if packing is not None), (0, None))
    low = first - 1
    while found is not None and low + 1 < high:
        middle = (low + high) // 2
        packing = _first_fit(packer, mixed(middle))
        low, high, found = (middle, high, found) if packing is None else (low, middle, packing)
    return None if found is None else (mixed(high), found)


def _coldest_first(packer: Packer, allowed: Allowed) -> list[int]:
    """The tables, those with most device memory for their time first."""

    def bytes_per_ms(i: int) -> float:
        costs = (packer.options[i][index].largest for index in allowed[i])
        return max(cost.memory_bytes / max(cost.ms, 1e-9) for cost in costs)

    return sorted(range(len(allowed)), key=lambda i: (-bytes_per_ms(i), i))


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


def _changed(packer: Packer, packing: Packing) -> Packing:
    """The packing after changes of single tables, and of pairs if tables are few, while that improves the rating."""
    packing = _change_single_tables(packer, packing)
    tries = MAX_PAIR_CHANGES if len(packer.options) <= MAX_PAIRED_TABLES else 0
    while tries:
        better = None
        for tried, other in enumerate(islice(_paired_changes(packer, packing), tries), start=1):
            if other.rating < packing.rating:
                better, tries = other, tries - tried
                break
        if better is None:
            break
        packing = _change_single_tables(packer, better)
    return packing


def _paired_changes(packer: Packer, packing: Packing) -> Iterator[Packing]:
    """The packings in which one table has a faster option that finds no room by itself, and another one an option of
    less device memory; slow tables first, those that make most room for them first."""
    now = [table[index].largest for table, index in zip(packer.options, packing.choice, strict=True)]
    for fast in sorted(range(len(now)), key=lambda i: (-now[i].ms, i)):
        for index, option in enumerate(packer.options[fast]):
            if option.largest.ms >= now[fast].ms:
                continue
            alone = (*packing.choice[:fast], index, *packing.choice[fast + 1 :])
            if not packer.pack(alone).rating[0]:
                continue
            for slow in sorted(range(len(now)), key=lambda i: (-now[i].memory_bytes, i)):
                for smaller, other in enumerate(packer.options[slow]):
                    if slow != fast and other.largest.memory_bytes < now[slow].memory_bytes:
                        yield packer.pack((*alone[:slow], smaller, *alone[slow + 1 :]))


def _change_single_tables(packer: Packer, packing: Packing) -> Packing:
    """Give single tables another option, heaviest first, as long as a round of it improves the rating."""
    order = sorted(range(len(packer.options)), key=lambda i: (-packer.options[i][packing.choice[i]].largest.ms, i))
    dealt = sum(len(ranks) for ranks in packing.ranks_of.values())
    limit = min(MAX_SINGLE_CHANGES, MAX_SINGLE_CHANGES * 1000 // max(len(order), dealt))
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
