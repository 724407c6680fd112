"""Keys of users and items that programs spell in two ways: one key that would become two ids, or would match nothing.

Text is compared as it stands.  A tool that leaves blanks around a value, stores whole numbers as floats where a column
has gaps, or composes letters in another way than the next tool makes two users of one, without any wrong row.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from pipelines.features import Space
from pipelines.prepare.engine import quoted
from pipelines.prepare.log.files import LogFile
from pipelines.prepare.log.rows import place_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelt:
    """A table with keys, and the files that its rows come from."""

    table: str
    """The table's name; it has a column log_row."""
    column: str
    """The column with the keys."""
    files: Sequence[LogFile]
    """The files, in the order in which they were read."""


def check_spellings(
    connection: duckdb.DuckDBPyConnection, what: str, tables: Sequence[Spelt], earlier: str | None = None
) -> None:
    """Raise ValueError, with file and row, if two keys of text in these tables are the same but for how they are spelt.

    `what` is what the keys are of: user or item.  `earlier` is SQL of the keys that have an id already, each as text in
    a column `key`: a new one must not be one of them in another spelling.
    """
    keys = " UNION ".join(f"SELECT DISTINCT {quoted(each.column)}::VARCHAR AS key FROM {each.table}" for each in tables)
    keys = f"SELECT key, {f'key NOT IN ({earlier})' if earlier else 'true'} AS new FROM ({keys}) WHERE key IS NOT NULL"
    if earlier:
        keys += f" UNION SELECT key, false FROM ({earlier})"
    found = connection.execute(
        f"SELECT list(key ORDER BY new DESC, key)[:2] FROM ({keys}) GROUP BY {_meaning('key')} "
        "HAVING count(*) > 1 AND bool_or(new) ORDER BY 1 LIMIT 1"
    ).fetchall()
    if not found:
        return
    [(pair,)] = found
    rows: list[tuple[str, str]] = []
    if earlier:
        had = connection.execute(f"SELECT key FROM ({earlier}) WHERE key IN (?, ?)", pair).fetchall()
        rows += [(key, "an earlier delivery") for (key,) in had]
    for each in tables:
        key = f"{quoted(each.column)}::VARCHAR"
        firsts = f"SELECT {key}, min(log_row) FROM {each.table} WHERE {key} IN (?, ?) GROUP BY 1 ORDER BY 2"
        rows += [(key, place_of(each.files, row)) for key, row in connection.execute(firsts, pair).fetchall()]
    key, place = rows[-1]
    other, first = next((other, first) for other, first in rows if other != key)
    raise ValueError(
        f"{place}: the {what} {key!a} is {other!a} in {first}; spelt in two ways it would be two {what}s, so write it "
        "in one"
    )


def warn_of_strangers(connection: duckdb.DuckDBPyConnection, what: str, log: Spelt, earlier: str) -> None:
    """Say where a delivery has no user, or no item, that an earlier one had: its keys may be of another kind."""
    key = f"{quoted(log.column)}::VARCHAR"
    known = f"SELECT 1 FROM {log.table} WHERE {key} IN ({earlier}) LIMIT 1"
    if connection.execute(known).fetchall():
        return
    [(count, shown)] = connection.execute(f"SELECT count(DISTINCT {key}), min({key}) FROM {log.table}").fetchall()
    [(had,)] = connection.execute(f"SELECT min(key) FROM ({earlier})").fetchall()
    logger.warning(
        "none of the %d %ss of this delivery was in an earlier one: one here is %r, one there %r; are they keys of one "
        "kind?",
        *(count, what, shown, had),
    )


def warn_of_spellings(connection: duckdb.DuckDBPyConnection, space: Space, first: int) -> None:
    """Say where two keys of text, at least one with an id from `first` on, are the same but for how they are spelt.

    Of words of a query they may be two; users and items are refused (`check_spellings`).
    """
    key, identifier, table = (quoted(f"{space.name}_{part}") for part in ("key", "id", "ids"))
    [(count, pair)] = connection.execute(
        f"SELECT count(*), min(pair) FROM (SELECT list({key} ORDER BY {identifier} DESC)[:2] AS pair FROM {table} "
        f"GROUP BY {_meaning(key)} HAVING count(*) > 1 AND max({identifier}) >= {first})"
    ).fetchall()
    if count:
        logger.warning(
            "%d key(s) of the space %s are spelt in two ways, as %a and %a: they are two ids, each of which learns "
            "from its rows alone; write them in one way unless they mean two things",
            *(count, space.name, *pair),
        )


def check_matches(connection: duckdb.DuckDBPyConnection, what: str, log: Spelt, attributes: Spelt) -> None:
    """Raise ValueError if the files of attributes know none of the log's users or items."""
    key, other = quoted(log.column), quoted(attributes.column)
    [(matching,)] = connection.execute(
        f"SELECT count(*) FROM {log.table} WHERE {key} IN (SELECT {other} FROM {attributes.table})"
    ).fetchall()
    if matching:
        return
    [(of_log,)] = connection.execute(f"SELECT arg_min({key}, log_row)::VARCHAR FROM {log.table}").fetchall()
    [(known,)] = connection.execute(f"SELECT arg_min({other}, log_row)::VARCHAR FROM {attributes.table}").fetchall()
    has = "it has no row" if known is None else f"its first key is {known!r}"
    raise ValueError(
        f"{attributes.files[0].path} knows no {what} of the log, nor do the files beside it: {has}, the log's first "
        f"{what} is {of_log!r}; is the key the right column?"
    )


def _meaning(key: str) -> str:
    """SQL of the same text for keys that differ in blanks around them, `.0`, an exponent, or composed letters alone."""
    text = f"nfc_normalize(regexp_replace({key}, '^[\\s\\x{{a0}}]+|[\\s\\x{{a0}}]+$', '', 'g'))"
    exponent = "[+-]?[0-9]+([.][0-9]+[eE][+]?|[eE][+])[0-9]+"
    number = f"TRY_CAST({text} AS DOUBLE)"
    whole = f"CASE WHEN abs({number}) < 1e18 AND {number} = trunc({number}) THEN {number}::BIGINT::VARCHAR END"
    return (
        f"CASE WHEN regexp_full_match({text}, '[+-]?[0-9]+[.]0+') THEN regexp_replace({text}, '[.]0+$', '') "
        f"WHEN regexp_full_match({text}, '{exponent}') THEN coalesce({whole}, {text}) ELSE {text} END"
    )
