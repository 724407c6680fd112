"""How a value of a log is read: SQL for it, and the rules that a row must keep, by the type in which a file stores it.

Files of one log may store a column differently.  As what ids are read is found over all files before any is read
(`id_type`): whole numbers become one type that holds them all, everything else is text, and so are numbers beside text.
Values that would be merged, rounded or reordered by that are refused where they stand.

A value is missing where it is null, NaN (whole numbers with gaps are often stored as floats), empty text, or a text
that the description of the log names.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.known_numbers import LARGEST
from pipelines.prepare.engine import literal, quoted

TEXT = "VARCHAR"
"""The type in which columns of CSV files are read first."""
NULL = '"NULL"'
"""The engine's type of a column that holds nothing but nulls."""
SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
"""Whole numbers that a BIGINT holds."""
UNSIGNED = ("UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
WIDEST = "HUGEINT"
EXACT = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}
"""From here on, whole numbers may have been rounded where they are stored in this type."""
BRACKETS = r"\[.*\]|\{.*\}|\(.*\)"
"""How lists are written as text by programs that write Python, JSON or SQL."""
IDS_AS_TEXT = ("BOOLEAN", "UUID", "DATE", "TIMESTAMP", "TIMESTAMP_NS", "TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ_NS")
"""Other types whose values, as text, serve as ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What every row must keep."""

    condition: str
    """SQL that is true of a good row."""
    text: str
    """What is demanded, beginning with the column's name."""
    column: str
    """The column whose value a message shows."""
    explain: Callable[[str], str] | None = None
    """What a message adds, given the value as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One column of one file, read."""

    value: str
    """SQL of the value, null where it is missing or breaks a rule: no row makes it fail."""
    rules: tuple[Rule, ...] = ()
    """What its values must keep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A column as a file stores it."""

    path: Path
    """The file, for messages."""
    name: str
    """The column's name."""
    type: str
    """The column's SQL type."""

    @property
    def element(self) -> "Stored":
        """What its lists hold, if it holds lists."""
        return replace(self, type=self.type.removesuffix("[]"))

    @property
    def is_list(self) -> bool:
        """Whether each value is a list."""
        return self.type.endswith("[]")


@dataclass(frozen=True, kw_only=True, slots=True)
class IdType:
    """The type in which the ids of a space are read."""

    name: str
    """The type's name in SQL."""
    beside: str | None = None
    """The type of values in other files that are read as text because text stands beside them."""


def id_type(columns: Iterable[Stored]) -> IdType:
    """The type in which the ids of these columns are read; it does not depend on their order.

    Raises ValueError if two files store them in types that have none in common, or a file in one that holds no ids.
    """
    found: dict[str, dict[str, Stored]] = {}
    for stored in columns:
        if stored.type != NULL:
            found.setdefault(_family(stored), {}).setdefault(stored.type, stored)
    has_text = found.pop(TEXT, None) is not None
    if len(found) > 1:
        one, other = sorted((next(iter(types.values())) for types in found.values()), key=lambda each: str(each.path))
        raise ValueError(
            f"{other.path} stores {other.name} as {other.type}, but {one.path} stores {one.name} as {one.type}: write "
            "it in one type"
        )
    family = next(iter(found), None)
    if not has_text and family == WIDEST:
        return IdType(name=_whole_type(found[family]))
    # A date, a UUID and true are text to every other program, and to requests.
    return IdType(name=TEXT, beside=family)


def _whole_type(types: Iterable[str]) -> str:
    """The narrowest type of whole numbers that holds all of these."""
    kinds = set(types)
    if kinds <= {*SIGNED, *EXACT}:
        return "BIGINT"
    return "UBIGINT" if kinds <= set(UNSIGNED) else WIDEST


def _family(stored: Stored) -> str:
    """Types of one family are read as one type."""
    kind = stored.type
    if _is_text(kind) or kind == "BLOB":
        return TEXT
    if kind in IDS_AS_TEXT:
        return kind
    if _is_number(kind):
        return WIDEST
    what = "which cannot be an id" + "; name a field of it, OBJECT.FIELD" * kind.startswith("STRUCT(")
    if stored.is_list:
        what = "lists where one id a row was expected: write one row an event, or for columns of many ids say [space]"
    raise ValueError(f"{stored.path} stores {stored.name} as {kind}, {what}")


def _is_text(kind: str) -> bool:
    return kind == TEXT or kind.startswith("ENUM")


def _is_number(kind: str) -> bool:
    return kind in {*SIGNED, *UNSIGNED, *EXACT, WIDEST, "UHUGEINT"} or kind.startswith("DECIMAL")


