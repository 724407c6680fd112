"""Units of time in a log: reading a time exactly, and telling a unit that cannot be the right one."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

from pipelines.prepare.engine import quoted
from pipelines.prepare.readings import EXACT, SIGNED, TEXT, Reading, Rule, Stored

TIMESTAMP = "timestamp"
PER_SECOND: Mapping[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9, TIMESTAMP: 10**9}
"""Units of time in a second; dates and times are counted in nanoseconds, the finest that a file holds."""
YEAR_1990, YEAR_2100 = 631_152_000, 4_102_444_800
"""A time outside these is in another unit than was said, or stands for none."""


def read_time(stored: Stored, unit: str) -> Reading:
    """When, as a whole number of units since 1970 (BIGINT).

    Raises ValueError if the column holds lists.
    """
    name, column = stored.name, quoted(stored.name)
    if stored.is_list:
        raise ValueError(f"{stored.path} stores {name} as {stored.type}, one time a row was expected")
    rules = []
    if unit == TIMESTAMP:
        micros = f"epoch_us(TRY_CAST({column} AS TIMESTAMPTZ))"
        value = f"TRY_CAST({micros}::HUGEINT * 1000 AS BIGINT)"
        if stored.type in ("TIMESTAMP_NS", "TIMESTAMPTZ_NS"):
            value = f"TRY(epoch_ns({column}))"
        text = f"{name} must hold dates and times from 1970 on, none missing; for numbers give another --time-unit"
        later = f"coalesce({micros} // 1000000, 0)"
        rules.append(Rule(condition=f"{micros} >= 0", text=text, column=name))
        if stored.type == TEXT:
            exact = f"NOT regexp_matches({column}, '\\.\\d{{6}}\\d*[1-9]')"
            text = f"{name} is finer than microseconds, which text does not carry: store timestamps, or numbers in ns"
            rules.append(Rule(condition=exact, text=text, column=name))
    else:
        # As exact as any whole number, with its fraction if it has one.
        number = column if stored.type in SIGNED else f"TRY_CAST({column} AS DECIMAL(38, 9))"
        value = f"TRY_CAST({number} AS BIGINT)"
        text = (
            f"{name} must hold whole numbers of {unit} since 1970, none negative or missing; for another unit, or "
            "dates and times, give --time-unit"
        )
        later = f"{number} // {PER_SECOND[unit]}"
        rules.append(Rule(condition=f"{number} >= 0 AND {number} % 1 = 0", text=text, column=name))
        if stored.type in EXACT:
            text = f"{name} is stored as {stored.type}, which rounds such numbers of {unit}: write integers"
            rules.append(Rule(condition=f"abs({column}) < {EXACT[stored.type]}", text=text, column=name))
    for bound, text in (
        (f"{later} >= {YEAR_1990}", f"{name} lies before 1990: is --time-unit {unit} right?"),
        (f"{later} < {YEAR_2100}", f"{name} lies after the year 2100: is --time-unit {unit} right?"),
    ):
        rules.append(Rule(condition=bound, text=text, column=name, explain=partial(likely_unit, unit=unit)))
    return Reading(value=value, rules=tuple(rules))


def likely_unit(shown: str, unit: str) -> str:
    """What a message says of a time, as a file has it, that lies before 1990 or after 2100."""
    fitting = []
    if unit != TIMESTAMP:
        time = int(Decimal(shown))
        fitting = [
            f"{other} it is {datetime.fromtimestamp(time // size, UTC):%Y-%m-%d}"
            for other, size in PER_SECOND.items()
            if other != TIMESTAMP and YEAR_1990 <= time // size < YEAR_2100
        ]
    if not fitting:
        return "no unit makes it a time between 1990 and 2100; give the time of the event, or leave the row out"
    return f"in {' and in '.join(fitting)}: give that --time-unit, and all rows the same one"
