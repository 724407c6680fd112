"""What ranks send each other for lookups: each id once, and rows and gradients in fewer bytes, as the settings say.

A sharded lookup is an exchange of ids, one of rows the same way back, and one of the rows' gradients.  TorchRec has a
place for both savings: an id's other places are filled from its one row after the exchange, whose gradient is the sum
of theirs before it is sent; and codecs stand around the exchanges of rows.  Its own way to find distinct ids needs a
GPU, and its codecs take float16 for bfloat16 on a CPU, so these are ours.
"""

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.types import CommOp, ModuleSharder, ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.config import ExchangeConfig
from embeddings.lookups.partial_sums import PooledTableSharder
from embeddings.tables import let_empty_kernels_run

_IDS_OF_A_TABLE = 2**40
"""Distance of two tables' ids when they are sorted together; an id that is in no table stays so."""


def table_sharders(exchange: ExchangeConfig) -> list[ModuleSharder[Any]]:
    """What shards collections: sequences exchange as `exchange` says, pooled ones send all ids and sums in full."""
    return [TableSharder(exchange), PooledTableSharder()]


class TableSharder(EmbeddingCollectionSharder):
    """Shards collections so that they exchange as an `ExchangeConfig` says."""

    def __init__(self, exchange: ExchangeConfig) -> None:
        types = (exchange.rows, exchange.gradients)
        self._given_as: torch.dtype = getattr(torch, exchange.given_as)
        codecs = QuantizedCommCodecs(*(Codec(getattr(torch, name), self._given_as) for name in types))
        in_full = types == ("float32", "float32")
        registry = None if in_full else {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: codecs}
        super().__init__(qcomm_codecs_registry=registry)
        self._deduplicate = exchange.deduplicate

    def shard(
        self,
        module: Any,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        """The sharded collection."""
        kind = DeduplicatedCollection if self._deduplicate else ShardedEmbeddingCollection
        # FBGEMM's kernels for CPUs write no bfloat16: there values are rounded when they are sent.
        narrow = self._given_as == torch.bfloat16 and device is not None and device.type == "cuda"
        sharded = kind(
            module,
            params,
            env,
            {**(self.fused_params or {}), **({"output_dtype": SparseType.BF16} if narrow else {})},
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._deduplicate,
            module_fqn=module_fqn,
        )
        let_empty_kernels_run(sharded)
        return sharded


class DeduplicatedCollection(ShardedEmbeddingCollection):
    """Sends each of a rank's distinct ids once."""

    def _create_hash_size_info(self, feature_names: list[str], ctx: object = None) -> None:
        """Called once, before the first exchange: which features each sharding has of which table."""
        del feature_names, ctx
        self._features_of_tables = [
            [table.num_features() for table in sharding.embedding_tables()]
            for sharding in self._sharding_type_to_sharding.values()
        ]

    def _dedup_indices(self, ctx: Any, input_feature_splits: list[KeyedJaggedTensor]) -> list[KeyedJaggedTensor]:
        """Called for each batch, with the features of each sharding; TorchRec undoes it by what `ctx` then holds."""
        found = []
        for features, of_tables in zip(input_feature_splits, self._features_of_tables, strict=True):
            lengths = features.lengths().view(len(features.keys()), -1)
            ids, lengths, places = distinct_ids(features.values(), lengths, of_tables)
            ctx.input_features.append(features)
            ctx.reverse_indices.append(places)
            found.append(KeyedJaggedTensor(features.keys(), ids, lengths=lengths.view(-1)))
        return found


def distinct_ids(ids: Tensor, lengths: Tensor, features_of_tables: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Each table's distinct ids, in ascending order, and where each of `ids` is among them.

    Args:
        ids: [n] int64, feature by feature.
        lengths: [features, bags], how many of them each bag of each feature has.
        features_of_tables: How many features each table has; a table's are neighbours.

    Returns:
        [m] the distinct ids, table by table; [features, bags] lengths that spread a table's evenly over the bags of its
        features, since a lookup kernel gives a bag to a warp; [n] the place of each of `ids` among them.
    """
    device, (num_features, bags) = ids.device, lengths.shape
    counts = torch.tensor(features_of_tables, device=device)
    tables = torch.arange(len(features_of_tables), device=device)
    table_of_feature = tables.repeat_interleave(counts, output_size=num_features)
    table_of_id = table_of_feature.repeat_interleave(lengths.sum(dim=1), output_size=ids.numel())
    found, places = torch.unique(table_of_id * _IDS_OF_A_TABLE + ids, return_inverse=True)
    ends = torch.searchsorted(found, (tables + 1) * _IDS_OF_A_TABLE)
    per_table = ends.diff(prepend=ends.new_zeros(1))
    bags_of_table = counts * bags
    firsts = bags_of_table.cumsum(0) - bags_of_table
    table_of_bag = table_of_feature.repeat_interleave(bags)
    place_of_bag = torch.arange(num_features * bags, device=device) - firsts[table_of_bag]
    each, rest = per_table // bags_of_table, per_table % bags_of_table
    spread = each[table_of_bag] + (place_of_bag < rest[table_of_bag])
    return found % _IDS_OF_A_TABLE, spread.view(num_features, bags).to(lengths.dtype), places


class Codec:
    """Values as another type on their way; TorchRec's `QuantizedCommCodec`.

    They travel as bytes, because gloo knows no bfloat16.
    """

    def __init__(self, dtype: torch.dtype, given_as: torch.dtype) -> None:
        """`dtype` on the way, `given_as` at its end."""
        self._dtype, self._given_as = dtype, given_as

    def encode(self, input_tensor: Tensor, ctx: None = None) -> Tensor:
        """[n] float32 or bfloat16 -> [n x size of a value] uint8."""
        return input_tensor.contiguous().view(-1).to(self._dtype).view(torch.uint8)

    def decode(self, input_grad: Tensor, ctx: None = None) -> Tensor:
        """The inverse of `encode`, in the type that the values are given as."""
        return input_grad.view(self._dtype).to(self._given_as)

    @property
    def quantized_dtype(self) -> torch.dtype:
        """Type of what `encode` returns."""
        return torch.uint8

    def calc_quantized_size(self, input_len: int, ctx: None = None) -> int:
        """Elements that `encode` makes of so many."""
        return input_len * self._dtype.itemsize

    def create_context(self) -> None:
        """Nothing needs to be carried from `encode` to `decode`."""
