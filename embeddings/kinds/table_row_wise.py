"""A pooled table's rows cut over the ranks of one node."""

from embeddings.config import TableConfig
from embeddings.kinds.kind import FLOAT_BYTES, ID_BYTES, Blocks, ShardCost, Work, buffer_bytes, lookup_ms, stored
from embeddings.kinds.row_wise import COPY, RowWise, equal_blocks
from embeddings.machine import Machine


class TableRowWise(RowWise):
    """Heavy pooled tables: parts of sums are added up within the node, and one sum a bag leaves it."""

    name = "table_row_wise"
    everywhere = False
    on_nodes = True
    of_one_rank = "table_wise"
    """What it would be where a node has one rank."""

    def refusal(self, work: Work) -> str | None:
        """TorchRec has it for sums alone, and it takes several nodes of several ranks."""
        machine = work.machine
        if work.table.pooled is None:
            return "TorchRec has it for pooled tables alone: take row_wise, or pooled=true for it"
        if machine.local_world_size == machine.world_size:
            return "there is one node, where row_wise is the same: take it"
        if machine.local_world_size == 1:
            return f"a node has one rank, where {self.of_one_rank} is the same: take it"
        return None

    def cuts(self, table: TableConfig, machine: Machine) -> list[tuple[Blocks, ...]]:
        """One way: as many blocks as a node has ranks."""
        return [equal_blocks(table, machine.local_world_size)]

    def cost(self, work: Work, block: Blocks) -> ShardCost:
        """Ids of all ranks' bags; a part of every bag's sum within the node, and a sum for each of some of them to
        every node, with their gradients back."""
        machine, columns, bags = work.machine, block.num_columns, work.vectors
        ids = work.exchanged_ids * machine.world_size * block.num_rows / work.table.num_embeddings
        vectors, sum_bytes = bags * machine.world_size, columns * work.exchange.value_bytes
        within = vectors * sum_bytes / machine.effective_rates.within_node
        across = bags * machine.num_nodes * sum_bytes / machine.network_rate
        copied_ms = vectors * columns * FLOAT_BYTES * COPY / work.device_bytes_per_ms
        ms = lookup_ms(work, ids, vectors, columns) + (within + across) / 1e6 + copied_ms
        return stored(work, block, buffer_bytes(work, ids, vectors, columns), ms)

    def sent_bytes(self, work: Work, num_blocks: int) -> float:
        """All ids to each node with blocks; of each bag's sum a part from every rank of a node, and the sum."""
        parts = work.machine.local_world_size
        nodes = num_blocks // parts
        return nodes * work.exchanged_ids * ID_BYTES + (parts + 1) * work.vectors * work.exchanged_row_bytes
