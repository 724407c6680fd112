"""A made-up log whose catalogue drifts: items are born, are clicked as often as they please, and die."""

import csv
from pathlib import Path

import numpy as np

BEGIN = 1_700_000_000
"""Seconds since 1970 of the first event."""
SECONDS = 60
"""Between two events."""
USERS = 60
"""Users, each event by one of them at random."""


def write_drifting_log(path: Path, *, events: int, alive: int, lives: int, seed: int = 0) -> None:
    """CSV of `user,item,at,click,seller`: `alive` items at a time, of which all are replaced `lives` times.

    Items are random 64-bit numbers, one of them 0; a click depends on what the item pleases, and on the user a little.
    Every item has a seller of its own, whose name is text.
    """
    draw = np.random.default_rng(seed)
    number = alive * (lives + 1)
    keys = draw.integers(-(2**62), 2**62, number)
    keys[7] = 0
    pleases, friendly = 1.5 * draw.standard_normal(number), 0.5 * draw.standard_normal(USERS)
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["user", "item", "at", "click", "seller"])
        for event in range(events):
            # The oldest item dies and a new one is born at equal intervals.
            item = event * alive * lives // events + int(draw.integers(alive))
            user = int(draw.integers(USERS))
            click = draw.random() < 1 / (1 + np.exp(-pleases[item] - friendly[user]))
            lines.writerow([user, keys[item], BEGIN + event * SECONDS, int(click), f"seller {item}"])
