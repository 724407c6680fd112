"""What each save holds: the whole state, or of sharded tables the rows that have changed since the last full one.

The marks of those rows are taken at their word by every delta, and by a full checkpoint that is folded.  Beside the
training the state of the last full one lies in memory, so each save compares a part of the unmarked rows with it.
"""

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.layout import Layout, lay_out
from trainer.checkpoint.loading import gather
from trainer.checkpoint.pieces import LivePiece, Tensors, Touched, delta_room, touched_pieces
from trainer.config import CheckpointConfig

logger = logging.getLogger(__name__)

PARTS = 256
"""Saves in which every row is compared once: each costs a 256th of a copy of the tables."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a rank saves."""

    whole: Layout
    """All that it holds."""
    rows: Layout | None
    """What has changed since the last full checkpoint, which alone is copied; None where all is."""
    base: int | None
    """Step of the full checkpoint that a delta needs; None for a full one."""

    @property
    def copied(self) -> Layout:
        """What is taken from the live tensors."""
        return self.whole if self.rows is None else self.rows

    @property
    def file(self) -> Layout:
        """What is written."""
        return self.whole if self.base is None else self.copied


class Deltas:
    """Decides it.  All methods are called by every rank."""

    def __init__(self, config: CheckpointConfig, touched: Touched | None, group: dist.ProcessGroup) -> None:
        """`touched` knows the rows that may have changed; without it every checkpoint is full."""
        self._config, self._touched, self._group = config, touched, group
        self._full_step: int | None = None
        """The full checkpoint since which rows are marked as touched."""
        self._since_full = 0
        """Deltas since that one."""
        self._saves = 0
        """Saves at which unmarked rows were compared."""

    def restart(self) -> None:
        """The live tensors were filled from elsewhere: the next save is full."""
        self._full_step = None

    def completed(self, contents: Contents, step: int) -> None:
        """What was saved of `step` counts."""
        self._full_step = step if contents.base is None else contents.base

    def room(self, pieces: list[LivePiece], tensors: Tensors) -> int:
        """Bytes that the rows of any save may take."""
        return 0 if self._touched is None else delta_room(pieces, tensors)

    def contents(self, pieces: list[LivePiece], tensors: Tensors, staged: Tensor | None) -> Contents:
        """What this rank saves of its `pieces`; it is part of a delta on every rank or on none.

        `staged`, [bytes] uint8, holds the state of the last full checkpoint, where saves are asynchronous.
        """
        whole, base, touched = lay_out(pieces), self._full_step, self._touched
        if touched is None:
            return Contents(whole, None, None)
        rows, delta_is_due = None, self._since_full < self._config.deltas
        # Beside the training a full one is made of rows as well, and of the copy of the last full one.
        if base is not None and (delta_is_due or self._config.asynchronous):
            changed = lay_out(touched_pieces(pieces, tensors, touched))
            rows = changed if changed.num_bytes <= self.room(pieces, tensors) < whole.num_bytes else None
            unmarked = [] if staged is None else unmarked_changes(changed, whole, staged, self._saves)
            self._saves += 1
            if not self._suffice(whole if rows is None else rows, whole, unmarked):
                rows = None
            elif delta_is_due:
                self._since_full += 1
                return Contents(whole, rows, base)
        # Set again when the full checkpoint is complete.
        self._full_step, self._since_full = None, 0
        touched.clear()
        return Contents(whole, rows, None)

    def _suffice(self, saved: Layout, whole: Layout, unmarked: list[str]) -> bool:
        """Whether what all ranks would save takes at most half of the space and leaves out no row that has changed."""
        said = gather((saved.num_bytes, whole.num_bytes, unmarked), self._group)  # every rank
        missed = sorted({name for _, _, names in said for name in names})
        if missed:
            logger.error(
                "rows of %s have changed without being looked up in training, which is a fault of this code, please "
                "report it: all of the state is saved now, but checkpoints since step %s may hold older values of them",
                ", ".join(missed),
                self._full_step,
            )
        return not missed and 2 * sum(size for size, _, _ in said) <= sum(size for _, size, _ in said)


def unmarked_changes(changed: Layout, whole: Layout, staged: Tensor, number: int) -> list[str]:
    """Names of tensors with a row that `changed` leaves out though it differs from the one in `staged`, which lies as
    `whole` says.  Compares a part of the rows, another one for each `number` below `PARTS`, and waits for the device
    once."""
    names, flags = [], []
    for place, before in zip(changed.places, whole.places, strict=True):
        piece, rows = place.piece, place.piece.rows
        if rows is None:
            continue
        count = -(-len(piece.tensor) // PARTS)
        first = number % PARTS * count
        part = piece.tensor[first : first + count]
        if not len(part):
            continue
        start = before.start + first * piece.row_bytes
        old = staged[start : start + part.nbytes].to(part.device, non_blocking=True)
        differs = part.reshape(len(part), -1).view(torch.uint8).ne(old.view(len(part), -1)).any(1)
        marked = torch.zeros(len(piece.tensor), dtype=torch.bool, device=part.device)
        marked.index_fill_(0, rows.to(part.device), True)
        names.append(piece.name)
        flags.append(differs.logical_and(~marked[first : first + count]).any())
    return [name for name, flag in zip(names, torch.stack(flags).tolist() if flags else [], strict=True) if flag]
