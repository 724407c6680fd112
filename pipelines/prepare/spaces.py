"""Spaces of ids: every key of a log gets a number, by a dictionary that only grows or by a hash, or is one.

A dictionary is the table `SPACE_ids` (SPACE_key, SPACE_id), stored beside the samples; ids count from 1 in the order of
the keys, and 0 is the unknown: missing, too rare, or new.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from pipelines.features import NUMBER_KEYS, TEXT_KEYS, UNKNOWN_ID, Space
from pipelines.prepare.engine import quoted
from pipelines.prepare.log.readings import SIGNED, UNSIGNED, WIDEST
from pipelines.prepare.log.schema import SpaceOptions
from pipelines.prepare.state import waiting
from pipelines.storage.keys import HASH, LOWEST

logger = logging.getLogger(__name__)

WHOLE = frozenset({*SIGNED, *UNSIGNED, WIDEST})
"""DuckDB's types of the whole numbers that are read as keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """The place of a space's keys in the database."""

    table: str
    """The table that holds them."""
    column: str
    """The column of that table."""
    many: bool = False
    """Whether each value is a list of keys."""


def number_keys(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    sources: Sequence[Keys],
    options: SpaceOptions,
    known: Space | None = None,
    *,
    is_text: bool = False,
    of_label: bool = False,
) -> Space:
    """Make the dictionary of a space, unless its ids are made from the keys; where it is `known`, its ids stay and new
    keys get the next, rare ones once they have come often enough in all deliveries together.  The classes of a label,
    each an output of the models that predict it, get no more than there are rows.  `is_text` says how keys are read.

    Raises ValueError if a new space has more keys than the stated rows have room for.
    """
    if options.hash:
        assert options.rows is not None
        return Space(name=name, rows=options.rows, used=options.rows, hash=HASH)
    if options.unbounded:
        assert options.rows is not None
        kind = TEXT_KEYS if is_text else NUMBER_KEYS
        return Space(name=name, rows=options.rows, used=options.rows, unbounded=True, key_kind=kind)
    keys = " UNION ALL ".join(
        f"SELECT {'unnest' * source.many}({quoted(source.column)}) AS key FROM {source.table}" for source in sources
    )
    table, key, identifier = (quoted(f"{name}_{part}") for part in ("ids", "key", "id"))
    last, chosen = (known.used - 1, f"AND key NOT IN (SELECT {key} FROM {table})") if known else (0, "")
    counted = f"SELECT key, count(*) AS n FROM ({keys}) WHERE key IS NOT NULL {chosen} GROUP BY key"
    if options.min_count > 1:
        counted = _counted_on(connection, name, counted, options.min_count)
    connection.execute(
        f"CREATE TABLE new_keys AS SELECT key AS {key}, {last} + row_number() OVER (ORDER BY key) AS {identifier} FROM "
        f"({counted}) WHERE n >= {options.min_count}"
    )
    if known and of_label:
        _keep_to_rows(connection, known, key, identifier)
    if known:
        connection.execute(f"INSERT INTO {table} SELECT * FROM new_keys; DROP TABLE new_keys")
    else:
        connection.execute(f"ALTER TABLE new_keys RENAME TO {table}")
    _narrow(connection, table, key)
    used = int(connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]) + 1
    rows = used if options.rows is None else options.rows
    if used > rows and known is None:
        raise ValueError(f"space {name}: {used - 1} keys and the unknown need {used} rows, but rows is {rows}")
    return Space(name=name, rows=max(rows, used), used=used, keys=f"{name}_ids.parquet")


def _keep_to_rows(connection: duckdb.DuckDBPyConnection, known: Space, key: str, identifier: str) -> None:
    """Leave new keys without an id that there is no row for."""
    beyond = f"FROM new_keys WHERE {identifier} >= {known.rows}"
    [(count, first)] = connection.execute(f"SELECT count(*), min({key})::VARCHAR {beyond}").fetchall()
    if count:
        connection.execute(f"DELETE {beyond}")
        logger.warning(
            "%d new class(es) of %s, one is %r, find no row among its %d: they are unknown to models; to predict them, "
            "prepare the data set again, with more rows",
            *(count, known.name, first, known.rows),
        )


def _counted_on(connection: duckdb.DuckDBPyConnection, name: str, counted: str, min_count: int) -> str:
    """SQL (key, n) of keys without an id, with what earlier deliveries counted of them; what stays rare is kept."""
    table = quoted(waiting(name))
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (key VARCHAR, n BIGINT)")
    connection.execute(
        f"CREATE TABLE {quoted(f'{name}_counted')} AS SELECT c.key, c.n + coalesce(w.n, 0) AS n FROM ({counted}) AS c "
        f"LEFT JOIN {table} AS w ON c.key::VARCHAR = w.key"
    )
    connection.execute(
        f"DELETE FROM {table} WHERE key IN (SELECT key::VARCHAR FROM {quoted(f'{name}_counted')}); INSERT INTO {table} "
        f"SELECT key::VARCHAR, n FROM {quoted(f'{name}_counted')} WHERE n < {min_count}"
    )
    return f"FROM {quoted(f'{name}_counted')}"


def _narrow(connection: duckdb.DuckDBPyConnection, table: str, key: str) -> None:
    """Store keys that were read as the widest whole numbers in what holds them: Parquet has nothing so wide."""
    [(kind,)] = connection.execute(f"SELECT any_value(typeof({key})) FROM {table}").fetchall()
    if kind != WIDEST:
        return
    [(low, high)] = connection.execute(f"SELECT min({key}), max({key}) FROM {table}").fetchall()
    narrow = "DECIMAL(38, 0)"
    if low >= 0 and high < 1 << 64:
        narrow = "UBIGINT"
    if low >= -(1 << 63) and high < 1 << 63:
        narrow = "BIGINT"
    connection.execute(f"ALTER TABLE {table} ALTER {key} TYPE {narrow}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """Keys of a table that become ids."""

    space: Space
    """The space whose ids are made."""
    column: str
    """The column with the keys."""
    many: bool = False
    """Whether each value is a list of keys."""


def look_up(connection: duckdb.DuckDBPyConnection, table: str, lookups: Sequence[Lookup]) -> tuple[list[str], str]:
    """(SQL of the ids for each lookup, SQL of the joins that it takes behind `table AS t`)."""
    ids, joins = [], ""
    for number, lookup in enumerate(lookups):
        key, joined = f"t.{quoted(lookup.column)}", f"j{number}"
        if lookup.space.hash or lookup.space.unbounded:
            to_id = _key_itself(connection, table, lookup) if lookup.space.unbounded else _hash(lookup.space)
            made = f"list_transform({key}, lambda key: {to_id.format('key')})" if lookup.many else to_id.format(key)
            ids.append(f"coalesce({made}, {'[]' if lookup.many else UNKNOWN_ID})::BIGINT{'[]' * lookup.many}")
            continue
        dictionary, name, identifier = (quoted(f"{lookup.space.name}_{part}") for part in ("ids", "key", "id"))
        if lookup.many:
            dictionary, name, identifier = _lists(connection, table, lookup), "keys", "ids"
        joins += f" LEFT JOIN {dictionary} AS {joined} ON {key} = {joined}.{name}"
        ids.append(f"coalesce({joined}.{identifier}, {'[]' if lookup.many else UNKNOWN_ID})")
    return ids, joins


def _hash(space: Space) -> str:
    """SQL of the id of the key that is formatted into it."""
    return f"{UNKNOWN_ID + 1} + (md5_number_lower({{0}}::VARCHAR) % {space.rows - 1})::BIGINT"


def _key_itself(connection: duckdb.DuckDBPyConnection, table: str, lookup: Lookup) -> str:
    """SQL of the key that is formatted into it as a signed 64-bit number: whole numbers stay as they are, unsigned ones
    keep their bits, and of other keys it is their `HASH`.  0, which is the unknown id, becomes the lowest number.

    Raises ValueError if a whole number does not fit.
    """
    column = quoted(lookup.column)
    [(kind,)] = connection.execute(f"SELECT any_value(typeof({column})) FROM {table}").fetchall()
    number = "md5_number_lower({0}::VARCHAR)"
    if kind is not None and kind.removesuffix("[]") in WHOLE:
        number = "{0}"
        keys = f"SELECT {'unnest' * lookup.many}({column}) AS key FROM {table}"
        taken = f"count(*) FILTER (WHERE key IN ({LOWEST}, {-LOWEST}))"
        [(low, high, odd)] = connection.execute(f"SELECT min(key), max(key), {taken} FROM ({keys})").fetchall()
        if odd or (low is not None and (low < LOWEST or high >= 1 << 64 or (low < 0 and high > -LOWEST))):
            raise ValueError(
                f"space {lookup.space.name} is unbounded, but its keys reach from {low} to {high}: whole numbers must "
                f"lie in [{LOWEST + 1}, {-LOWEST - 1}] or in [0, {(1 << 64) - 1}], and not be {LOWEST} or {-LOWEST}, "
                "which stands for 0; let them be a hash or a dictionary"
            )
    wrapped = f"{number}::HUGEINT - CASE WHEN {number} >= {-LOWEST} THEN {1 << 64} ELSE 0 END"
    return f"CASE WHEN {number} = {UNKNOWN_ID} THEN {LOWEST} ELSE {wrapped} END"


def _lists(connection: duckdb.DuckDBPyConnection, table: str, lookup: Lookup) -> str:
    """A table (keys, ids) of the lists that occur: the same ones occur again and again, and are looked up once."""
    name, column = quoted(f"{table}: lists of {lookup.column}"), quoted(lookup.column)
    dictionary, key, identifier = (quoted(f"{lookup.space.name}_{part}") for part in ("ids", "key", "id"))
    connection.execute(
        f"CREATE TABLE {name} AS SELECT keys, list(coalesce({identifier}, {UNKNOWN_ID}) ORDER BY place) AS ids FROM "
        "(SELECT keys, unnest(keys) AS key, generate_subscripts(keys, 1) AS place FROM "
        f"(SELECT DISTINCT {column} AS keys FROM {table} WHERE len({column}) > 0)) AS u "
        f"LEFT JOIN {dictionary} AS d ON u.key = d.{key} GROUP BY keys"
    )
    return name
