"""A single-process model: tables, a tower over their rows, and the loss of what it is trained for."""

from typing import Any

from torch import Tensor, nn
from torchrec.streamable import Pipelineable

from embeddings.tables import Tables


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
        self.tables, self.tower, self.loss = tables, tower, loss

    def forward(self, batch: Pipelineable) -> Tensor:
        """This rank's part of the loss of a batch."""
        rows = self.tables(batch.inputs.features)
        loss: Tensor = self.loss(self.tower(rows, batch.inputs), rows, batch)
        return loss

    def score(self, inputs: Any) -> Any:
        """The tower's outputs: of a ranker [C, outputs of all labels], of a retriever one at every event."""
        return self.tower(self.tables(inputs.features), inputs)
