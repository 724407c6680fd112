"""Which rows of sharded tables were looked up in training; only those can have changed.

A mark a row, [rows of the local shard] bool on the device, set as the ids of a batch arrive; nothing waits for the
device before the marks are read.  Replicated tables have none: they are ordinary parameters.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.tables import Tables, is_sharded


class TouchedRows:
    """The marks of this rank's shards, from its making on."""

    def __init__(self, tables: Tables) -> None:
        """`tables` are sharded already."""
        self._flat: list[Tensor] = []
        self._marks: dict[tuple[str, int], Tensor] = {}
        for collection in filter(is_sharded, tables.collections):
            for lookup in collection._lookups:
                for module in lookup.modules():
                    if isinstance(module, BaseBatchedEmbedding | BaseBatchedEmbeddingBag):
                        self._follow(module)

    def _follow(self, kernel: "BaseBatchedEmbedding[Any] | BaseBatchedEmbeddingBag[Any]") -> None:
        device = kernel.split_embedding_weights()[0].device
        held = kernel._config.embedding_tables
        flat = torch.zeros(sum(table.local_rows for table in held), dtype=torch.bool, device=device)
        self._flat.append(flat)
        firsts, first = [], 0
        for table in held:
            offset = 0 if table.local_metadata is None else table.local_metadata.shard_offsets[0]
            # Shards of one table that differ in columns are looked up alike.
            self._marks.setdefault((table.name, offset), flat[first : first + table.local_rows])
            firsts += [first] * table.num_features()
            first += table.local_rows
        kernel.register_forward_pre_hook(partial(_mark, flat, torch.tensor(firsts, device=device)))

    def rows(self, table: str, first_row: int) -> Tensor | None:
        """[touched] int64, ascending, counted from the shard's first row; None where nothing is known of that shard."""
        marks = self._marks.get((table, first_row))
        return None if marks is None else marks.nonzero().view(-1)

    def clear(self) -> None:
        """Forget all marks."""
        for flat in self._flat:
            flat.zero_()


def _mark(flat: Tensor, firsts: Tensor, kernel: object, inputs: tuple[KeyedJaggedTensor, ...]) -> None:
    """Before a lookup; `firsts` [features]: where the marks of each feature's table begin in `flat`."""
    if not torch.is_grad_enabled():
        return
    (features,) = inputs
    ids, lengths = features.values(), features.lengths()
    per_feature = lengths.numel() // len(firsts)
    # The size is stated, so nothing waits for the lengths.
    first = firsts.repeat_interleave(per_feature).repeat_interleave(lengths, output_size=ids.numel())
    flat.index_fill_(0, first + ids, True)
