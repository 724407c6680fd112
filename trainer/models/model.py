"""A single-process model: tables, and a tower over their rows."""

from typing import Any

from torch import Tensor, nn
from torchrec.streamable import Pipelineable

from embeddings.tables import Tables


class Model(nn.Module):
    """Tables and tower.  TorchRec's pipeline traces `forward` up to the tables, so the tower stays one call."""

    def __init__(self, tables: Tables, tower: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        self.tower = tower

    def forward(self, batch: Pipelineable) -> tuple[Tensor, Any]:
        """Returns this rank's part of the loss of a batch, and the tower's detached output."""
        return self.tower(self.tables(batch.features), batch)  # type: ignore[no-any-return]  # nn.Module is untyped
