"""What relative biases of attention are made of.  Standard library only."""

from dataclasses import dataclass

MAX_TIME_BUCKETS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RelativeBiasConfig:
    """What attention adds to a score for how far the key lies back, in places and in time, learnt a head and layer."""

    num_time_buckets: int = 64
    """Biases for the logarithm of the time between a key's event and what is asked for, the next event; at most 256, as
    a pair's is kept in a byte."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_time_buckets <= MAX_TIME_BUCKETS:
            raise ValueError(
                f"layer.relative_bias.num_time_buckets must lie in 1 to {MAX_TIME_BUCKETS}, got {self.num_time_buckets}"
            )
