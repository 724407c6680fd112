"""How far a run has come, as the plain values that a checkpoint's manifest holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.stream.position import DataPosition, position_from_dict


@dataclass(kw_only=True, slots=True)
class Progress:
    """How far a run has come; random numbers are a function of seed, step and rank, so nothing of them is kept."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Training samples consumed, all ranks."""
    position: DataPosition | None = None
    """Where in the data the next step begins; None at the start."""

    def advance(self, samples: int, position: DataPosition) -> None:
        """Count one step."""
        self.step += 1
        self.samples += samples
        self.position = position

    @property
    def ends_part(self) -> bool:
        """Whether a pass over a part of the data, of several, has just ended."""
        sources = () if self.position is None else self.position.sources
        return len(sources) > 1 and all(source.sample == 0 for source in sources)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form that `progress_from_dict` reads back."""
        return asdict(self)


def progress_from_dict(values: Mapping[str, Any]) -> Progress:
    """Rebuild progress from `Progress.as_dict`.

    Raises:
        ValueError, KeyError, TypeError: the values are of another form.
    """
    position = values["position"]
    return Progress(
        step=int(values["step"]),
        samples=int(values["samples"]),
        position=None if position is None else position_from_dict(position),
    )
