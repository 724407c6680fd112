"""Pooled tables whose rows lie on several ranks: each of them adds up its own rows, then the bag's rank the parts.

TorchRec brings the parts together by a reduce-scatter, whose way back gathers the gradients of all ranks.  gloo refuses
that where ranks have different numbers of bags, and the order of adding up is the backend's.  Here the parts travel as
the sums of whole tables do, in TorchRec's all-to-all, which takes any numbers of bags on any backend, and are added up
in the order of the ranks.  As many bytes travel.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.dist_data import PooledEmbeddingsAllToAll
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import ParameterSharding, ShardingEnv

from embeddings.tables import let_empty_kernels_run


class PooledTableSharder(EmbeddingBagCollectionSharder):
    """Shards collections of pooled tables."""

    def shard(
        self,
        module: Any,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """The sharded collection."""
        sharded = PooledCollection(module, params, env, self.fused_params, device, module_fqn=module_fqn)
        let_empty_kernels_run(sharded)
        return sharded


class PooledCollection(ShardedEmbeddingBagCollection):
    """Adds up parts of sums as this module does."""

    @classmethod
    def create_embedding_bag_sharding(cls, sharding_infos: Sequence[Any], *rest: Any, **named: Any) -> Any:
        """Called by TorchRec for the tables of each sharding type."""
        kind = _SHARDINGS.get(sharding_infos[0].param_sharding.sharding_type)
        if kind is None:
            return super().create_embedding_bag_sharding(sharding_infos, *rest, **named)
        named.pop("permute_embeddings", None)
        return kind(sharding_infos, *rest, **named)


class RowWiseBags(RwPooledEmbeddingSharding):
    """Rows of every table on all ranks."""

    def create_output_dist(self, device: torch.device | None = None) -> TwPooledEmbeddingDist:
        """The way of the parts to the bags' ranks."""
        widths, ranks = self.embedding_dims(), self._pg.size()
        return TwPooledEmbeddingDist(
            self._pg,
            [sum(widths)] * ranks,
            [widths] * ranks,
            device or self._device,
            callbacks=[partial(_added_up, ranks, sum(widths))],
        )


class NodesBags(GridPooledEmbeddingSharding):
    """Rows of every table on all ranks of a node, or of several nodes, each of which has some of its columns."""

    def _shard(self, sharding_infos: list[Any]) -> Any:
        for info in sharding_infos:
            shards = info.param_sharding.sharding_spec.shards
            planned = sum(shard.shard_offsets[1] == 0 for shard in shards)
            if planned != self._local_size:
                raise ValueError(
                    f"table {info.embedding_config.name!r} is planned for nodes of {planned} ranks, but "
                    f"LOCAL_WORLD_SIZE says {self._local_size}: plan again for this job"
                )
        return super()._shard(sharding_infos)

    def create_output_dist(self, device: torch.device | None = None) -> Any:
        """The way of the parts to ranks of the node, and of the sums to the bags' ranks."""
        way = super().create_output_dist(device)
        way._create_output_dist_modules()
        width = self._dim_sum_per_node()[self._rank // self._local_size]
        way._intra_dist = PartsOfNode(self._intra_pg, width, device or self._device)
        return way


class PartsOfNode(PooledEmbeddingsAllToAll):
    """Takes the place of TorchRec's reduce-scatter within a node."""

    def __init__(self, group: Any, width: int, device: torch.device | None) -> None:
        super().__init__(group, [width] * group.size(), device, [partial(_added_up, group.size(), width)])

    def forward(self, local_embs: Tensor, input_splits: list[int] | None = None) -> Any:
        """`input_splits`: how many bags each rank of the node adds up; None for equally many."""
        return super().forward(local_embs, input_splits)


_SHARDINGS = {"row_wise": RowWiseBags, "table_row_wise": NodesBags, "grid_shard": NodesBags}


def _added_up(parts: int, width: int, received_BX: Tensor) -> Tensor:
    """[bags, parts x width], the parts beside each other -> [bags, width]."""
    return received_BX.view(len(received_BX), parts, width).sum(dim=1)
