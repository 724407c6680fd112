"""How counts are smoothed into rates, and how many numbers that makes.  Standard library only."""

from collections.abc import Iterable

from pipelines.counts import ITEM, USER, USER_ITEM

RATE_PRIORS = (1.0, 10.0, 100.0)
"""Imagined observations at the overall rate with which each count is smoothed: how much a count is worth differs from
log to log, and a model mixes them."""
START_PRIOR = 10.0
"""The one of them with which an untrained model predicts."""


def rate_priors(group: str) -> tuple[float, ...]:
    """The priors of a group of counts: further groups than item, user and both are many, and one tells what they know;
    three each let rare actions be learnt by heart."""
    return RATE_PRIORS if group in (ITEM, USER, USER_ITEM) else (START_PRIOR,)


def rate_width(groups: Iterable[str], num_actions: int) -> int:
    """Numbers made of these groups of counts: of each, how often it was seen, and a rate an action and prior."""
    return sum(1 + len(rate_priors(group)) * num_actions for group in groups)
