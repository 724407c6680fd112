"""The tables' state for checkpoints: weights and fused optimizer state, under names that do not depend on the plan.

Names are `TABLE` for weights and `TABLE/STATE` (`item/momentum1`) for optimizer state, whatever module holds a table
and however it is sharded, so PyTorch's distributed checkpoint (DCP) can save them on some ranks and load them on
others.  Values are ShardedTensors that share memory with the live tables: loading into them loads the model.

A rank without a shard of a table may lack that table's names.  DCP copes; a loop over the names around a collective
hangs.
"""

from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection

TablesState = dict[str, ShardedTensor]


def tables_state(model: nn.Module) -> TablesState:
    """The weights of every sharded table in `model`.

    Rows cached on the device are written back first; there is no communication.

    Raises:
        ValueError: `model` holds no sharded collection, or two with a table of the same name.
    """
    state: TablesState = {}
    for collection in _sharded_collections(model):
        for key, value in collection.state_dict().items():
            _add(state, _table_name(key), value)
    return state


def optimizer_state(model: nn.Module) -> TablesState:
    """The fused optimizer's tensors of every sharded table in `model`; plain SGD has none.  No communication.

    Raises:
        ValueError: `model` holds no sharded collection, or two with a table of the same name.
    """
    state: TablesState = {}
    for collection in _sharded_collections(model):
        for key, slots in collection.fused_optimizer.state_dict()["state"].items():
            table = _table_name(key)
            for slot, value in slots.items():
                # FBGEMM's name of the slot comes with the table in front: item.momentum1
                _add(state, f"{table}/{slot.removeprefix(table + '.')}", value)
    return state


def _sharded_collections(model: nn.Module) -> list[ShardedEmbeddingCollection]:
    collections = [module for module in model.modules() if isinstance(module, ShardedEmbeddingCollection)]
    if not collections:
        raise ValueError(
            "the model holds no sharded embedding collection: shard it before asking for its tables' state"
        )
    return collections


def _table_name(key: str) -> str:
    """`embeddings.TABLE.weight` -> TABLE; table names hold no dot."""
    return key.split(".")[-2]


def _add(state: TablesState, name: str, value: ShardedTensor) -> None:
    if name in state:
        raise ValueError(
            f"two collections hold a table named {name.split('/')[0]!r}: table names are unique in a model"
        )
    assert isinstance(value, ShardedTensor), f"{name} is a {type(value).__name__}"
    state[name] = value
