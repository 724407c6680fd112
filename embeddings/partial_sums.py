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
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
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
        return _way_of_parts(self._pg, [self.embedding_dims()], device or self._device)


_SHARDINGS = {"row_wise": RowWiseBags}


def _way_of_parts(group: Any, widths_of_nodes: list[list[int]], device: torch.device | None) -> TwPooledEmbeddingDist:
    """Parts of sums to the ranks of their bags, where they are added up.

    Args:
        group: All ranks.
        widths_of_nodes: Of each of equally many neighbouring ranks, which hold rows of the same tables, the widths of
            the features that they look up.
        device: Of the sums.
    """
    parts = group.size() // len(widths_of_nodes)
    widths_of_ranks = [widths for widths in widths_of_nodes for _ in range(parts)]
    return TwPooledEmbeddingDist(
        group,
        [sum(widths) for widths in widths_of_ranks],
        widths_of_ranks,
        device,
        callbacks=[partial(_added_up, parts, [sum(widths) for widths in widths_of_nodes])],
    )


def _added_up(parts: int, widths: list[int], received_BX: Tensor) -> Tensor:
    """[bags, parts x sum of `widths`], the parts of a node beside each other -> [bags, sum of `widths`]."""
    nodes = received_BX.split_with_sizes([parts * width for width in widths], dim=1)
    summed = [node.view(len(node), parts, width).sum(dim=1) for node, width in zip(nodes, widths, strict=True)]
    return torch.cat(summed, dim=1)
