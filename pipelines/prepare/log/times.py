"""Times in a log, however written: read exactly, as nanoseconds since 1970; those of another unit are told apart."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import duckdb

from pipelines.prepare.engine import literal, quoted
from pipelines.prepare.log.readings import EXACT, SIGNED, TEXT, Reading, Rule, Stored

NANOSECONDS = 10**9
"""Nanoseconds of a second.  Times are read in them, the finest unit that a file holds."""
TIMESTAMP = "timestamp"
PER_SECOND: Mapping[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": NANOSECONDS}
"""Units of numbers in a second."""
YEAR_1990, YEAR_2100 = 631_152_000, 4_102_444_800
"""A time outside these is in another unit than was said, or stands for none."""
DIGITS, EXPONENT = "[.](\\d*)[eE]", "[eE][+]?(\\d+)"
"""Parts of a number in text that has an exponent: its decimals, and how many of them stand before the point."""
DATE_OF_DIGITS = "%Y(%[mdHMS])+"
"""Patterns of dates as whole numbers, such as 20240131: the year comes first, so that no 0 before them is lost."""
EXAMPLE = "'%m/%d/%Y %H:%M' (month first) or '%d.%m.%Y %H:%M'"
"""Patterns of dates that their own text does not tell apart."""
WORD, ZONE = "(?i)[^a-z/_][a-z]{2,}\\s*$", "(?i)\\b(utc|gmt)\\b|[a-z]/[a-z]"
"""A word at the end of a time, and zones that one word or AREA/CITY names; of others several have the same letters."""

_MINUTES, _TOO_MANY = ":?\\d\\d", ":?[6-9]\\d"
TOO_FAR = (
    f"(:[\\d.,]*|\\s)\\s*[+-](19|[2-9]\\d|18:?(0[1-9]|[1-9]\\d)|\\d\\d({_MINUTES})?{_TOO_MANY})({_MINUTES})*(\\s|$)"
)
"""A distance from UTC of more than 18 hours, or with more than 59 minutes or seconds, behind a time of the day."""
PLACE = "[A-Za-z_]+/[A-Za-z_/+-]+"
"""A zone that is told by its place."""
TURNED_BACK = ("30 MINUTES", "1 HOUR")
"""By how much clocks are turned back at a summer's end."""


def check_unit(unit: str) -> None:
    """Raise ValueError unless it says how times are written: a unit, timestamp, or a pattern of strptime."""
    if unit in PER_SECOND or unit == TIMESTAMP:
        return
    if "%" not in unit:
        raise ValueError(
            f"the time unit must be one of {', '.join(PER_SECOND)}, {TIMESTAMP}, or how dates are written, such as "
            f"{EXAMPLE}; got {unit}"
        )
    if ("%I" in unit or "%-I" in unit) and "%p" not in unit:
        raise ValueError(
            f"the time unit {unit!r} has hours of half a day (%I) and does not say which half: add %p, or say %H for "
            "hours from 0 to 23"
        )
    try:
        duckdb.execute(f"SELECT strptime('', {literal(unit)}) WHERE false")
    except duckdb.Error as error:
        raise ValueError(f"the time unit {unit!r} is no pattern of strptime: {str(error).splitlines()[0]}") from error


def read_time(stored: Stored, unit: str) -> Reading:
    """When, as a whole number of nanoseconds since 1970 (BIGINT), whatever the unit.

    Raises ValueError if the column holds lists or truths, or a pattern is given for what is no text.
    """
    name = stored.name
    if stored.is_list or stored.type == "BOOLEAN":
        raise ValueError(f"{stored.path} stores {name} as {stored.type}, one time a row was expected")
    nanoseconds, rules = _number(stored, unit) if unit in PER_SECOND else _date(stored, unit)
    second = f"{nanoseconds} // {NANOSECONDS}"
    for bound, text in (
        (f"{second} >= {YEAR_1990}", f"{name} lies before 1990: is --time-unit {unit} right?"),
        (f"{second} < {YEAR_2100}", f"{name} lies after the year 2100: is --time-unit {unit} right?"),
    ):
        rules.append(Rule(condition=bound, text=text, column=name, explain=partial(likely_unit, unit=unit)))
    return Reading(value=f"TRY_CAST({nanoseconds} AS BIGINT)", rules=tuple(rules))


def _number(stored: Stored, unit: str) -> tuple[str, list[Rule]]:
    """SQL of nanoseconds (HUGEINT) in a number of units, and what must hold of it."""
    name, column = stored.name, quoted(stored.name)
    size = NANOSECONDS // PER_SECOND[unit]
    if stored.type in SIGNED:
        nanoseconds = f"({column}::HUGEINT * {size})"
    else:
        nanoseconds = f"TRY_CAST(TRY(TRY_CAST({column} AS DECIMAL(38, 9)) * {size}) AS HUGEINT)"
    text = (
        f"{name} must hold numbers of {unit} since 1970, none negative or missing; for another unit, or dates and "
        "times, give --time-unit"
    )
    rules = [Rule(condition=f"{nanoseconds} >= 0", text=text, column=name)]
    if stored.type == TEXT:
        # 1.70409E+09, as spreadsheets write it, is 1704090000 or any second near it.
        digits, exponent = (f"regexp_extract({column}, {literal(part)}, 1)" for part in (DIGITS, EXPONENT))
        whole = f"{exponent} = '' OR len({digits}) >= TRY_CAST({exponent} AS INTEGER)"
        text = f"{name} is written with an exponent and too few digits, which rounds it: write whole numbers"
        rules.append(Rule(condition=whole, text=text, column=name))
    if stored.type in EXACT:
        # A float of seconds is exact to a part of a microsecond; what stands behind is none of the log's.
        nanoseconds = f"round({nanoseconds}, -3)"
        text = f"{name} is stored as {stored.type}, which rounds such numbers of {unit}: write integers"
        rules.append(Rule(condition=f"abs({column}) < {EXACT[stored.type]}", text=text, column=name))
    return nanoseconds, rules


