"""A table whole on every rank: no exchange, but gradients of all its rows are added up over ranks."""

import math
from collections.abc import Sequence

from embeddings.config import TableConfig, state_bytes_per_row
from embeddings.kinds.kind import FLOAT_BYTES, Blocks, Shard, ShardCost, ShardingKind, Work, buffer_bytes, lookup_ms
from embeddings.machine import Machine

_ELEMENTWISE_PASSES = 9.22
"""Passes of an optimizer and its helpers over a dense table, as TorchRec measured."""
_GRADIENTS = 2
"""Copies of the gradients of all rows: that of the backward pass, and that which is added up over ranks."""


class Replicated(ShardingKind):
    """Small tables that are looked up often: countries, categories, actions.

    The table is an ordinary parameter, whose gradient is averaged over ranks, with an optimizer in plain PyTorch that
    changes rows without an id by nothing, so that training is the sharded table's.  TorchRec's own data_parallel fails
    for sequence lookups.
    """

    name = "replicated"
    everywhere = True
    sharded = False

    def refusal(self, work: Work) -> str | None:
        """Whatever would not train as a sharded table does."""
        if work.machine.world_size == 1:
            return "there is one rank: table_wise is the same without a dense gradient"
        if work.optimizer == "adam":
            return "Adam in plain PyTorch moves rows without an id too: take rowwise_adagrad, adagrad or sgd for it"
        if work.table.dtype != "float32":
            return f"gradients of {work.table.dtype} rows would be added up in {work.table.dtype}: take float32 for it"
        if work.kernel != "fused":
            return f"a replicated table has no kernel {work.kernel}: take fused"
        return None

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """The whole table for every rank."""
        return [(Blocks(machine.world_size, table.num_embeddings, table.embedding_dim),)]

    def shards(self, table: TableConfig, machine: Machine, ranks: Sequence[int]) -> tuple[Shard, ...]:
        """All rows and columns on every rank."""
        return tuple(Shard(rank, range(table.num_embeddings), range(table.embedding_dim)) for rank in ranks)

    def cost(self, work: Work, block: Blocks) -> ShardCost:
        """Lookups of the own samples at half the rate of a fused kernel, an all-reduce and the optimizer's passes."""
        machine, weights = work.machine, work.table.weight_bytes
        nodes = min(machine.world_size / machine.local_world_size, 2)
        reduced = weights * (2 * nodes - 1) / nodes
        if machine.world_size > 2 * machine.local_world_size:
            reduced *= 2
        # Each rank has a network card, and all send at once.
        reduce_ms = reduced / (machine.network_rate * machine.local_world_size * 1e6)
        update_ms = weights * _ELEMENTWISE_PASSES / (work.device_bytes_per_ms / 2)
        state = block.num_rows * state_bytes_per_row(work.optimizer, block.num_columns)
        vectors = work.ids if work.bags is None else work.bags
        gradients = _GRADIENTS * block.num_rows * block.num_columns * FLOAT_BYTES
        return ShardCost(
            ms=2 * lookup_ms(work, work.ids, vectors, block.num_columns) + reduce_ms + update_ms,
            weight_bytes=weights,
            optimizer_bytes=state,
            io_bytes=gradients + math.ceil(buffer_bytes(work, work.ids, vectors, block.num_columns)),
            host_bytes=0,
        )

    def sent_bytes(self, work: Work, num_blocks: int) -> float:
        """Nothing for its lookups: what ranks exchange is the gradient of all rows, with the dense model's."""
        del work, num_blocks
        return 0.0
