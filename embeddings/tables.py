"""From table configs to TorchRec collections: structure and initial values.

`Tables` is an ordinary single-process module; sharding happens outside, from a plan.  Initial values are a pure
function of (seed, table name, row, column), so they depend neither on the plan, nor on the number of ranks, nor on the
device.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyAwaitable
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embeddings.config import TableConfig
from embeddings.rows.initial import fill

_DATA_TYPES = {"float32": DataType.FP32, "float16": DataType.FP16}

Rows = dict[str, JaggedTensor]
"""Feature -> the rows of its ids, whatever the table's type in float32, or bfloat16 where `placement.exchange` says so;
values are [number of ids, embedding_dim] or, of a pooled table, [number of bags, embedding_dim] sums in float32."""
Bags = Mapping[tuple[str, ...], KeyedJaggedTensor]
"""The ids of these features, of as many bags each."""
NO_BAGS: Bags = {}
Collection = Any
"""Tables that are looked up together: TorchRec's EmbeddingCollection or, of pooled ones, EmbeddingBagCollection."""


class Tables(nn.Module):
    """All tables of a model: one TorchRec collection for each width, for tables that are frozen or not, and for what
    pooled ones are summed into.

    Rows of frozen tables are looked up without gradients, so FBGEMM's update, which runs in the backward pass, never
    sees them.

    TorchRec's train pipeline traces the model's `forward` up to the collections, so what comes after them, joining
    their results included, belongs into a module of its own: `self.tower(self.tables(batch.features), batch)`.
    """

    def __init__(self, configs: Sequence[TableConfig], collections: Iterable[Collection]) -> None:
        super().__init__()
        self.configs = tuple(configs)
        self.hold(collections)

    def hold(self, collections: Iterable[Collection]) -> None:
        """Look up in these from now on; the tables of one are all frozen or none, all pooled alike or none."""
        held = list(collections)
        # Any: sharding puts TorchRec's sharded collections in their places.
        self.collections: Any = nn.ModuleList(held)
        frozen = {config.name for config in self.configs if config.frozen}
        self._frozen = [all(name in frozen for name in modules_by_table(collection)) for collection in held]
        self._bagged = [_bagged_features(collection) for collection in held]
        for collection, of_frozen in zip(held, self._frozen, strict=True):
            # One that is to be sharded is given its optimizer all the same, whose state stays in checkpoints.
            if of_frozen and collection.device.type != "meta":
                collection.requires_grad_(False)

    def forward(self, features: KeyedJaggedTensor, bags: Bags = NO_BAGS) -> list[Any]:
        """The rows of every feature, collection by collection, in no stated order (`rows_by_feature` joins them).

        `features` may hold keys that no table looks up; of pooled tables `bags` has what is summed.
        """
        looked_up = []
        for collection, frozen, bagged in zip(self.collections, self._frozen, self._bagged, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                looked_up.append(collection(features if bagged is None else bags[bagged]))
        return looked_up


def rows_by_feature(looked_up: Sequence[Any]) -> Rows:
    """What `Tables` returns as one dictionary."""
    rows: Rows = {}
    for of_collection in looked_up:
        # Two heads ask for them: TorchRec keeps here what has been waited for, which cannot be done twice.
        found = LazyAwaitable._wait_async(of_collection)
        if isinstance(found, KeyedTensor):
            # Nobody reads the lengths of sums.
            none = torch.zeros(0, dtype=torch.long, device=found.device())
            found = {feature: JaggedTensor(sums, lengths=none) for feature, sums in found.to_dict().items()}
        rows |= found
    return rows


def build_tables(configs: Sequence[TableConfig], *, device: torch.device) -> Tables:
    """The tables on `device`; on the meta device they have no storage and are ready to be sharded.

    Raises:
        ValueError: no table, or a name or feature used twice.
    """
    _check_tables(configs)
    groups: dict[Group, list[TableConfig]] = {}
    for config in configs:
        groups.setdefault(group_of(config), []).append(config)
    return Tables(configs, [build_embedding_collection(group, device=device) for group in groups.values()])


Group = tuple[int, bool, str | None]


def group_of(config: TableConfig) -> Group:
    """Tables that share it may be looked up together."""
    return config.embedding_dim, config.frozen, config.pooled


def build_embedding_collection(configs: Sequence[TableConfig], *, device: torch.device) -> Collection:
    """One TorchRec collection of tables of one group."""

    def arguments(config: TableConfig) -> dict[str, Any]:
        return {
            "name": config.name,
            "num_embeddings": config.num_embeddings,
            "embedding_dim": config.embedding_dim,
            "feature_names": list(config.features),
            "data_type": _DATA_TYPES[config.dtype],
        }

    if configs[0].pooled is None:
        return EmbeddingCollection(tables=[EmbeddingConfig(**arguments(config)) for config in configs], device=device)
    # A row-wise shard's mean would be over its own rows alone: what takes means divides sums.
    bags = [EmbeddingBagConfig(**arguments(config), pooling=PoolingType.SUM) for config in configs]
    return EmbeddingBagCollection(tables=bags, device=device)


def modules_by_table(collection: Collection) -> dict[str, Any]:
    """The module that holds each table's `weight`."""
    bags = isinstance(collection, EmbeddingBagCollection)
    return dict((collection.embedding_bags if bags else collection.embeddings).items())


def _bagged_features(collection: Collection) -> tuple[str, ...] | None:
    if not isinstance(collection, EmbeddingBagCollection):
        return None
    return tuple(name for config in collection.embedding_bag_configs() for name in config.feature_names)


def init_tables(tables: Tables, seed: int) -> None:
    """Fill every local shard of `tables`, sharded or not, with uniform values in +-1/sqrt(embedding_dim).

    No communication; each rank writes the rows it holds.  Extra memory is bounded by a few chunks.
    """
    by_name = {config.name: config for config in tables.configs}
    for name, value in table_weights(tables).items():
        for first_row, first_column, block in local_blocks(value):
            fill(block, by_name[name], first_row, first_column, seed=seed)


def table_weights(tables: Tables) -> dict[str, Tensor | ShardedTensor]:
    """The values of each table of which this rank holds a part, as checkpoints store them: under the table's name.

    That name depends neither on the plan nor on the module, and the values share memory with the live tables, so
    PyTorch's distributed checkpoint (DCP) saves them on some ranks and loads them on others.  A rank without a shard
    of a table may lack its name: DCP copes, a loop over the names around a collective hangs.  Rows cached on the device
    are written back first; there is no communication.
    """
    return {
        table_name(key): value for collection in tables.collections for key, value in collection.state_dict().items()
    }


def is_sharded(collection: nn.Module) -> bool:
    """Whether TorchRec has sharded a collection of `Tables`."""
    return isinstance(collection, ShardedEmbeddingCollection | ShardedEmbeddingBagCollection)


def fbgemm_kernels(collection: Any) -> Iterator[Any]:
    """FBGEMM's kernels of a collection, none if it is not sharded.  Any: what TorchRec and FBGEMM hold has no types."""
    for lookup in collection._lookups if is_sharded(collection) else ():
        for module in lookup.modules():
            if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
                yield module


def let_empty_kernels_run(collection: nn.Module) -> None:
    """Give every FBGEMM kernel on a CPU that holds no value one that nobody reads, and an end to its numbers of rows.

    By its values a kernel tells whether it runs on a CPU.  A rank has a kernel without any where all its tables have
    fewer rows than there are ranks: it would take itself for a GPU's and fail in its first lookup.  Its update looks
    behind a table without rows for the next one that has some, and behind the last table reads memory that is not its.
    """
    for kernel in fbgemm_kernels(collection):
        if not kernel.use_cpu:
            continue
        if not kernel.weights_host.numel():
            kernel.weights_host = nn.Parameter(kernel.weights_host.new_zeros(1))
        rows_before = kernel.hash_size_cumsum
        kernel.hash_size_cumsum = torch.cat([rows_before, rows_before[-1:] + 1])


def table_name(key: str) -> str:
    """`embeddings.TABLE.weight`, as collections name their tables, -> TABLE; table names hold no dot."""
    return key.split(".")[-2]


def _check_tables(configs: Sequence[TableConfig]) -> None:
    if not configs:
        raise ValueError("a model needs at least one table")
    for kind, names in (
        ("table name", [config.name for config in configs]),
        ("feature", [feature for config in configs for feature in config.features]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{kind} {twice[0]!r} is used twice: names and features must be unique in a model")


def local_blocks(value: Tensor | ShardedTensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first global row, first column, values) of each local block of a table or of its optimizer's state, whose memory
    they share."""
    if not isinstance(value, ShardedTensor):
        yield 0, 0, value.detach()
        return
    for shard in value.local_shards():
        first_row, *columns = shard.metadata.shard_offsets
        yield first_row, sum(columns), shard.tensor.detach()
