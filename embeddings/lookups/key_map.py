"""Which key has which row: the map of a table of unbounded ids, as far as one rank holds it.

Rows are divided into sets of `WAYS`, and a hash of the key says in which set it may have its row, as in a processor's
cache: a key is found by comparing it with `WAYS` others, and what happens to a set depends on its own keys alone.  So
ranks may hold any blocks of sets, and the map is the same for any number of them.

Row 0 is shared by all keys that have no row: it is trained like any other.  A slot is a row without counting that one.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from embeddings.config import UnboundedConfig
from embeddings.rows.initial import random_bits

WAYS = 64
"""Rows that a key may have."""
SHARED_ROW = 0
"""The row of the unknown key and of keys without a row of their own."""
UNKNOWN_KEY = 0
"""The key of what is missing; it never has a row of its own."""
_NEVER = torch.iinfo(torch.int64).max
_MOST = torch.iinfo(torch.int32).max


def slots_of(keys: Tensor, num_slots: int) -> Tensor:
    """[keys] a slot in [0, num_slots) for each key, as good as random: the key's set is that of this slot."""
    bits = random_bits(keys.clone(), 0)
    return (bits.bitwise_right_shift_(1) & _NEVER) % num_slots


@dataclass(frozen=True, slots=True)
class Slots:
    """Keys in sets, with what decides who stays; shapes [slots], a multiple of `WAYS`."""

    keys: Tensor
    """int64; `UNKNOWN_KEY` in a slot that was never taken."""
    counts: Tensor
    """int32 lookups of the key in training since it came here."""
    last: Tensor
    """int32 time of the last one; 0 in a slot that was never taken."""

    @classmethod
    def empty(cls, num_slots: int) -> "Slots":
        """No keys; slots beyond a table's rows, which fill the last set, are never free."""
        size = max(1, -(-num_slots // WAYS)) * WAYS
        slots = cls(torch.zeros(size, dtype=torch.int64), *(torch.zeros(size, dtype=torch.int32) for _ in range(2)))
        slots.last[num_slots:] = _MOST
        return slots

    def copy_(self, other: "Slots", where: Tensor | None = None) -> None:
        """Take over what another one holds, at `where` alone if that is given."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if where is None:
                mine.copy_(theirs)
            else:
                mine[where] = theirs

    def at(self, where: Tensor) -> "Slots":
        """A copy of some slots."""
        return Slots(self.keys[where], self.counts[where], self.last[where])

    def find(self, keys: Tensor, sets: Tensor) -> Tensor:
        """[keys] the slot of each key, which may be in a set; -1 where it is in none."""
        same = self.keys.view(-1, WAYS)[sets] == keys[:, None]
        slot, found = sets * WAYS + same.to(torch.uint8).argmax(1), same.any(1)
        return torch.where(found, slot, -1)

    def use(self, slots: Tensor, counts: Tensor, now: int) -> None:
        """Count lookups of keys that are there."""
        self.counts[slots] = (self.counts[slots] + counts).clamp_(max=_MOST).int()
        self.last[slots] = now

    def put(self, slots: Tensor, keys: Tensor, counts: Tensor, now: int) -> None:
        """Put keys into slots, whatever was there."""
        self.keys[slots], self.counts[slots], self.last[slots] = keys, counts.clamp(max=_MOST).int(), now

    def clear(self, slots: Tensor) -> None:
        """Free slots."""
        self.keys[slots], self.counts[slots], self.last[slots] = UNKNOWN_KEY, 0, 0

    def room(self, keys: Tensor, sets: Tensor, counts: Tensor, before: int, by: str) -> Tensor:
        """[keys] a slot for each new key in its set, none twice; -1 where the set has none left.

        Keys of more lookups choose first, then smaller ones.  They take slots that were never taken, then the others
        last used at `before` or earlier, as `by` says: those unused for longest (lru) or with the fewest lookups (lfu,
        then unused for longest); then the first.
        """
        order = keys.argsort()
        order = order[counts[order].argsort(descending=True, stable=True)]
        order = order[sets[order].argsort(stable=True)]
        wanted, group, size = torch.unique_consecutive(sets[order], return_inverse=True, return_counts=True)
        turn = torch.arange(len(keys)) - (size.cumsum(0) - size)[group]
        last, used = (x.view(-1, WAYS)[wanted].long() for x in (self.last, self.counts))
        rating = last if by == "lru" else (used << 32) + last
        rating = torch.where(last == 0, -1, torch.where(last <= before, rating, _NEVER))
        rating, place = rating.sort(dim=1, stable=True)
        turn, late = turn.clamp(max=WAYS - 1), turn >= WAYS
        slots = wanted[group] * WAYS + place[group, turn]
        slots[late | (rating[group, turn] == _NEVER)] = -1
        return torch.empty_like(order).index_put_((order,), slots)


@dataclass(frozen=True, slots=True)
class Change:
    """What the keys of one batch changed in a map."""

    rows: tuple[Tensor, Slots]
    """Slots of rows, and what they hold now."""
    waiting: tuple[Tensor, Slots]
    """Slots of waiting keys, and what they hold now."""
    now: int
    """The map's time, by which keys grow old."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of the keys of one batch."""

    rows: Tensor
    """[keys] int64 local slot of each key's row; -1 for the shared row."""
    restarted: Tensor
    """[restarted] int64 local slots that passed from one key to another: their rows must begin anew."""
    change: Change


class KeyMap:
    """The part of a table's map that lies in a block of its sets.  Keys are looked up with the set of each, counted
    from the block's first; slots likewise.

    A key that has been looked up `min_count` times gets a row.  Until then it waits, counted, in a place of its set;
    where all are taken, it takes that of the key that was unused for longest, and that one's count is forgotten.
    """

    def __init__(self, config: UnboundedConfig, num_slots: int) -> None:
        self._config = config
        self.rows = Slots.empty(num_slots)
        """The keys that have a row."""
        self.waiting = Slots.empty(num_slots if config.min_count > 1 else 0)
        """Keys that do not have one yet."""
        self.now = torch.zeros((), dtype=torch.int64)
        """Batches that were admitted; the times in slots count them."""

    def find(self, keys: Tensor, sets: Tensor) -> Tensor:
        """[keys] the slot of each key's row, -1 for the shared row; changes nothing."""
        return self.rows.find(keys, sets)

    def admit(self, keys: Tensor, sets: Tensor, counts: Tensor) -> Admission:
        """Count a batch's lookups, `counts` [keys] of each of its distinct keys, and give rows to those that are due.

        A key whose set has no row that may be taken reads the shared row, and asks again when it is looked up again.
        """
        self.now += 1
        now, config = int(self.now), self._config
        slots = self.rows.find(keys, sets)
        known = slots >= 0
        self.rows.use(slots[known], counts[known], now)
        new = (~known).nonzero().view(-1)
        keys, sets, counts = keys[new], sets[new], counts[new]
        waited = self.waiting.find(keys, sets) if config.min_count > 1 else torch.full_like(new, -1)
        counts = counts + torch.where(waited >= 0, self.waiting.counts[waited], 0) if config.min_count > 1 else counts
        due = (counts >= config.min_count).nonzero().view(-1)
        taken = self.rows.room(keys[due], sets[due], counts[due], now - config.evict_after_steps, config.evict)
        due, taken = due[taken >= 0], taken[taken >= 0]
        restarted = taken[self.rows.last[taken] > 0]
        self.rows.put(taken, keys[due], counts[due], now)
        slots[new[due]] = taken
        used = slots[slots >= 0]
        waits = torch.zeros(0, dtype=torch.int64)
        if config.min_count > 1:
            rowless = torch.ones_like(new, dtype=torch.bool).index_fill_(0, due, False)
            waits = self._wait(keys, sets, counts, waited, rowless)
        return Admission(slots, restarted, Change((used, self.rows.at(used)), (waits, self.waiting.at(waits)), now))

    def _wait(self, keys: Tensor, sets: Tensor, counts: Tensor, waited: Tensor, rowless: Tensor) -> Tensor:
        """Keep the counts of keys without a row, drop those of the others; returns the slots that changed.

        `waited` are the slots that keys have been waiting in, -1 for those that were not.
        """
        now, here = int(self.now), waited >= 0
        self.waiting.clear(waited[here & ~rowless])
        self.waiting.put(waited[here & rowless], keys[here & rowless], counts[here & rowless], now)
        new = rowless & ~here
        slots = self.waiting.room(keys[new], sets[new], counts[new], now - 1, "lru")
        got = slots >= 0
        self.waiting.put(slots[got], keys[new][got], counts[new][got], now)
        return torch.cat([waited[here], slots[got]])

    def apply(self, change: Change) -> None:
        """Do what another map did for a batch."""
        for mine, (slots, values) in ((self.rows, change.rows), (self.waiting, change.waiting)):
            mine.copy_(values, slots)
        self.now.fill_(change.now)

    def copy_(self, other: "KeyMap") -> None:
        """Become equal to another map of the same size."""
        self.rows.copy_(other.rows)
        self.waiting.copy_(other.waiting)
        self.now.copy_(other.now)
