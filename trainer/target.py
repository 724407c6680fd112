"""The quality at which a run ends: a metric of its evaluations and a bound.  Standard library only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What an evaluation must find."""

    metric: str
    """The metric's name in eval.jsonl."""
    bound: float
    """The value that it must reach."""
    rises: bool
    """Whether more is better."""

    def reached(self, metrics: Mapping[str, float | None]) -> bool:
        """Whether an evaluation has reached it; one whose metric is undefined has not."""
        value = metrics.get(self.metric)
        return value is not None and (value >= self.bound if self.rises else value <= self.bound)


def parse_target(text: str) -> Target:
    """The target of `METRIC>=VALUE` or `METRIC<=VALUE`.

    Raises:
        ValueError: it has another form.

    >>> parse_target("auc/listen_plus>=0.75")
    Target(metric='auc/listen_plus', bound=0.75, rises=True)
    """
    found = re.fullmatch(r"\s*(\S+?)\s*(>=|<=)\s*(\S+)\s*", text)
    try:
        if found is not None:
            return Target(found[1], float(found[3]), found[2] == ">=")
    except ValueError:
        pass
    raise ValueError(f"evaluation.target must be METRIC>=NUMBER or METRIC<=NUMBER, as auc/click>=0.75, got {text!r}")