def missing(value: str, kind: str, texts: Sequence[str]) -> str:
    """SQL that is true where a value of this type is missing; `texts` are spellings besides empty text."""
    if kind in EXACT:
        return f"({value} IS NULL OR isnan({value}))"
    if _is_text(kind):
        return f"({value} IS NULL OR trim({value}::VARCHAR) IN ({', '.join(map(literal, ('', *texts)))}))"
    return f"({value} IS NULL)"


def read_id(stored: Stored, target: IdType, texts: Sequence[str], *, required: bool = False) -> Reading:
    """One id a row, as the type that `id_type` found; with `required`, none may be missing."""
    column = quoted(stored.name)
    absent = missing(column, stored.type, texts)
    value, wrong = _id(column, stored, target)
    rules = [Rule(condition=f"NOT {absent}", text=f"{stored.name} must not be missing", column=stored.name)] * required
    if wrong is not None:
        condition, text = wrong
        rules.append(Rule(condition=f"{absent} OR ({condition})", text=text, column=stored.name))
    return Reading(value=f"CASE WHEN NOT {absent} THEN {value} END", rules=tuple(rules))


def read_ids(stored: Stored, target: IdType, texts: Sequence[str], separator: str | None) -> Reading:
    """Any number of ids a row: a list, or text divided at `separator`; missing lists and parts are left out."""
    column, rules = quoted(stored.name), []
    if stored.type == NULL:
        return Reading(value=f"CAST([] AS {target.name}[])")
    if _is_text(stored.type) and separator:
        values, part = f"string_split({column}, {literal(separator)})", replace(stored, type=TEXT)
        values = f"list_transform({values}, lambda part: trim(part))"
        # Parts of ["a","b"] would be five keys of two: with a bracket before, behind or neither.
        rules.append(
            Rule(
                condition=f"NOT coalesce(regexp_full_match(trim({column}), '{BRACKETS}', 's'), false)",
                text=f"{stored.name} must hold keys with {separator!r} between them, without brackets around",
                column=stored.name,
            )
        )
    elif stored.is_list:
        values, part = column, stored.element
    else:
        raise ValueError(
            f"{stored.path} stores {stored.name} as {stored.type}, but many ids were expected: give lists, or text "
            "with a separator"
        )
    known = f"list_filter({values}, lambda part: NOT {missing('part', part.type, texts)})"
    value, wrong = _id("part", part, target)
    if wrong is not None:
        condition, text = wrong
        bad = f"len(list_filter({known}, lambda part: ({condition}) IS NOT TRUE))"
        rules.append(Rule(condition=f"coalesce({bad}, 0) = 0", text=text, column=stored.name))
    return Reading(value=f"coalesce(list_transform({known}, lambda part: {value}), [])", rules=tuple(rules))


def _id(value: str, stored: Stored, target: IdType) -> tuple[str, tuple[str, str] | None]:
    """SQL of a known id as the target type, and what must hold of it: (SQL, text)."""
    name, kind = stored.name, stored.type
    if kind == "BLOB":
        text = f"TRY(decode({value}))"
        return text, (
            f"{text} IS NOT NULL",
            f"{name} must hold text in UTF-8: write other bytes as text, such as hexadecimal",
        )
    if _is_text(kind):
        return f"{value}::VARCHAR", _spelling(value, name, target.beside) if target.beside else None
    if kind in EXACT or kind.startswith("DECIMAL"):
        condition, text = f"{value} = trunc({value})", f"{name} must hold whole numbers or text, fractions are no ids"
        if kind in EXACT:
            condition += f" AND abs({value}) < {EXACT[kind]}"
            text += f"; numbers from {EXACT[kind]} on may have been rounded to {kind}: write integers"
        number = f"TRY_CAST({value} AS {WIDEST if target.name == TEXT else target.name})"
        return (f"{number}::VARCHAR" if target.name == TEXT else number), (condition, text)
    return f"TRY_CAST({value} AS {target.name})", None


def _spelling(value: str, name: str, beside: str) -> tuple[str, str]:
    """Beside values of another type, text that means one must be spelt as it is: is 007 the id 7, or another?"""
    means = f"TRY_CAST({value} AS {'DOUBLE' if beside == WIDEST else beside})"
    text = (
        f"{name} is stored as {'numbers' if beside == WIDEST else beside} in other files: spell it in the same way here"
    )
    return f"{means} IS NULL OR TRY_CAST({value} AS {beside})::VARCHAR = {value}", text


