"""Tables of unbounded ids: any 64-bit key is looked up, and all ranks together turn it into a row.

    keys of a training batch, in host memory -> admit -> rows        a step ahead or two, as batches are pulled
    before the forward pass of that batch    -> begin_step           the map is what it was trained with; rows that
                                                                     passed to another key begin anew
    keys of an evaluation                    -> find  -> rows        nothing is admitted, nothing evicted

Each rank holds a block of each map's sets (`embeddings.lookups.key_map`), and all others ask it for the keys that fall
into these.  A map depends on the global batches alone, so it is the same for any number of ranks and any plan.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard

from embeddings.config import TableConfig
from embeddings.kinds.row_wise import row_blocks
from embeddings.lookups.key_map import SHARED_ROW, UNKNOWN_KEY, WAYS, Admission, Change, KeyMap, slots_of
from embeddings.optimizers import TableOptimizers
from embeddings.rows.initial import refill
from embeddings.tables import Tables, local_blocks, table_weights

Ids = Callable[[str], Tensor]
"""From a feature's name to its ids, [ids] int64 in host memory."""
_NAMES = {"keys": "keys", "counts": "counts", "last": "last_used"}


class UnboundedTables:
    """The maps of all tables of unbounded ids of a sharded model.  All ranks call `admit` and `find` together."""

    def __init__(self, tables: Tables, optimizers: TableOptimizers, *, seed: int, copies: int = 1) -> None:
        """`tables` are sharded already, and each batch is that of so many ranks; called by every rank."""
        configs = [config for config in tables.configs if config.unbounded is not None]
        group = dist.new_group(backend="gloo") if configs else None  # every rank
        self._maps = [_TableMap(config, group, copies) for config in configs]
        self._tables, self._optimizers, self._seed = tables, optimizers, seed
        self._rows: dict[str, _Rows] = {}

    def admit(self, ids: Ids) -> dict[str, Tensor]:
        """The rows of a training batch's keys, by feature; the batch's `begin_step` must follow."""
        return {name: rows for each in self._maps for name, rows in each.admit(ids).items()}

    def find(self, ids: Ids) -> dict[str, Tensor]:
        """The rows that keys have in the map that the tables were trained with, by feature; no map changes."""
        return {name: rows for each in self._maps for name, rows in each.find(ids).items()}

    def begin_step(self) -> None:
        """Before the oldest admitted batch is looked up in training."""
        for each in self._maps:
            restarted = each.begin_step()
            if len(restarted):
                self._rows_of(each.config).restart(restarted, self._seed)

    def forget_flight(self) -> None:
        """Batches that were admitted and not begun are not trained on: a run begins, or goes back."""
        for each in self._maps:
            each.forget_flight()

    def state(self) -> dict[str, Tensor | ShardedTensor]:
        """What a checkpoint stores, as TABLE/PART; shares memory with the maps that the tables were trained with."""
        return {f"{each.config.name}/{name}": part for each in self._maps for name, part in each.state().items()}

    def _rows_of(self, config: TableConfig) -> "_Rows":
        if config.name not in self._rows:
            self._rows[config.name] = _Rows(config, self._tables, self._optimizers)
        return self._rows[config.name]


