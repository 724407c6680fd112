"""Which samples a run reads, in which order, how long and on which rank: pure functions of seed and position."""
