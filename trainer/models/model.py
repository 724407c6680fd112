"""A single-process model: tables, a tower over their rows, and the loss of what it is trained for."""

from typing import Any

from torch import Tensor, nn
from torchrec.streamable import Pipelineable

from embeddings.rows.trained import TrainedRows
from embeddings.tables import Rows, Tables
from trainer.run.profiling import stage


class Objective(nn.Module):
    """Everything behind the tables: from their rows and a batch to this rank's part of the loss."""

    def __init__(self, tower: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.tower, self.loss = tower, loss

    def forward(self, looked_up: list[Rows], batch: Pipelineable) -> Tensor:
        """The loss of a batch."""
        with stage("longview: tower"):
            outputs = self.tower(looked_up, batch.inputs)
        with stage("longview: loss"):
            loss: Tensor = self.loss(outputs, looked_up, batch)
        return loss


class Model(nn.Module):
    """`score` is what serving calls: it needs no label, no position in the data and no loss.

    TorchRec's pipeline traces `forward` up to the tables, so what comes behind them stays one call each.

    Args:
        tables: what ids are looked up in.
        tower: all dense parameters; from the tables' rows and the inputs to outputs.
        loss: from outputs, rows and the whole batch to this rank's part of the loss.
    """

    def __init__(self, tables: Tables, tower: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        # Any: what records steps (`trainer.steps.recording`) puts itself in its place.
        self.objective: Any = Objective(tower, loss)

    @property
    def tower(self) -> nn.Module:
        """The dense model: all parameters but the tables'."""
        tower: nn.Module = self.objective.tower
        return tower

    @property
    def loss(self) -> nn.Module:
        """What the outputs are judged by."""
        loss: nn.Module = self.objective.loss
        return loss

    def forward(self, batch: Pipelineable) -> Tensor:
        """This rank's part of the loss of a batch."""
        loss: Tensor = self.objective(self.tables(batch.inputs.features, batch.inputs.bags), batch)
        return loss

    def score(self, inputs: Any, trained: TrainedRows | None = None) -> Any:
        """The tower's outputs: of a ranker [C, outputs of all labels], of a retriever one at every event.

        Ids whose row is not among the `trained` ones read that of the unknown id.
        """
        known = inputs if trained is None else inputs.looking_up(trained.replace_unknown(inputs.features))
        return self.tower(self.tables(known.features, known.bags), inputs)
