"""What a ranker predicts, as a user states it.  Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelConfig:
    """Something that a ranker predicts of every candidate."""

    name: str
    """An action of the data set, or one of its label columns."""
    kind: Literal["binary", "regression", "ordered", "classes"] = "binary"
    """binary: one logit, of an action or a column of 0 and 1.  regression: a number, with the Huber loss.  ordered: a
    number as bits, one logit a threshold.  classes: an id, one logit a class."""
    weight: float = 1.0
    """Weight of the label's loss among those of all labels."""
    keep_rate: Literal["weight", "shift", "ignore"] = "weight"
    """What the data set's keep rates of thinned candidates do: see `trainer.labels.loss`."""
    transform: Literal["none", "log"] | None = None
    """For kind=regression; log is sign(x) log(1 + |x|), for what spans orders of magnitude.  Null is none."""
    huber: float | None = None
    """For kind=regression: deviation, in units of the training split's spread, from which the loss is linear; null is
    1.0."""
    thresholds: tuple[float, ...] = ()
    """For kind=ordered: borders in the column's own unit, rising; empty takes the training split's quantiles."""
    buckets: int | None = None
    """For kind=ordered without thresholds: about so many equally full buckets; null is 16."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(
                f"model.labels: weight of {self.name!r} must be above 0, got {self.weight}: leave out what should not "
                "count"
            )
        settings = {"transform": "regression", "huber": "regression", "thresholds": "ordered", "buckets": "ordered"}
        for name, kind in settings.items():
            if getattr(self, name) not in (None, ()) and kind != self.kind:
                raise ValueError(
                    f"model.labels: {name} of {self.name!r} has no effect on kind={self.kind}, only on {kind}"
                )
        if self.keep_rate == "shift" and self.kind != "binary":
            raise ValueError(
                f"model.labels: keep_rate=shift of {self.name!r} needs kind=binary, got {self.kind}: use weight"
            )
        if self.huber is not None and not self.huber > 0:
            raise ValueError(f"model.labels: huber of {self.name!r} must be above 0, got {self.huber}")
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"model.labels: thresholds of {self.name!r} must rise, got {self.thresholds}")
        if self.thresholds and self.buckets is not None:
            raise ValueError(f"model.labels: buckets of {self.name!r} has no effect with thresholds: give one of them")
        if self.buckets is not None and self.buckets < 2:
            raise ValueError(f"model.labels: buckets of {self.name!r} must be at least 2, got {self.buckets}")
