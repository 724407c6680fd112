"""A generic event log: files with one row an event, whose columns are named on the command line or in a schema file.

This is the path that a company's own data takes.  Every column's meaning is in a `LogSchema`, wherever it comes from.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import time

import duckdb

from pipelines.features import ITEM_SPACE, USER_ID, Column, DatasetInfo, Part
from pipelines.prepare.engine import quoted
from pipelines.prepare.log.files import attribute_paths, log_paths, open_files
from pipelines.prepare.log.ids import (
    add_earlier_attributes,
    add_earlier_events,
    check_key_kinds,
    leave_out_late_rows,
    make_events,
    make_items,
    make_users,
    number_spaces,
    stored_keys,
)
from pipelines.prepare.log.readings import TEXT, IdType
from pipelines.prepare.log.rows import RowOptions, check_one_row_a_key, count_duplicates, read_rows
from pipelines.prepare.log.schema import PARTS, LogColumn, LogSchema, SpaceOptions, schema_from_dict
from pipelines.prepare.log.schema_file import read_schema
from pipelines.prepare.log.spellings import (
    Spelt,
    check_matches,
    check_spellings,
    warn_of_spellings,
    warn_of_strangers,
)
from pipelines.prepare.log.tables import (
    ITEMS,
    RAW,
    USERS,
    LogSources,
    attribute_columns,
    check_columns,
    optional_columns,
    raw_columns,
    raw_name,
    space_types,
)
from pipelines.prepare.log.text_encoding import UTF_8
from pipelines.prepare.log.times import NANOSECONDS
from pipelines.prepare.samples.stages import Load
from pipelines.prepare.source import USER_SPACE, Description, item_columns
from pipelines.storage.dataset_json import read_dataset_info

logger = logging.getLogger(__name__)

DAY = 86_400
"""Seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EventLogOptions:
    """Names of the log's columns."""

    schema: str = ""
    """A TOML file that says what the columns mean (pipelines/prepare/README.md), in place of the options that name
    columns: item and user attributes, lists of ids, numbers, labels, weights, spaces."""
    user_column: str = ""
    """The column that says who did it; any type."""
    item_column: str = ""
    """The column that says with which item; any type."""
    time_column: str = ""
    """The column that says when."""
    time_unit: str = "s"
    """How times are written: numbers of s, ms, us or ns since 1970; timestamp: dates and times, the year first, in UTC
    where they name no zone; or for other dates a pattern of strptime, such as "%m/%d/%Y %H:%M"."""
    action_columns: str = ""
    """Columns of 0 and 1, separated by commas, that become the actions; or one column of words with action_values."""
    action_values: str = ""
    """Words, separated by commas, that the one action column may hold; each is an action."""
    action_separator: str = ""
    """What divides several words in one cell of the action column, such as "|"; a list needs none.  A row whose cell is
    empty took no action then."""
    context_columns: str = ""
    """Columns, separated by commas, that become context features: a sample has the user's newest value that is known
    before its first candidate's second."""
    history_columns: str = ""
    """Columns of numbers, separated by commas, that become further history lists; a missing value becomes NaN."""
    encoding: str = ""
    """How files of text are encoded, as Python calls it, such as latin-1 or cp1252; UTF-8 if not given, and UTF-16
    where a file begins with its mark."""
    decimal: str = ""
    """What stands before decimals in numbers of text: "." in 1,593.81, "," in 1.593,81; if not given, numbers are
    written 1593.81."""
    request_column: str = ""
    """What was shown together: any type.  A user's events of one request become candidates of one sample, as events of
    one second always do; a missing value is no request."""
    sequence_column: str = ""
    """What orders events of equal times, such as an offset: any type, never missing; whole numbers by their size, also
    in text, then other text by its letters.  If not given, they keep the log's order: files by name, rows as they
    stand."""
    where: str = ""
    """An SQL condition on the log's columns, which are text in CSV files; rows that do not meet it are left out and
    counted."""
    skip_invalid: bool = False
    """Leave out and count rows that break a rule, by the rule, instead of ending at the first."""
    drop_duplicates: bool = False
    """Keep one of rows that are equal in every column read; otherwise they are only counted."""
    no_state: bool = False
    """Keep no state beside the samples, about as large as the log: no later delivery can be added with --extend."""
    extend: str = ""
    """A prepared data set, in place of --out: the log in --source is its next delivery and becomes a part of its own.
    Columns and samples are as the data set says; ids stay, new keys get new ones."""

    def log_schema(self) -> LogSchema:
        """The description of the log that these options are.  Raises ValueError if they contradict each other."""
        assert not self.extend, "an extension is described by the data set"
        described = read_schema(Path(self.schema)) if self.schema else self._named()
        if self.where and described.where:
            raise ValueError(f"--where {self.where!r} and the schema's where {described.where!r}: give one of them")
        return replace(
            described,
            where=self.where or described.where,
            skip_invalid=self.skip_invalid,
            drop_duplicates=self.drop_duplicates,
        )

    def __post_init__(self) -> None:
        given = [name for name in NAMING if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.schema and given:
            raise ValueError(f"{_flags(given)} has no effect with --schema, which says it")
        said = [*given, *(name for name in ("schema", "where", "no_state") if getattr(self, name))]
        if self.extend and said:
            raise ValueError(f"{_flags(said)} has no effect with --extend, which goes on as the data set began")
        lacking = [name for name in NEEDED if not getattr(self, name)]
        if not self.schema and not self.extend and lacking:
            raise ValueError(f"event_log needs {_flags(lacking)}, or --schema")

    def _named(self) -> LogSchema:
        """What the options that name columns say."""
        context = tuple(
            LogColumn(name=name, column=column, kind="id", space=USER_SPACE if name == USER_ID else name)
            for name, column in _named_after(self.context_columns)
        )
        history = tuple(
            LogColumn(name=name, column=column, kind="number") for name, column in _named_after(self.history_columns)
        )
        return LogSchema(
            user=self.user_column,
            item=self.item_column,
            time=self.time_column,
            time_unit=self.time_unit,
            actions=names(self.action_columns),
            action_values=names(self.action_values),
            action_separator=self.action_separator or None,
            columns={"sample": context, "event": history},
            request=self.request_column or None,
            sequence=self.sequence_column or None,
            encoding=self.encoding or UTF_8,
            decimal=self.decimal or None,
        )


NEEDED = ("user_column", "item_column", "time_column", "action_columns")
NAMING = (
    *(*NEEDED, "time_unit", "action_values", "action_separator"),
    *("context_columns", "history_columns", "encoding", "decimal", "request_column"),
    "sequence_column",
)
"""Options that say what a schema file says in their place."""


def _flags(options: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in options)


def names(text: str) -> tuple[str, ...]:
    """The parts of a list separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _named_after(text: str) -> list[tuple[str, str]]:
    """(name, column) of the columns in a list: a field of an object, user.country, is called user_country."""
    return [(column.replace(".", "_"), column) for column in names(text)]


def loader(options: EventLogOptions) -> Load:
    """What `prepare`, or for another delivery `extend`, calls for a log with these columns.

    Raises ValueError if the options or the data set to extend contradict themselves.
    """
    if not options.extend:
        return partial(_load, options.log_schema(), "", not options.no_state)
    known = read_dataset_info(options.extend)
    if "log" not in known.details:
        raise ValueError(f"dataset.json of {options.extend} does not describe a log; prepare it again with event_log")
    schema = schema_from_dict(known.details["log"])
    rare = SpaceOptions(min_count=known.details["options"]["min_count"])
    chosen = replace(
        schema,
        skip_invalid=options.skip_invalid,
        drop_duplicates=options.drop_duplicates,
        spaces={ITEM_SPACE: rare, **schema.spaces},
    )
    return partial(_load, chosen, options.extend, True)


def _load(
    schema: LogSchema,
    extend: str,
    keeps_state: bool,
    connection: duckdb.DuckDBPyConnection,
    source: Path,
    scratch: Path,
) -> Description:
    """Fill `events`, `users` and `items` from the files under `source`, which add to the data set in `extend`."""
    known = read_dataset_info(extend) if extend else None
    types, left_out = _read(schema, known, connection, source.resolve(), scratch)
    if known is not None:
        left_out |= leave_out_late_rows(connection, schema, skip=schema.skip_invalid)
        add_earlier_attributes(connection, schema)
        _check_any_row(connection, source, left_out)
    else:
        _check_weights(connection, schema)
    _warn_of_the_future(connection, schema.time)
    logger.info("looking for rows delivered twice")
    duplicates = count_duplicates(connection, RAW, drop=schema.drop_duplicates)
    logger.info("numbering keys")
    spaces = number_spaces(connection, schema, types, known)
    for name in spaces.keys() - {USER_SPACE, ITEM_SPACE}:
        if types[name].name == TEXT and spaces[name].keys is not None:
            warn_of_spellings(connection, spaces[name], known.spaces[name].used if known is not None else 0)
    make_events(connection, schema, spaces)
    duplicates["rows"] += add_earlier_events(connection, drop=schema.drop_duplicates)
    make_users(connection, schema, spaces)
    make_items(connection, schema, spaces)
    return Description(
        name="event_log",
        spaces=spaces,
        columns=(*item_columns(), *(_column(column, part) for part in PARTS for column in schema.of(part))),
        actions=schema.action_values or schema.actions,
        weight=schema.weight,
        keep_rate=schema.keep_rate,
        source=f"event log in {source.resolve()}",
        licence="not stated",
        changing=tuple(column.name for column in schema.told),
        keeps_state=keeps_state,
        details={"left_out": left_out, "duplicates": duplicates, "log": asdict(schema)},
    )


def _column(column: LogColumn, part: Part) -> Column:
    return Column(name=column.name, part=part, kind=column.kind, space=column.space)


def _read(
    schema: LogSchema,
    known: DatasetInfo | None,
    connection: duckdb.DuckDBPyConnection,
    source: Path,
    scratch: Path,
) -> tuple[dict[str, IdType], dict[str, int]]:
    """Fill the tables of the log and of attributes.

    Returns as what the ids of each space are read, and how many rows were left out, by what was wrong.
    """
    if not source.is_dir():
        raise ValueError(f"--source {source} is not a folder")
    # A later delivery need not bring files of users and items: these may say nothing new.
    paths = {
        name: attribute_paths(source, attributes.files, needed=known is None) if attributes else []
        for name, attributes in ((USERS, schema.users), (ITEMS, schema.items))
    }
    opened = partial(open_files, connection, scratch=scratch, encoding=schema.encoding)
    users, items = (
        opened(paths[name], optional=[column.column for column in attributes.columns] if attributes else [])
        for name, attributes in ((USERS, schema.users), (ITEMS, schema.items))
    )
    log = log_paths(source, leave_out=[path for found in paths.values() for path in found])
    optional = optional_columns(schema)
    described = optional if known is not None else []
    sources = LogSources(log=opened(log, optional=optional, described=described), users=users, items=items)
    check_columns(schema, sources)
    types = space_types(schema, sources, stored_keys(connection, known) if known is not None else ())
    if known is not None:
        check_key_kinds(known, types)
    options = RowOptions(where=schema.where, skip_invalid=schema.skip_invalid)
    left_out: dict[str, int] = {}
    for table, files, attributes, space in (
        (USERS, sources.users, schema.users, USER_SPACE),
        (ITEMS, sources.items, schema.items, ITEM_SPACE),
    ):
        if attributes is not None:
            columns = attribute_columns(attributes, space, schema, types)
            counts = read_rows(connection, files, table, columns, scratch, replace(options, where=None))
            left_out |= {f"{space}s: {what}": count for what, count in counts.items()}
            repeated = check_one_row_a_key(connection, table, files, attributes.key, skip=schema.skip_invalid)
            left_out |= {f"{space}s: {what}": count for what, count in repeated.items()}
    left_out |= read_rows(connection, sources.log, RAW, raw_columns(schema, types), scratch, options)
    _check_any_row(connection, source, left_out)
    _check_keys(connection, schema, sources, types, known)
    return types, left_out


def _check_any_row(connection: duckdb.DuckDBPyConnection, source: Path, left_out: Mapping[str, int]) -> None:
    """Raise ValueError if no row of the log is left."""
    [(rows,)] = connection.execute(f"SELECT count(*) FROM {RAW}").fetchall()
    if not rows:
        reasons = "; ".join(f"{what} ({count} rows)" for what, count in left_out.items())
        found = f"rows are left out, none remains: {reasons}" if left_out else "its files hold no row, a header is none"
        raise ValueError(f"the log in {source} holds no event: {found}")


def _check_weights(connection: duckdb.DuckDBPyConnection, schema: LogSchema) -> None:
    """Raise ValueError if no row has a weight above 0."""
    if schema.weight is None:
        return
    [column] = {raw_name(column) for column in schema.of("label") if column.column == schema.weight}
    [(heaviest,)] = connection.execute(f"SELECT max({quoted(column)}) FROM {RAW}").fetchall()
    if not heaviest > 0:
        raise ValueError(
            f"weight {schema.weight} is 0 in every row, so a model would learn from none: give weights above 0, or "
            "leave the weight out"
        )


def _warn_of_the_future(connection: duckdb.DuckDBPyConnection, column: str) -> None:
    """Say where times lie after tomorrow: all that is delivered before then would be late."""
    tomorrow = int((time() + DAY) * NANOSECONDS)
    [(count, newest)] = connection.execute(
        f"SELECT count(*), make_timestamp_ns(max(rank))::VARCHAR FROM {RAW} WHERE rank > {tomorrow}"
    ).fetchall()
    if count:
        logger.warning(
            "%s lies in the future in %d row(s), the newest at %s: they are evaluated, and no later delivery can begin "
            "before that; mend them, or leave them out by --where",
            *(column, count, newest),
        )


def _check_keys(
    connection: duckdb.DuckDBPyConnection,
    schema: LogSchema,
    sources: LogSources,
    types: Mapping[str, IdType],
    known: DatasetInfo | None,
) -> None:
    """Refuse keys of users and items that mean the same in two spellings, and attributes of others than the log's; warn
    of a delivery that has nothing in common with those before."""
    for table, files, attributes, space, column in (
        (USERS, sources.users, schema.users, USER_SPACE, "user_key"),
        (ITEMS, sources.items, schema.items, ITEM_SPACE, "item_key"),
    ):
        log, described = (
            Spelt(table=RAW, column=column, files=sources.log),
            Spelt(table=table, column="key", files=files),
        )
        tables = [log, *[described] * (attributes is not None)]
        earlier = None
        if known is not None and known.spaces[space].keys is not None:
            earlier = f"SELECT {quoted(f'{space}_key')}::VARCHAR AS key FROM {quoted(f'{space}_ids')}"
            warn_of_strangers(connection, space, log, earlier)
        if types[space].name == TEXT:
            check_spellings(connection, space, tables, earlier)
        # A later delivery may describe users and items of earlier ones.
        if attributes is not None and known is None:
            check_matches(connection, space, log, described)