def read_number(stored: Stored, texts: Sequence[str], decimal: str | None = None) -> Reading:
    """A number a row as DOUBLE; `decimal` stands before decimals of text, the other of . and , between thousands."""
    column, kind = quoted(stored.name), stored.type
    if kind == NULL:
        return Reading(value="NULL::DOUBLE")
    if not (_is_text(kind) or _is_number(kind) or kind == "BOOLEAN"):
        fix = "; give each number of a list a column of its own" * stored.is_list
        raise ValueError(f"{stored.path} stores {stored.name} as {kind}, but numbers were expected{fix}")
    absent = missing(column, kind, texts)
    number = f"TRY_CAST({_plain_number(column, decimal) if _is_text(kind) and decimal else column} AS DOUBLE)"
    # Text may spell NaN in ways that are not listed; it is greater than all numbers.
    value = f"CASE WHEN NOT {absent} AND abs({number}) <= {LARGEST} THEN {number} END"
    known = f"{absent} OR isnan({number}) OR abs({number}) <= {LARGEST}"
    text = f"{stored.name} must hold finite numbers"
    if _is_text(kind):
        text += {
            None: ", with a point before decimals and nothing between thousands; else say --decimal (decimal in a "
            "schema file)",
            ".": ", written as 1,593.81 or 1593.81",
            ",": ", written as 1.593,81 or 1593,81",
        }[decimal]
    text += f"; none lies beyond {LARGEST:.4g}, leave a cell empty whose value is missing"
    rule = Rule(condition=known, text=text, column=stored.name)
    return Reading(value=value, rules=(rule,))


def _plain_number(column: str, decimal: str) -> str:
    """SQL of text with a point before decimals and nothing between thousands; no number where these are ill-placed."""
    other = "," if decimal == "." else "."
    parted = f"regexp_full_match(trim({column}), '[+-]?\\d{{1,3}}([{other}]\\d{{3}})+([{decimal}]\\d*)?')"
    whole = f"replace({column}, '{other}', CASE WHEN {parted} THEN '' ELSE '?' END)"
    return f"replace({whole}, '{decimal}', '.')"


def read_flag(stored: Stored) -> Reading:
    """A label of 0 and 1 a row, as INTEGER."""
    column = quoted(stored.name)
    if not (_is_text(stored.type) or _is_number(stored.type) or stored.type in ("BOOLEAN", NULL)):
        raise ValueError(f"{stored.path} stores {stored.name} as {stored.type}, but labels of 0 and 1 were expected")
    flag = f"TRY_CAST({column} AS DOUBLE)"
    if _is_text(stored.type):
        # The engine knows true, t, yes, y and their opposites.
        flag = f"coalesce(TRY_CAST(trim({column}) AS BOOLEAN)::DOUBLE, {flag})"
    rule = Rule(
        condition=f"{flag} IN (0, 1)",
        text=f"label {stored.name} must be 0 or 1",
        column=stored.name,
        explain=_as_words if _is_text(stored.type) else _as_grade,
    )
    return Reading(value=f"CASE WHEN {flag} = 1 THEN 1 ELSE 0 END", rules=(rule,))


def _as_words(shown: str) -> str:
    """What a message says of text that is no label."""
    return f"true, t, yes, y, their opposites, 0 and 1 are known; if {shown[:100]!r} is an action, give action values"


def _as_grade(shown: str) -> str:
    """What a message says of a number that is no label."""
    return (
        f"if {shown} is one of several grades, give them as action values, or predict the number ([label] in a schema "
        "file)"
    )


def read_words(stored: Stored, target: IdType, words: Sequence[str], separator: str | None) -> Reading:
    """The bits of a row's words, by their places among `words`; any other word is refused.

    A list, or text divided at `separator`, holds any number of words, none included; without them a row has one.
    """
    bits = " ".join(f"WHEN {literal(word)} THEN {1 << place}" for place, word in enumerate(words))
    known = f"IN ({', '.join(map(literal, words))})"
    if stored.is_list or separator:
        reading = read_ids(stored, target, (), separator)
        value = f"list_distinct({reading.value})"
        condition = f"len(list_filter({value}, lambda word: word::VARCHAR NOT {known})) = 0"
        value = f"coalesce(list_sum(list_transform({value}, lambda word: CASE word::VARCHAR {bits} ELSE 0 END)), 0)"
        text = f"{stored.name} must hold words of {', '.join(words)}"
    else:
        reading = read_id(stored, target, ())
        value = f"({reading.value})::VARCHAR"
        condition, value = f"{value} {known}", f"CASE {value} {bits} ELSE 0 END"
        text = f"{stored.name} must be one of {', '.join(words)}; several in one cell need an action separator"
    return Reading(value=value, rules=(*reading.rules, Rule(condition=condition, text=text, column=stored.name)))
