"""What relative biases of attention are made of.  Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativeBiasConfig:
    """What attention adds to a score for how far the key lies back, in places and in time, learnt a head and layer."""

    num_time_buckets: int = 64
    """Biases for the logarithm of the time between a key's event and what is asked for, the next event."""

    def __post_init__(self) -> None:
        if self.num_time_buckets < 1:
            raise ValueError(f"layer.relative_bias.num_time_buckets must be at least 1, got {self.num_time_buckets}")
