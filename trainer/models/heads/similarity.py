"""What a head that scores items against predictions has to give: training and evaluation call the same functions.

Each side is computed once, then every pair of the two.

Shapes: P predictions, N items, E width of the tower's outputs and of the item table's rows.
"""

from torch import Tensor, nn


class Similarity(nn.Module):
    """How well an item follows a prediction; higher is better.  All in float32."""

    floats_per_pair: int = 1
    """Numbers that a pair keeps in memory while it is scored; evaluation scores fewer pairs at a time for more."""

    rounding: float = 0.0
    """By so much, relative to 1 plus its size, a pair's score may differ with its place among others: closer scores are
    equal."""

    def queries(self, outputs_PE: Tensor) -> Tensor:
        """The predictions' side, [P, any width]."""
        raise NotImplementedError

    def items(self, rows_NE: Tensor) -> Tensor:
        """The items' side, [N, any width], from rows of the table."""
        raise NotImplementedError

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """Scores [P, N] of `queries` [P, ...] and `items`, [N, ...] the same for all or [P, N, ...] a query's own."""
        raise NotImplementedError
