"""Which keys a query may see: the semi-local mask of packed user sequences, as plain integers.

This is the one description of the sparsity.  The reference turns it into a dense matrix (`reference.dense_mask`), the
Triton kernels into live tiles (`tiles.py`, `schedule.py`).  It knows nothing of tensors or devices.

A sequence holds `c` context tokens, `h` history tokens (oldest first) and `t` target tokens, in this order.  Query q
may attend to key k (both counted from the start of the sequence):

| query   | key is context | key is history                                             | key is a target |
| ------- | -------------- | ---------------------------------------------------------- | --------------- |
| context | yes            | yes                                                        | no              |
| history | yes            | k <= q and (q - k <= local or q >= c + h - global_rows     | no              |
|         |                |             or k - c < global_columns)                     |                 |
| target  | yes            | yes                                                        | only itself     |
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SemiLocalMask:
    """Semi-local attention (ULTRA-HSTU): a causal band, the newest rows unrestricted, optional sink columns.

    >>> SemiLocalMask(local=256, global_rows=256)
    SemiLocalMask(local=256, global_rows=256, global_columns=0, num_context=0)
    """

    local: int | None = None
    """Largest distance q - k that a history query sees (K1; the band holds local + 1 keys).  None: full causal."""

    global_rows: int = 0
    """The newest history queries, this many a sequence, see the whole history before them (K2).  Needs `local`."""

    global_columns: int = 0
    """The oldest history keys, this many a sequence, are seen by every later query.  Needs `local`."""

    num_context: int = 0
    """Context tokens at the start of every sequence: they see context and history, and everyone sees them."""

    def __post_init__(self) -> None:
        for name in ("local", "global_rows", "global_columns", "num_context"):
            value = getattr(self, name)
            if value is None and name == "local":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                fix = "None (full causal) or an integer" if name == "local" else "an integer"
                raise ValueError(f"mask.{name}={value!r} must be {fix} between 0 and 2**31 - 1")
        if self.local is None:
            for name in ("global_rows", "global_columns"):
                if getattr(self, name):
                    raise ValueError(
                        f"mask.{name}={getattr(self, name)} has no effect with local=None (full causal); "
                        f"set local to an integer or {name} to 0"
                    )
