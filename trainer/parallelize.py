"""Turn the single-process model into the parallel one.  All parallelism is applied here, in this order:

1. ranks that train on the same samples share the tower (`trainer.parallel.context_parallel`), where the run has such;
2. tables that the plan replicates are set apart as ordinary parameters, the others get their fused optimizers;
3. TorchRec shards these as the plan says, allocating only this rank's part (the tables were on the meta device);
4. the dense model and the replicated tables have their gradients averaged over ranks before the update, if there are
   several (`trainer.parallel.averaging`);
5. the tables get their initial values, which do not depend on the plan.

Gradients of rows (by TorchRec) and of parameters are averaged over ranks; a batch's `loss_denominator` makes that
average the global mean.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.streamable import Pipelineable

from embeddings.lookups.caches import Caches
from embeddings.lookups.unbounded import UnboundedTables
from embeddings.plan import Plan
from embeddings.rows.trained import TrainedRows
from embeddings.sharding import shard_tables
from embeddings.tables import Tables, table_weights
from pipelines.batches.batch import Inputs
from trainer.checkpoint.pieces import Tensors
from trainer.config import TrainConfig
from trainer.freezing import replicated_parameters
from trainer.models.model import Model
from trainer.parallel.averaging import GradientAverage
from trainer.parallel.context_parallel import share_histories
from trainer.parallel.mesh import Mesh
from trainer.steps.optim import Optimizers


@dataclass(frozen=True, slots=True)
class ParallelModel:
    """The sharded model and its optimizers, as the loop, the evaluation and the checkpoints use them."""

    module: DistributedModelParallel
    """The tables sharded, the dense model replicated."""
    model: Model
    """The model inside `module`, by which it is called without training: sharded tables, and the dense parameters of
    `module`."""
    optimizers: Optimizers
    """The optimizers of the dense parameters and of the tables."""
    unbounded: UnboundedTables
    """Makes rows of unbounded ids."""
    caches: Caches
    """The device's caches of rows that lie in host memory."""
    autocast: functools.partial[Any]
    """Makes the context in which forward runs."""

    def loss(self, batch: Pipelineable) -> tuple[Tensor, Tensor]:
        """(loss to differentiate, what a step returns of it) of this rank's part of a global batch, in the run's
        precision: the forward of a `StepPipeline`."""
        self.unbounded.begin_step()
        with self.autocast():
            loss: Tensor = self.module(batch)
        return loss, loss.detach()

    def score(self, inputs: Any, trained: TrainedRows | None = None) -> Any:
        """`Model.score`, in the run's precision, of `known` inputs.  A collective: every rank looks up as often."""
        with self.autocast(), self.caches.undisturbed():
            return self.model.score(inputs, trained)

    def known(self, inputs: Inputs) -> Inputs:
        """The inputs with rows in the place of unbounded ids, as the tables were trained with.  A collective."""
        rows = self.unbounded.find(inputs.ids_host)
        return inputs.with_ids(rows) if rows else inputs

    def trained_rows(self, device: torch.device) -> TrainedRows:
        """Which rows have been trained so far.  A collective."""
        return TrainedRows(self.tables, self.optimizers.tables, device)

    @property
    def tables(self) -> Tables:
        """The sharded tables."""
        return self.model.tables

    @property
    def tower(self) -> nn.Module:
        """The dense part of the model, replicated."""
        return self.model.tower

    def tensors(self) -> Tensors:
        """The whole state of model and optimizers under names that do not depend on the plan; shares their memory."""
        parts = {
            "tables": table_weights(self.tables),
            "tables_optimizer": self.optimizers.tables.state(),
            "ids": self.unbounded.state(),
            "dense": self.tower.state_dict(),
            "dense_optimizer": self.optimizers.dense_state(),
        }
        return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def parallelize(model: Model, plan: Plan, config: TrainConfig, mesh: Mesh) -> ParallelModel:
    """Shard and replicate `model` over the job's processes.  Called by every rank, with the same plan."""
    share_histories(model, mesh)
    module, table_optimizers = shard_tables(
        model,
        plan,
        optimizer=config.sparse_optimizer,
        device=mesh.device,
        seed=config.seed,
        prefetch=config.overlap == "prefetch",
    )
    averaged = replicated_parameters(model)
    optimizers = Optimizers(model.tower, table_optimizers, config.optimizer, config.schedule)
    if averaged and mesh.world_size > 1:
        optimizers.average = GradientAverage(averaged, mesh.world_size)
    return ParallelModel(
        module=module,
        model=model,
        optimizers=optimizers,
        unbounded=UnboundedTables(model.tables, table_optimizers, seed=config.seed, copies=mesh.sharing),
        caches=Caches(model.tables),
        autocast=functools.partial(
            torch.autocast,
            device_type=mesh.device.type,
            dtype=torch.bfloat16,
            enabled=mesh.device.type == "cuda" and config.precision == "bfloat16",
        ),
    )
