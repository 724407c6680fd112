"""Quotes in CSV files of programs that do not double them: of values, they would make several rows one value.

A quote that begins a value ends with the next one that ends a value, perhaps lines later; the rows between are lost
without any wrong row.
"""

from collections.abc import Sequence
from pathlib import Path

from pipelines.prepare.engine import literal, quoted
from pipelines.prepare.log.readings import Rule

END = "(\\r\\n|\\n|\\r)"
"""The end of a line, as a regular expression."""
MOST_REPEATS = 1000
"""How often the engine lets a part of a regular expression repeat."""


def has_values_of_several_lines(plain: Path) -> bool:
    """Whether a line of a CSV file ends within quotes."""
    with plain.open("rb") as stream:
        return any(line.count(b'"') % 2 for line in stream)


def quote_rules(names: Sequence[str], delimiter: str) -> list[Rule]:
    """Rules for all columns, given in their order: no value is the rest of a row, whole rows and the start of a row."""
    rules, cell, last = [], f"[^{delimiter}\\r\\n]*", len(names) - 1
    for place, name in enumerate(names if last <= MOST_REPEATS else ()):
        rest, whole, begun = (f"({cell}[{delimiter}]){{{count}}}{cell}" for count in (last - place, last, place))
        column = quoted(name)
        merged = f"regexp_full_match({column}, {literal(f'{rest}{END}({whole}{END})*{begun}')})"
        rules.append(
            Rule(
                condition=f"NOT CASE WHEN contains({column}, chr(10)) THEN {merged} ELSE false END",
                text=f"{name} begins with a quote that ends in a later line, and each of these lines looks like a row: "
                'double quotes that are part of a value (as in """so"" he said"), or write the log as Parquet',
                column=name,
            )
        )
    return rules
