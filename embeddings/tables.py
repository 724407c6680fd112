"""From table configs to TorchRec collections: structure, fused optimizer and initial values.

The collection is an ordinary single-process module; sharding happens outside, from a plan.  Initial values are a pure
function of (seed, table name, row, column), so they depend neither on the plan, nor on the number of ranks, nor on the
device.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from embeddings.config import SparseOptimizerConfig, TableConfig

DEFAULT_EPS = 1e-8
INIT_CHUNK_ELEMENTS = 1 << 17

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def build_embedding_collection(tables: Sequence[TableConfig], *, device: torch.device) -> EmbeddingCollection:
    """One TorchRec collection of `tables`; on the meta device it has no storage and is ready to be sharded.

    Raises:
        ValueError: no table, a name or feature used twice, or tables of different embedding_dim.
    """
    _check_tables(tables)
    configs = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.features),
        )
        for table in tables
    ]
    return EmbeddingCollection(tables=configs, device=device)


def apply_sparse_optimizer(collection: EmbeddingCollection, config: SparseOptimizerConfig) -> None:
    """Attach the optimizer to every table.  Sharding turns it into FBGEMM's fused one, which runs in the backward pass.

    Call it before the tables are sharded, once.
    """
    kwargs: dict[str, Any] = {"lr": config.learning_rate}
    if config.kind != "sgd":
        kwargs["eps"] = DEFAULT_EPS if config.eps is None else config.eps
    _apply_optimizer_in_backward(_OPTIMIZERS[config.kind], collection.parameters(), kwargs)


def init_tables(model: nn.Module, tables: Sequence[TableConfig], seed: int) -> None:
    """Fill every local shard of `tables` in `model`, sharded or not, with uniform values in +-1/sqrt(embedding_dim).

    No communication; each rank writes the rows it holds.  Extra memory is bounded by a few chunks.

    Raises:
        ValueError: `model` holds a table that `tables` does not list, or no table at all.
    """
    by_name = {table.name: table for table in tables}
    num_collections = 0
    for collection in _collections(model):
        num_collections += 1
        for key, value in collection.state_dict().items():
            name = key.removeprefix("embeddings.").removesuffix(".weight")
            if name not in by_name:
                raise ValueError(f"the model holds table {name!r}, which is not among {sorted(by_name)}")
            for first_row, shard in _local_shards(value):
                _fill_rows(shard, by_name[name], first_row=first_row, seed=seed)
    if not num_collections:
        raise ValueError("the model holds no embedding collection: there is nothing to initialise")


def _check_tables(tables: Sequence[TableConfig]) -> None:
    if not tables:
        raise ValueError("an embedding collection needs at least one table")
    for kind, names in (
        ("table name", [table.name for table in tables]),
        ("feature", [feature for table in tables for feature in table.features]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{kind} {twice[0]!r} is used twice: names and features must be unique in a collection")
    dims = {table.name: table.embedding_dim for table in tables}
    if len(set(dims.values())) > 1:
        raise ValueError(f"all tables of a collection share one embedding_dim, got {dims}")


def _collections(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (EmbeddingCollection, ShardedEmbeddingCollection)):
            yield module


def _local_shards(value: Tensor | ShardedTensor) -> Iterator[tuple[int, Tensor]]:
    """(first global row, local rows) of one table; the tensors share memory with the table.  Shards hold whole rows."""
    if not isinstance(value, ShardedTensor):
        yield 0, value.detach()
        return
    for shard in value.local_shards():
        assert shard.metadata.shard_offsets[1] == 0, "column-wise shards are not planned"
        yield shard.metadata.shard_offsets[0], shard.tensor.detach()


def _fill_rows(rows: Tensor, table: TableConfig, *, first_row: int, seed: int) -> None:
    """Write the initial values of global rows [first_row, first_row + len(rows)) into `rows`, chunk by chunk."""
    digest = hashlib.blake2b(f"{seed}/{table.name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    bound = table.embedding_dim**-0.5
    chunk_rows = max(1, INIT_CHUNK_ELEMENTS // table.embedding_dim)
    for start in range(0, len(rows), chunk_rows):
        chunk = rows[start : start + chunk_rows]
        first = (first_row + start) * table.embedding_dim
        counter = torch.arange(first, first + chunk.numel(), device=rows.device)
        # Exact in float32, so that every device writes the same bits: 24 random bits, scaled by a power of two.
        unit = _random_bits(counter, key).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF).to(torch.float32)
        unit.mul_(2.0**-23).sub_(1.0).mul_(bound)
        chunk.copy_(unit.view_as(chunk))


def _random_bits(counter: Tensor, key: int) -> Tensor:
    """The splitmix64 generator at positions `counter` of stream `key`, in int64 that wraps; overwrites `counter`."""
    bits = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits.bitwise_xor_(_logical_right_shift(bits, shift)).mul_(_signed(factor))
    return bits.bitwise_xor_(_logical_right_shift(bits, 31))


def _logical_right_shift(bits: Tensor, shift: int) -> Tensor:
    """Zeros enter at the top; torch's shift of a signed integer repeats the sign bit."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