class _TableMap:
    """The map of one table, and this rank's block of it."""

    def __init__(self, config: TableConfig, group: dist.ProcessGroup | None, copies: int) -> None:
        assert config.unbounded is not None
        self.config, self._group, self._copies = config, group, copies
        self._waits = config.unbounded.min_count > 1
        self._num_slots = config.num_embeddings - 1
        sets = row_blocks(-(-self._num_slots // WAYS), dist.get_world_size(group))
        self._blocks = [
            range(min(block.start * WAYS, self._num_slots), min(block.stop * WAYS, self._num_slots)) for block in sets
        ]
        self._block = self._blocks[dist.get_rank(group)]
        self._ahead, self._trained = (KeyMap(config.unbounded, len(self._block)) for _ in range(2))
        self._flight: deque[tuple[Change, Tensor]] = deque()

    def admit(self, ids: Ids) -> dict[str, Tensor]:
        """See `UnboundedTables.admit`."""
        found: list[Admission] = []

        def answer(keys: Tensor, sets: Tensor, counts: Tensor) -> Tensor:
            found.append(self._ahead.admit(keys, sets, counts))
            return found[0].rows

        rows = self._ask(ids, answer)
        restarted = found[0].restarted + self._block.start + 1
        everywhere = torch.cat(_exchange([restarted] * len(self._blocks), self._group))
        self._flight.append((found[0].change, everywhere))
        return rows

    def find(self, ids: Ids) -> dict[str, Tensor]:
        """See `UnboundedTables.find`."""
        return self._ask(ids, lambda keys, sets, counts: self._trained.find(keys, sets))

    def begin_step(self) -> Tensor:
        """Let the map become that of the oldest batch in flight; returns the rows that begin anew."""
        change, restarted = self._flight.popleft()
        self._trained.apply(change)
        return restarted

    def forget_flight(self) -> None:
        """See `UnboundedTables.forget_flight`."""
        self._flight.clear()
        self._ahead.copy_(self._trained)

    def state(self) -> dict[str, Tensor | ShardedTensor]:
        """The map that the table was trained with, [slots] a part, and its time."""
        state: dict[str, Tensor | ShardedTensor] = {"now": self._trained.now}
        of_rows, waiting = self._trained.rows, self._trained.waiting
        for field, name in _NAMES.items():
            state[name] = self._sharded(getattr(of_rows, field))
            if self._waits:
                state[f"waiting_{name}"] = self._sharded(getattr(waiting, field))
        return state

    def _ask(self, ids: Ids, answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """The rows of all features' keys.  `answer` turns (distinct keys, their sets, lookups of all ranks) of this
        rank's block into slots, both counted from its first, -1 for the shared row."""
        asked = {name: ids(name) for name in self.config.features}
        keys, place, counts = torch.unique(torch.cat(list(asked.values())), return_inverse=True, return_counts=True)
        slots, starts = slots_of(keys, self._num_slots), torch.tensor([block.stop for block in self._blocks])
        owner = torch.searchsorted(starts, slots, right=True)
        owner[keys == UNKNOWN_KEY] = len(self._blocks)
        parts = [(owner == rank).nonzero().view(-1) for rank in range(len(self._blocks))]
        received = _exchange([torch.stack([keys[part], counts[part]], 1).view(-1) for part in parts], self._group)
        theirs = torch.cat(received).view(-1, 2)
        distinct, which = torch.unique(theirs[:, 0], return_inverse=True)
        lookups = torch.zeros_like(distinct).index_add_(0, which, theirs[:, 1]) // self._copies
        sets = slots_of(distinct, self._num_slots) // WAYS - self._block.start // WAYS
        found = answer(distinct, sets, lookups)
        rows = torch.where(found >= 0, found + self._block.start + 1, SHARED_ROW)[which]
        answers = _exchange(torch.split(rows, [len(part) // 2 for part in received]), self._group)
        of_keys = torch.full_like(keys, SHARED_ROW)
        of_keys[torch.cat(parts)] = torch.cat(answers)
        return dict(zip(asked, torch.split(of_keys[place], [len(each) for each in asked.values()]), strict=True))

    def _sharded(self, part: Tensor) -> ShardedTensor:
        shards = {
            rank: ShardMetadata([block.start], [len(block)], f"rank:{rank}/cpu")
            for rank, block in enumerate(self._blocks)
            if block
        }
        rank = dist.get_rank(self._group)
        mine = [Shard(part[: len(self._block)], shards[rank])] if self._block else []
        size, properties = torch.Size([self._num_slots]), TensorProperties(dtype=part.dtype)
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            mine, ShardedTensorMetadata(list(shards.values()), size, properties), process_group=self._group
        )


class _Rows:
    """This rank's parts of a table and of its optimizer's state."""

    def __init__(self, config: TableConfig, tables: Tables, optimizers: TableOptimizers) -> None:
        self._config = config
        weights = table_weights(tables)
        self._weights = list(local_blocks(weights[config.name])) if config.name in weights else []
        self._state = [
            (first, block)
            for name, value in optimizers.state().items()
            if name.startswith(f"{config.name}/")
            for first, _, block in local_blocks(value)
            # Adam's step counter belongs to the table, not to a row, and has no dims.
            if block.dim()
        ]

    def restart(self, rows: Tensor, seed: int) -> None:
        """Give rows their initial values, and no past."""
        for first, first_column, block in self._weights:
            refill(block, _within(rows, first, block), self._config, first, first_column, seed=seed)
        for first, block in self._state:
            block.index_fill_(0, _within(rows, first, block), 0)


def _within(rows: Tensor, first: int, block: Tensor) -> Tensor:
    """The `rows` that lie in a block which begins at row `first`, counted from there, on the block's device."""
    return (rows[(rows >= first) & (rows < first + len(block))] - first).to(block.device)


def _exchange(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Send `parts[rank]`, [any] int64, to each rank; returns what they sent here.  Called by every rank."""
    sizes, theirs = torch.tensor([len(part) for part in parts]), torch.empty(len(parts), dtype=torch.int64)
    dist.all_to_all_single(theirs, sizes, group=group)  # every rank
    received = torch.empty(int(theirs.sum()), dtype=torch.int64)
    dist.all_to_all_single(received, torch.cat(list(parts)), theirs.tolist(), sizes.tolist(), group=group)  # every rank
    return list(torch.split(received, theirs.tolist()))
