"""All sharding kinds, by name.  A new one is a file beside this one and a line here."""

from embeddings.kinds.column_wise import ColumnWise
from embeddings.kinds.grid_shard import GridShard
from embeddings.kinds.kind import ShardingKind
from embeddings.kinds.replicated import Replicated
from embeddings.kinds.row_wise import RowWise
from embeddings.kinds.table_row_wise import TableRowWise
from embeddings.kinds.table_wise import TableWise

KINDS: dict[str, ShardingKind] = {
    kind.name: kind for kind in (TableWise(), RowWise(), TableRowWise(), ColumnWise(), GridShard(), Replicated())
}


def kind_named(name: str) -> ShardingKind:
    """The kind of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"there is no sharding type {name!r}: known are {', '.join(KINDS)}")
    return KINDS[name]
