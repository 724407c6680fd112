"""Which rows training has changed: an id without such a row reads the row of the unknown id instead.

A row counts as trained where its optimizer's state is not zero.  So the marks are those of the state: saved with it,
resharded, grown and taken over with it, and rows that were only drawn are told from rows that were learnt.  Plain SGD
keeps no state, and all rows of its tables count as trained.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import TableConfig
from embeddings.optimizers import TableOptimizers
from embeddings.tables import Tables

UNKNOWN_ROW = 0
"""The row of the unknown id, in every table: ids that are missing, too rare, or were never trained on."""
TRAINED_ELSEWHERE = 1e-30
"""State of an optimizer by which a row counts as trained, though its steps are not known; the first update swallows so
small a number."""
CHUNK_ROWS = 1 << 26
"""Rows whose marks the ranks join at a time, a byte each; a multiple of 8."""


class TrainedRows:
    """The marks of all tables at one moment, whole on every rank: a bit a row, on the device of the ids."""

    def __init__(self, tables: Tables, optimizers: TableOptimizers, device: torch.device) -> None:
        """A collective: every rank marks the rows that it holds."""
        self._bits: dict[str, Tensor] = {}
        held = _held_states(optimizers)
        for table in tables.configs:
            bits = _joined_bits(table, held.get(table.name, []), device)
            if table.name in optimizers.stateless:
                bits.fill_(0xFF)
            self._bits |= dict.fromkeys(table.features, bits)

    def known(self, feature: str, ids: Tensor) -> Tensor:
        """[ids] bool: of ids that a feature looks up, those whose row is trained and not the unknown id's."""
        return _marked(self._bits[feature], ids) & (ids != UNKNOWN_ROW)

    def replace_unknown(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The ids to look up, with `UNKNOWN_ROW` for those without a trained row, where that row is trained itself."""
        values, counts = features.values(), features.length_per_key()
        replaced = [
            self._replaced(feature, ids) for feature, ids in zip(features.keys(), values.split(counts), strict=True)
        ]
        return KeyedJaggedTensor(
            features.keys(),
            torch.cat(replaced) if replaced else values,
            lengths=features.lengths(),
            length_per_key=counts,
        )

    def _replaced(self, feature: str, ids: Tensor) -> Tensor:
        if feature not in self._bits:
            return ids
        bits = self._bits[feature]
        # A row that nobody has trained says no more than the id's own.
        return torch.where(_marked(bits, ids) | ~_marked(bits, torch.full_like(ids[:1], UNKNOWN_ROW)), ids, UNKNOWN_ROW)


def _marked(bits: Tensor, ids: Tensor) -> Tensor:
    return (bits[ids >> 3] >> (ids & 7) & 1).bool()


def _held_states(optimizers: TableOptimizers) -> dict[str, list[tuple[int, Tensor]]]:
    """By table, (first row, state [rows, numbers]) of the blocks that this rank holds."""
    held: dict[str, list[tuple[int, Tensor]]] = {}
    for name, value in optimizers.state().items():
        for first_row, block in _blocks(value):
            held.setdefault(name.split("/")[0], []).append((first_row, block))
    return held


def _blocks(value: Tensor | ShardedTensor) -> Iterator[tuple[int, Tensor]]:
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            if shard.tensor.numel():
                yield shard.metadata.shard_offsets[0], shard.tensor.reshape(shard.metadata.shard_sizes[0], -1)
    elif value.dim():  # Adam's count of its steps belongs to no row.
        yield 0, value.reshape(len(value), -1)


def _joined_bits(table: TableConfig, held: list[tuple[int, Tensor]], device: torch.device) -> Tensor:
    """[bytes] uint8, bit i % 8 of byte i // 8 is row i's, of all ranks."""
    parts = []
    for start in range(0, table.num_embeddings, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, table.num_embeddings - start)
        marks = torch.zeros(-(-rows // 8) * 8, dtype=torch.uint8, device=device)
        for first_row, state in held:
            lo, hi = max(start, first_row), min(start + rows, first_row + len(state))
            if lo < hi:
                marks[lo - start : hi - start] |= (state[lo - first_row : hi - first_row] != 0).any(1).to(device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(marks, op=dist.ReduceOp.MAX)  # every rank
        places = torch.arange(8, dtype=torch.uint8, device=device)
        parts.append((marks.view(-1, 8) << places).sum(1, dtype=torch.uint8))
    return torch.cat(parts)
