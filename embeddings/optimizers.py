"""The optimizers of tables: each fused into the backward pass of its table, with a common learning-rate schedule."""

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.optim import optimizers as placeholders
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from embeddings.config import SparseOptimizerConfig, TableConfig
from embeddings.tables import Tables, table_name

DEFAULT_EPS = 1e-8
DEFAULT_BETAS = (0.9, 0.999)

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    # TorchRec's stand-in takes FBGEMM's spelling of the betas; torch's own Adam would not.
    "adam": placeholders.Adam,
    "sgd": torch.optim.SGD,
}


def optimizer_of(table: TableConfig, default: SparseOptimizerConfig) -> SparseOptimizerConfig:
    """The table's own optimizer, or else the run's."""
    return default if table.optimizer is None else table.optimizer


def check_optimizers(tables: Sequence[TableConfig], default: SparseOptimizerConfig, compute_device: str) -> None:
    """Refuse optimizers that FBGEMM does not have on the device.

    Raises:
        ValueError: adam on a cpu.
    """
    for table in tables:
        if compute_device == "cpu" and optimizer_of(table, default).kind == "adam":
            raise ValueError(
                f"table {table.name!r} has the optimizer adam, of which FBGEMM has no CPU kernel: "
                "take rowwise_adagrad, adagrad or sgd, or train on a GPU"
            )


def attach_optimizers(tables: Tables, default: SparseOptimizerConfig) -> None:
    """Give every table its optimizer.  Sharding turns it into FBGEMM's fused one, which runs in the backward pass.

    Call it before the tables are sharded, once.
    """
    by_name = {config.name: config for config in tables.configs}
    for collection in tables.collections:
        for name, module in collection.embeddings.items():
            config = optimizer_of(by_name[name], default)
            _apply_optimizer_in_backward(_CLASSES[config.kind], [module.weight], _arguments(config))


class TableOptimizers:
    """The optimizers of sharded tables, as a training step uses them: learning rates in `param_groups`, then
    `zero_grad` before the forward pass, which hands them to FBGEMM, and `step` after the backward pass.

    FBGEMM counts Adam's steps by forward passes, evaluations included, and keeps the count out of its state.  Here
    each table of Adam has a count of the steps that were taken, [] int64, which is part of the state.
    """

    def __init__(self, tables: Tables, default: SparseOptimizerConfig, fused: KeyedOptimizer) -> None:
        self._tables, self._fused = tables, fused
        self._steps = {
            config.name: torch.zeros((), dtype=torch.int64)
            for config in tables.configs
            if optimizer_of(config, default).kind == "adam"
        }
        self._adam_kernels = _kernels_of(tables, set(self._steps)) if self._steps else []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """A group a kernel; its `lr` may be set."""
        groups: list[dict[str, Any]] = self._fused.param_groups
        return groups

    def zero_grad(self) -> None:
        """Before a forward pass: hands FBGEMM the learning rates and Adam's step."""
        self._fused.zero_grad()
        for table, kernel in self._adam_kernels:
            # The forward pass adds 1, and reads the device's number only where the host's is 0.
            kernel.iter_cpu.fill_(self._steps[table])
            kernel.iter.fill_(self._steps[table].item())

    def step(self) -> None:
        """After a backward pass, in which the rows were updated."""
        self._fused.step()
        for count in self._steps.values():
            count += 1

    def state(self) -> dict[str, Tensor | ShardedTensor]:
        """The optimizers' state as checkpoints store it: under TABLE/STATE (`item/momentum1`), which depends neither on
        the plan nor on the module; the rest is as `table_weights` says.  Plain SGD has none.  No communication.
        """
        state: dict[str, Tensor | ShardedTensor] = {}
        for collection in self._tables.collections:
            for key, slots in collection.fused_optimizer.state_dict()["state"].items():
                table = table_name(key)
                # FBGEMM's name of a slot comes with the table in front: item.momentum1
                state.update({f"{table}/{slot.removeprefix(table + '.')}": value for slot, value in slots.items()})
        return state | {f"{table}/step": count for table, count in self._steps.items()}


def state_bytes_per_row(kind: str, embedding_dim: int) -> int:
    """Bytes of an optimizer's float32 state a row."""
    return {"rowwise_adagrad": 4, "adagrad": 4 * embedding_dim, "adam": 8 * embedding_dim, "sgd": 0}[kind]


def _arguments(config: SparseOptimizerConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.kind != "sgd":
        arguments["eps"] = DEFAULT_EPS if config.eps is None else config.eps
    if config.kind == "adam":
        arguments["beta1"], arguments["beta2"] = config.betas or DEFAULT_BETAS
    return arguments


def _kernels_of(tables: Tables, names: set[str]) -> list[tuple[str, Any]]:
    """(first of its tables among `names`, kernel) of every FBGEMM kernel that holds one of them on this rank.

    TorchRec puts tables of one optimizer only into a kernel.
    """
    found = []
    for module in _lookups(tables):
        held = [table.name for table in module._config.embedding_tables if table.name in names]
        if held:
            found.append((held[0], module._emb_module))
    return found


def _lookups(tables: Tables) -> list[Any]:
    return [
        module
        for collection in tables.collections
        for lookup in getattr(collection, "_lookups", [])
        for module in lookup.modules()
        if isinstance(getattr(module, "_emb_module", None), SplitTableBatchedEmbeddingBagsCodegen)
    ]
