"""Which key has which row: against the rules written out with dictionaries, whatever the blocks that ranks hold."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from embeddings.config import UnboundedConfig
from embeddings.lookups.key_map import UNKNOWN_KEY, WAYS, KeyMap, slots_of

Batch = Counter[int]
MASK = (1 << 64) - 1


def set_of(key: int, num_slots: int) -> int:
    """The set of a key, by the finalizer of splitmix64 in whole numbers."""
    bits = key * 0x9E3779B97F4A7C15 & MASK
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & MASK
    bits ^= bits >> 31
    return (bits >> 1) % num_slots // WAYS


@dataclass
class Entry:
    """A key that has a row, or waits for one."""

    slot: int
    count: int
    last: int


@dataclass
class PlainMap:
    """The rules, key by key."""

    config: UnboundedConfig
    num_slots: int
    now: int = 0
    rows: dict[int, Entry] = field(default_factory=dict)
    waiting: dict[int, Entry] = field(default_factory=dict)

    def admit(self, batch: Batch) -> tuple[dict[int, int], set[int]]:
        """(slot of each key that has one, slots that passed to another key)."""
        self.now += 1
        restarted: set[int] = set()
        for key in batch.keys() & self.rows.keys():
            entry = self.rows[key]
            entry.count, entry.last = entry.count + batch[key], self.now
        new = [key for key in batch if key not in self.rows]
        total = {key: batch[key] + (self.waiting[key].count if key in self.waiting else 0) for key in new}
        in_turn = sorted(new, key=lambda key: (-total[key], key))
        before = self.now - self.config.evict_after_steps
        for key in in_turn:
            if total[key] < self.config.min_count:
                continue
            place = self._take(self.rows, key, before, self.config.evict)
            if place is not None:
                slot, passed = place
                restarted |= {slot} if passed else set()
                self.rows[key] = Entry(slot, total[key], self.now)
        if self.config.min_count > 1:
            for key in new:
                entry = self.waiting.get(key)
                if entry is not None and key in self.rows:
                    del self.waiting[key]
                elif entry is not None:
                    entry.count, entry.last = total[key], self.now
            for key in in_turn:
                if key not in self.rows and key not in self.waiting:
                    place = self._take(self.waiting, key, self.now - 1, "lru")
                    if place is not None:
                        self.waiting[key] = Entry(place[0], total[key], self.now)
        return {key: self.rows[key].slot for key in batch if key in self.rows}, restarted

    def _take(self, held: dict[int, Entry], key: int, before: int, by: str) -> tuple[int, bool] | None:
        first = set_of(key, self.num_slots) * WAYS
        slots = range(first, min(first + WAYS, self.num_slots))
        owners = {entry.slot: owner for owner, entry in held.items() if entry.slot in slots}
        free = [slot for slot in slots if slot not in owners]
        if free:
            return free[0], False
        old = [owner for owner in owners.values() if held[owner].last <= before]
        if not old:
            return None

        def rating(owner: int) -> tuple[int, ...]:
            entry = held[owner]
            return (entry.last, entry.slot) if by == "lru" else (entry.count, entry.last, entry.slot)

        victim = min(old, key=rating)
        return held.pop(victim).slot, True


def stream(generator: np.random.Generator, steps: int, num_keys: int, drift: int) -> list[Batch]:
    """Batches of keys of any 64 bits; which of them are common moves on by `drift` keys a batch."""
    keys = np.unique(generator.integers(-(2**63), 2**63 - 1, num_keys + steps * drift))
    generator.shuffle(keys)
    batches = []
    for step in range(steps):
        places = step * drift + np.minimum(generator.zipf(1.3, generator.integers(0, 400)), num_keys) - 1
        batches.append(Counter(keys[places % len(keys)].tolist()))
    return batches


def admit(parts: list[KeyMap], batch: Batch, num_slots: int) -> tuple[dict[int, int], set[int]]:
    """As `PlainMap.admit`, by maps that hold consecutive blocks of sets."""
    keys = torch.tensor(sorted(batch), dtype=torch.int64)
    counts = torch.tensor([batch[key] for key in keys.tolist()], dtype=torch.int64)
    sets = slots_of(keys, num_slots) // WAYS
    found, restarted, first = {}, set(), 0
    for part in parts:
        last = first + len(part.rows.keys) // WAYS
        here = (sets >= first) & (sets < last)
        admission = part.admit(keys[here], sets[here] - first, counts[here])
        for key, slot in zip(keys[here].tolist(), admission.rows.tolist(), strict=True):
            if slot >= 0:
                found[key] = slot + first * WAYS
        restarted |= {slot + first * WAYS for slot in admission.restarted.tolist()}
        first = last
    return found, restarted


def blocks(config: UnboundedConfig, num_slots: int, num_blocks: int) -> list[KeyMap]:
    """Maps of as many blocks of sets."""
    sets = np.array_split(np.arange(-(-num_slots // WAYS)), num_blocks)
    ends = [min((int(each[-1]) + 1) * WAYS, num_slots) for each in sets]
    return [KeyMap(config, end - start) for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("evict", ["lru", "lfu"])
@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("evict_after_steps", [1, 6])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_decides_as_the_rules_say(evict: str, min_count: int, evict_after_steps: int, num_blocks: int) -> None:
    config = UnboundedConfig(evict=evict, min_count=min_count, evict_after_steps=evict_after_steps)  # type: ignore[arg-type]
    generator = np.random.default_rng(min_count * 10 + evict_after_steps)
    num_slots = 2 * WAYS + 21
    plain, parts = PlainMap(config, num_slots), blocks(config, num_slots, num_blocks)
    passed, shared = 0, 0
    for batch in stream(generator, steps=40, num_keys=300, drift=9):
        expected, restarted = plain.admit(batch)
        assert admit(parts, batch, num_slots) == (expected, restarted)
        passed, shared = passed + len(restarted), shared + len(batch) - len(expected)
    # The stream asks for every decision there is.
    assert passed > 20
    assert shared > 20 or (min_count, evict_after_steps) == (1, 1)


def test_changes_make_another_map_equal() -> None:
    """A map that only hears what changed is, after every batch, the one that decided."""
    config, num_slots = UnboundedConfig(min_count=2), 100
    ahead, trained = KeyMap(config, num_slots), KeyMap(config, num_slots)
    for batch in stream(np.random.default_rng(0), steps=25, num_keys=200, drift=5):
        keys = torch.tensor(sorted(batch), dtype=torch.int64)
        counts = torch.tensor([batch[key] for key in keys.tolist()])
        trained.apply(ahead.admit(keys, slots_of(keys, num_slots) // WAYS, counts).change)
        assert trained.now == ahead.now
        for mine, theirs in ((trained.rows, ahead.rows), (trained.waiting, ahead.waiting)):
            for part in ("keys", "counts", "last"):
                assert torch.equal(getattr(mine, part), getattr(theirs, part))


def test_looking_up_changes_nothing_and_knows_who_has_a_row() -> None:
    config, num_slots = UnboundedConfig(), 2 * WAYS
    made = KeyMap(config, num_slots)
    keys = torch.arange(-50, 50)[torch.arange(-50, 50) != UNKNOWN_KEY]
    sets = slots_of(keys, num_slots) // WAYS
    rows = made.admit(keys, sets, torch.ones_like(keys)).rows
    strangers = keys + 1000
    before = made.rows.keys.clone()
    assert torch.equal(made.find(keys, sets), rows)
    assert (made.find(strangers, slots_of(strangers, num_slots) // WAYS) == -1).all()
    assert torch.equal(made.rows.keys, before)
    assert len(set(rows.tolist())) == len(keys)


def test_a_set_full_of_keys_of_one_batch_shares_the_rest() -> None:
    """No row is taken from a key that the batch looks up: those that find none wait for another batch."""
    made = KeyMap(UnboundedConfig(), WAYS)
    keys = torch.arange(1, WAYS + 11)
    counts = torch.where(keys > 10, 2, 1)
    first = made.admit(keys, torch.zeros_like(keys), counts)
    assert (first.rows >= 0).tolist() == (keys > 10).tolist()
    assert len(first.restarted) == 0
    second = made.admit(keys[:10], torch.zeros(10, dtype=torch.int64), counts[:10])
    assert (second.rows >= 0).all()
    assert sorted(second.restarted.tolist()) == sorted(second.rows.tolist())