def _date(stored: Stored, unit: str) -> tuple[str, list[Rule]]:
    """SQL of nanoseconds (HUGEINT) in dates and times, and what must hold of them."""
    name, column = stored.name, quoted(stored.name)
    time, form = column, "dates and times"
    if unit != TIMESTAMP:
        if stored.type in SIGNED and re.fullmatch(DATE_OF_DIGITS, unit):
            # 2024113 may be the 13th of January or the 3rd of November.
            whole = f"len({column}::VARCHAR) = {2 + 2 * unit.count('%')}"
            column = f"CASE WHEN {whole} THEN {column}::VARCHAR END"
        elif stored.type != TEXT:
            raise ValueError(
                f"{stored.path} stores {name} as {stored.type}, of which no pattern is needed: leave out "
                f"--time-unit {unit!r}, or say {TIMESTAMP}"
            )
        time, form = f"try_strptime({column}, {literal(unit)})", f"dates and times like {unit}"
    elif stored.type == TEXT:
        # Some programs leave a blank before the zone.
        time = f"regexp_replace({column}, ' ([+-]\\d)', '\\1')"
    # Nanoseconds end in 2262: what lies behind is read to be told as what it is.
    exact, any_year = (f"TRY_CAST({time} AS {kind})" for kind in ("TIMESTAMPTZ_NS", "TIMESTAMPTZ"))
    nanoseconds = f"coalesce(TRY(epoch_ns({exact}))::HUGEINT, epoch_us({any_year})::HUGEINT * 1000)"
    text = (
        f"{name} must hold {form} from 1970 on, none missing; for numbers give another --time-unit, for dates in "
        f"another form a pattern, such as {EXAMPLE}"
    )
    rules = [Rule(condition=f"{nanoseconds} >= 0", text=text, column=name)]
    if stored.type == TEXT:
        exact = f"NOT regexp_matches({column}, '[.]\\d{{9}}\\d*[1-9]')"
        text = f"{name} is finer than nanoseconds: write at most nine decimals"
        rules.append(Rule(condition=exact, text=text, column=name))
        # To the engine BST is Dhaka's time and CST Chicago's.
        named = f"regexp_matches({column}, {literal(ZONE)})"
        if unit == TIMESTAMP:
            named = f"NOT regexp_matches({column}, {literal(WORD)}) OR {named}"
        text = (
            f"{name} names a zone by letters that several have, or not at all: write its distance from UTC (+01:00), "
            "UTC, GMT or its place (Europe/London)"
        )
        if unit == TIMESTAMP or "%Z" in unit:
            rules.append(Rule(condition=named, text=text, column=name))
            rules.append(_told_apart(column, any_year, name))
        if unit == TIMESTAMP or "%z" in unit:
            near = f"NOT regexp_matches({column}, {literal(TOO_FAR)})"
            text = f"{name} has a distance from UTC that no zone has: write at most 18:00, and minutes below 60"
            rules.append(Rule(condition=near, text=text, column=name))
    return nanoseconds, rules


def _told_apart(column: str, time: str, name: str) -> Rule:
    """That a place's clock shows a time (SQL, TIMESTAMPTZ) once, not again after it has been turned back."""
    said = f"regexp_extract({column}, {literal(PLACE)})"
    # The engine ends at a place that it does not know, of which the time is NULL.
    place = f"CASE WHEN {said} = '' OR {time} IS NULL THEN 'UTC' ELSE {said} END"
    before = " AND ".join(
        f"timezone({place}, {time} - INTERVAL {by}) <> timezone({place}, {time})" for by in TURNED_BACK
    )
    return Rule(
        condition=f"{time} IS NULL OR ({before})",
        text=f"{name} is a time that the clock of its place shows twice, as it is turned back: write its distance from "
        "UTC (+01:00) in place of the place",
        column=name,
    )


def likely_unit(shown: str, unit: str) -> str:
    """What a message says of a time, as a file has it, that lies before 1990 or after 2100."""
    fitting = []
    if unit in PER_SECOND:
        time = int(Decimal(shown))
        fitting = [
            f"{other} it is {datetime.fromtimestamp(time // size, UTC):%Y-%m-%d}"
            for other, size in PER_SECOND.items()
            if YEAR_1990 <= time // size < YEAR_2100
        ]
    if not fitting:
        return "no unit makes it a time between 1990 and 2100; give the time of the event, or leave the row out"
    return f"in {' and in '.join(fitting)}: give that --time-unit, and all rows the same one"
