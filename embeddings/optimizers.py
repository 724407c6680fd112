"""The optimizers of tables: fused into the backward pass of sharded tables, in plain PyTorch for replicated ones."""

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

from embeddings.config import SparseOptimizerConfig, optimizer_of
from embeddings.tables import Tables, is_sharded, modules_by_table, table_name

DEFAULT_EPS = 1e-8
DEFAULT_BETAS = (0.9, 0.999)

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    # TorchRec's stand-in takes FBGEMM's spelling of the betas; torch's own Adam would not.
    "adam": placeholders.Adam,
    "sgd": torch.optim.SGD,
}


def attach_optimizers(tables: Tables, default: SparseOptimizerConfig) -> None:
    """Give every table that is to be sharded its optimizer.  Sharding turns it into FBGEMM's fused one, which runs in
    the backward pass.

    Call it before the tables are sharded, once.
    """
    by_name = {config.name: config for config in tables.configs}
    for collection in tables.collections:
        # What has storage before it is sharded is replicated.
        if collection.device.type != "meta":
            continue
        for name, module in modules_by_table(collection).items():
            config = optimizer_of(by_name[name], default)
            _apply_optimizer_in_backward(_CLASSES[config.kind], [module.weight], _arguments(config))


class TableOptimizers:
    """The optimizers of parallel tables, as a training step uses them: learning rates in `param_groups`, then
    `zero_grad` before the forward pass, which hands them to FBGEMM, and `step` after the backward pass.

    Sharded tables are updated in the backward pass, replicated ones in `step`, from gradients averaged over ranks.
    Frozen ones have no gradients, and keep the state that they have.

    FBGEMM counts Adam's steps by forward passes, evaluations included, and keeps the count out of its state.  Here
    each table of Adam has a count of the steps that were taken, [] int64, which is part of the state.
    """

    def __init__(self, tables: Tables, default: SparseOptimizerConfig, fused: KeyedOptimizer) -> None:
        configs = {config.name: optimizer_of(config, default) for config in tables.configs}
        self._sharded = [collection for collection in tables.collections if is_sharded(collection)]
        self._fused = fused
        self._replicated = {
            name: _CLASSES[configs[name].kind]([module.weight], **_arguments(configs[name]))
            for collection in tables.collections
            if not is_sharded(collection)
            for name, module in modules_by_table(collection).items()
        }
        self._steps = {
            name: torch.zeros((), dtype=torch.int64) for name, config in configs.items() if config.kind == "adam"
        }
        self._trained = {config.name for config in tables.configs if not config.frozen}
        self._adam_kernels = _kernels_of(self._sharded, set(self._steps)) if self._steps else []
        self.stateless = frozenset(name for name, config in configs.items() if config.kind == "sgd")
        """Tables whose optimizer keeps no state."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """A group a kernel and a replicated table; its `lr` may be set."""
        groups: list[dict[str, Any]] = list(self._fused.param_groups)
        return groups + [group for optimizer in self._replicated.values() for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Before a forward pass: hands FBGEMM the learning rates and Adam's step, forgets replicated gradients."""
        self._fused.zero_grad()
        for optimizer in self._replicated.values():
            optimizer.zero_grad()
        for table, kernel in self._adam_kernels:
            # The forward pass adds 1, and reads the device's number only where the host's is 0.
            kernel.iter_cpu.fill_(self._steps[table])
            kernel.iter.fill_(self._steps[table].item())

    def step(self) -> None:
        """After a backward pass, in which the rows of sharded tables were updated."""
        self._fused.step()
        for optimizer in self._replicated.values():
            optimizer.step()
        for name, count in self._steps.items():
            if name in self._trained:
                count += 1

    def state(self) -> dict[str, Tensor | ShardedTensor]:
        """The optimizers' state as checkpoints store it: under TABLE/STATE (`item/momentum1`), which depends neither on
        the plan nor on the module; the rest is as `table_weights` says.  Plain SGD has none.  No communication.
        """
        state: dict[str, Tensor | ShardedTensor] = {}
        for collection in self._sharded:
            for key, slots in collection.fused_optimizer.state_dict()["state"].items():
                table = table_name(key)
                # FBGEMM's name of a slot comes with the table in front: item.momentum1
                state.update({f"{table}/{slot.removeprefix(table + '.')}": value for slot, value in slots.items()})
        for table, optimizer in self._replicated.items():
            for slots in optimizer.state.values():
                # Row-wise Adagrad has one column in PyTorch, and no dimension of columns in FBGEMM.
                sums = slots["sum"]
                state[f"{table}/momentum1"] = sums.view(-1) if sums.shape[1] == 1 else sums
        return state | {f"{table}/step": count for table, count in self._steps.items()}


def _arguments(config: SparseOptimizerConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    if config.kind != "sgd":
        arguments["eps"] = DEFAULT_EPS if config.eps is None else config.eps
    if config.kind == "adam":
        arguments["beta1"], arguments["beta2"] = config.betas or DEFAULT_BETAS
    return arguments


def _kernels_of(collections: Sequence[Any], names: set[str]) -> list[tuple[str, Any]]:
    """(first of its tables among `names`, kernel) of every FBGEMM kernel that holds one of them on this rank.

    TorchRec puts tables of one optimizer only into a kernel.
    """
    found = []
    for module in (
        module for collection in collections for lookup in collection._lookups for module in lookup.modules()
    ):
        if isinstance(getattr(module, "_emb_module", None), SplitTableBatchedEmbeddingBagsCodegen):
            held = [table.name for table in module._config.embedding_tables if table.name in names]
            if held:
                found.append((held[0], module._emb_module))
    return found
