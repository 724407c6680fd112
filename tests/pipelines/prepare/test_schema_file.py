"""Logs described by a schema file: what is prepared equals a plain Python reading of the same rows."""

import csv
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipelines.prepare.test_event_log import HOUR, keys_of
from tests.pipelines.prepare.test_prepare import prepare, read_back, rows_of, write_lines

ROOT = Path(__file__).resolve().parents[3]
HEAD = """
user = "who"
item = "what"
time = "when"
actions = ["buy", "like"]
"""
PARTS = ("sample", "event", "candidate", "label", "users", "items")
STORED = {"event": "history_", "candidate": "candidate_", "label": "label_"}


def random_value(kind: str, generator: np.random.Generator, gaps: float = 0.2) -> Any:
    """A value of a column of `number`, one id (`a space`) or many (`[a space]`)."""
    if kind.startswith("["):
        return [f"k{key}" for key in generator.integers(0, 9, generator.integers(0, 4))]
    if generator.random() < gaps:
        return None
    return round(float(generator.normal()), 3) if kind == "number" else f"k{generator.integers(0, 9)}"


def random_schema(generator: np.random.Generator) -> dict[str, dict[str, str]]:
    """(part: name: kind) of a few columns; a name means one thing in the rows of the log."""
    spaces = ("brand", "tag", "hashed", "item")
    kinds = ["number", *spaces[:3], *(f"[{space}]" for space in spaces[:3])]
    meant = {f"c{number}": str(generator.choice(kinds)) for number in range(5)}
    schema: dict[str, dict[str, str]] = {}
    for part in PARTS:
        names = [name for name in meant if generator.random() < 0.5]
        own = {name: str(generator.choice(kinds)) for name in names}
        schema[part] = {name: meant[name] for name in names} if part in STORED else own
        if part == "label":
            schema[part] = {name: kind for name, kind in schema[part].items() if not kind.startswith("[")}
        if part in ("sample", "users"):
            schema[part] = {f"{part}_{name}": kind for name, kind in own.items()}
    # Nobody knows beforehand what is to be predicted.
    schema["candidate"] = {name: kind for name, kind in schema["candidate"].items() if name not in schema["label"]}
    return schema


WEIGHTS = {"weight": "importance", "keep_rate": "kept"}
"""Columns of the log that some schemas name for these."""


def toml_of(schema: dict[str, dict[str, str]], weights: Iterable[str] = ()) -> str:
    """The schema file; many ids are lists in Parquet and JSON, and divided by | in CSV."""

    def entry(kind: str) -> str:
        space = kind.strip("[]")
        return f'{{ of = ["{space}"], separator = "|" }}' if kind.startswith("[") else f'"{space}"'

    text = HEAD + "".join(f'{name} = "{WEIGHTS[name]}"\n' for name in weights)
    for part, columns in schema.items():
        table = f"{part}.columns" if part in ("users", "items") else part
        lines = [f"{name} = {entry(kind)}" for name, kind in columns.items()]
        if part in ("users", "items") and columns:
            text += f'[{part}]\nfiles = "{part}.csv"\n'
        if columns:
            text += f"[{table}]\n" + "\n".join(lines) + "\n"
    kinds = {kind.strip("[]") for columns in schema.values() for kind in columns.values()}
    return text + ("[spaces.hashed]\nrows = 50\nhash = true\n" if "hashed" in kinds else "")


def random_log(schema: dict[str, dict[str, str]], generator: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of a log of that schema, no two of a user at one time."""
    labels = schema["label"]
    columns = {name: kind for part in ("sample", *STORED) for name, kind in schema[part].items()}
    rows = []
    for user in range(6):
        times = generator.choice(40_000, 12, replace=False)
        for time in times:
            row = {"who": f"u{user}", "what": f"i{generator.integers(0, 8)}", "when": HOUR + int(time)}
            row |= {"buy": int(generator.integers(2)), "like": int(generator.integers(2))}
            row |= {"importance": float(generator.integers(5)), "kept": float(generator.integers(1, 5)) / 4}
            for name, kind in columns.items():
                row[name] = random_value(kind, generator, gaps=0.0 if name in labels else 0.2)
            rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], kinds: dict[str, str]) -> None:
    """Rows in the format that the name says."""
    if path.suffix == ".jsonl":
        write_lines(path, [json.dumps(row) for row in rows])
    elif path.suffix == ".parquet":
        types = {name: pa.float64() if kind == "number" else pa.string() for name, kind in kinds.items()}
        types |= {name: pa.list_(pa.string()) for name, kind in kinds.items() if kind.startswith("[")}
        arrays = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
        pq.write_table(pa.table(arrays), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow(["|".join(each) if isinstance(each, list) else each for each in row.values()])


class Reading:
    """Ids of a prepared data set back to keys, and keys of hashed spaces to ids."""

    def __init__(self, out: Path) -> None:
        self._keys = {
            path.stem.removesuffix("_ids"): keys_of(out, path.stem.removesuffix("_ids"))
            for path in out.glob("*_ids.parquet")
        }

    def keys(self, space: str, identifier: int) -> Any:
        """The key of an id; of a hashed space, the id itself."""
        return identifier if space == "hashed" else self._keys[space].get(identifier)

    def same(self, kind: str, prepared: Any, value: Any) -> bool:
        """Whether what is prepared is this value of the log."""
        space = kind.strip("[]")
        if kind == "number":
            return math.isnan(prepared) if value is None else prepared == value
        if kind.startswith("["):
            return [self.keys(space, each) for each in prepared] == [self.expected(space, each) for each in value or []]
        return bool(self.keys(space, prepared) == self.expected(space, value))

    def expected(self, space: str, key: str | None) -> Any:
        """What `keys` gives for a key of the log."""
        if space != "hashed":
            return key
        digest = hashlib.md5(str(key).encode(), usedforsecurity=False).digest()
        return 0 if key is None else 1 + int.from_bytes(digest[8:], "little") % 49


@pytest.mark.parametrize("seed", range(12))
def test_random_schemas_against_a_plain_reading(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    schema = random_schema(generator)
    rows = random_log(schema, generator)
    weights = [name for name in WEIGHTS if generator.random() < 0.5]
    kinds = {name: kind for part in ("sample", *STORED) for name, kind in schema[part].items()}
    attributes = {
        "users": [{"who": f"u{user}"} for user in range(5)],
        "items": [{"what": f"i{item}"} for item in range(1, 12)],
    }
    source = tmp_path / "in"
    source.mkdir()
    for name, entries in attributes.items():
        for entry in entries:
            entry |= {column: random_value(kind, generator) for column, kind in schema[name].items()}
        if schema[name]:
            write_rows(source / f"{name}.csv", entries, schema[name])
    for number, suffix in enumerate(generator.choice(["csv", "parquet", "jsonl"], 3)):
        write_rows(source / f"{number}.{suffix}", rows[number::3], kinds)
    (tmp_path / "schema.toml").write_text(toml_of(schema, weights))
    options = ("--schema", str(tmp_path / "schema.toml"), "--samples-per-user", "0", "--candidates", "3", "--no-counts")
    assert prepare("event_log", source, tmp_path / "out", *options, "--split-time", str(HOUR + 30_000)) == 0

    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    reading = Reading(tmp_path / "out")
    events = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["when"]):
        events[row["who"]].append(row)
    checked = 0
    for sample in rows_of(tmp_path / "out", "train") + rows_of(tmp_path / "out", "eval"):
        user = reading.keys("user", sample["user_id"])
        ours = events[user]
        middle = next(i for i, row in enumerate(ours) if row["when"] == sample["candidate_timestamp"][0])
        spans = {"event": ours[:middle], "candidate": ours[middle : middle + sample["num_candidates"]]}
        spans["label"] = spans["candidate"]
        for part, prefix in STORED.items():
            for name, kind in schema[part].items():
                values = sample[prefix + name]
                assert len(values) == len(spans[part])
                assert all(reading.same(kind, each, row[name]) for each, row in zip(values, spans[part], strict=True))
                checked += len(values)
        for name in weights:
            assert sample[f"label_{info[name]}"] == [row[WEIGHTS[name]] for row in spans["label"]]
        for name, kind in schema["sample"].items():
            known = [row[name] for row in ours[:middle] if row[name] not in (None, [])]
            assert reading.same(kind, sample[name], known[-1] if known else None)
        known_user = {entry["who"]: entry for entry in attributes["users"]}.get(user, {})
        for name, kind in schema["users"].items():
            assert reading.same(kind, sample[name], known_user.get(name))
    assert checked or not any(schema[part] for part in STORED)
    if schema["items"]:
        known_items = {entry["what"]: entry for entry in attributes["items"]}
        for row in pq.read_table(tmp_path / "out" / "items").to_pylist():
            entry = known_items.get(reading.keys("item", row["item_id"]), {})
            assert all(reading.same(kind, row[name], entry.get(name)) for name, kind in schema["items"].items())
    check_statistics(info, schema, rows)
    assert read_back(tmp_path / "out") == sum(split["samples"] for split in info["splits"].values())


def check_statistics(info: dict[str, Any], schema: dict[str, dict[str, str]], rows: list[dict[str, Any]]) -> None:
    """Numbers of events, against NumPy."""
    before = [row for row in rows if row["when"] < info["split_time"]]
    for name in (name for name, kind in schema["event"].items() if kind == "number"):
        values = np.array([row[name] for row in before if row[name] is not None])
        stated = info["numbers"][f"event.{name}"]
        assert (stated["count"], stated["missing"]) == (len(values), len(before) - len(values))
        assert stated["mean"] == pytest.approx(values.mean())
        assert stated["std"] == pytest.approx(values.std())
        assert (stated["quantiles"][0], stated["quantiles"][-1]) == (values.min(), values.max())
        assert stated["quantiles"][50] == np.quantile(values, 0.5, method="inverted_cdf")


def toml_block() -> str:
    """The example of the document."""
    return (ROOT / "pipelines" / "prepare" / "README.md").read_text().split("```toml\n")[1].split("```")[0]


def documented_log(source: Path) -> None:
    """A log of the form that the document's example describes."""
    lines = ["customer,sku,at,event,request_id,importance,kept,country,dwell_s,search_text,surface,price_now,last_seen"]
    lines[0] += ",watched_s"
    for user in range(6):
        for day in range(1, 9):
            word, item = ("view", "cart", "buy")[day % 3], f"s{(user + day) % 5}"
            values = [f"c{user}", item, f"2024-01-{day:02d} 10:00:00", word, f"r{user}-{day}", 1.5, 0.25, "de", day]
            values += ["red shoe", "home", 9.5, "s1", day * 2]
            lines.append(",".join(map(str, values)))
    lines.append(lines[-1].replace(",de,", ",test,"))
    write_lines(source / "log.csv", lines)
    (source / "attributes" / "items").mkdir(parents=True)
    write_lines(source / "attributes" / "users.csv", ["id,age,interests", "c0,31,toys|books", "c1,,", "c99,5,toys"])
    table = {"sku": ["s0", "s1"], "brand": ["acme", None], "category": [["toys"], []], "price": [1.0, 2.0]}
    pq.write_table(pa.table(table), source / "attributes" / "items" / "part.parquet")


def test_the_documented_schema_prepares_a_log_of_that_form(tmp_path: Path) -> None:
    documented_log(tmp_path / "in")
    (tmp_path / "shop.toml").write_text(toml_block())
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "shop.toml")) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["left_out"] == {"where": 1}
    assert (info["weight"], info["keep_rate"]) == ("importance", "kept")
    assert info["sample"] == {"country": "country", "age": "number", "interests": ["category"]}
    assert info["event"] == {"item_id": "item", "dwell_s": "number", "query": ["word"], "surface": "surface"}
    assert info["item"] == {"brand": "brand", "category": ["category"], "price": "number"}
    assert info["spaces"]["item"]["rows"] == 1_000_000
    assert info["spaces"]["word"] == {"rows": 262_144, "used": 262_144, "hash": "md5"}
    [row] = [
        row for row in rows_of(tmp_path / "out", "eval") if keys_of(tmp_path / "out", "user")[row["user_id"]] == "c0"
    ]
    assert [keys_of(tmp_path / "out", "category")[each] for each in row["interests"]] == ["toys", "books"]
    assert row["candidate_surface"] == [1] * row["num_candidates"]
    assert row["label_watched_s"] == [2 * 8.0]
    assert row["label_kept"] == [0.25]


WRONG_FILES = {
    'user = "u': "cannot be read: ",
    'user = "u"': "item, time, actions must be given",
    HEAD + "colour = 1": "the file has the unknown key 'colour'; known are user, item, time",
    HEAD + "where = 3": "where must be text, got 3",
    HEAD + "[event]\nx = 7": "column x of event must be 'number', a space's name or [name], got 7",
    HEAD + '[event]\nx = ["number"]': "column x of event must be 'number', a space's name or [name], got ['number']",
    HEAD + '[candidate]\nx = { of = "y", request = true }': "column x of candidate has the unknown key 'request'",
    HEAD + '[event]\nx = { of = "y", separator = "|" }': "column x of event: a separator divides many ids",
    HEAD + '[event]\ntimestamp = "number"': "the event column cannot be called 'timestamp'; rename it",
    HEAD + '[event]\nx = "number"\n[label]\nx = "y"': "events, candidates and labels mean two things by x",
    HEAD + '[event]\nx = "number"\nX = { of = "number", column = "y" }': "the event column x is named twice",
    HEAD + '[event]\nx = "Brand"\ny = "brand"': "the spaces Brand and brand differ in large and small letters alone",
    HEAD + '[label]\nx = ["y"]': "the label column x cannot hold many ids",
    HEAD + "[spaces.y]\nrows = 9": "no column is of the space y; spaces are item, user",
    HEAD + "[spaces.item]\nhash = true": "spaces.item: a hash needs rows",
    HEAD + "[spaces.item]\nunbounded = true": "spaces.item: unbounded ids need rows",
    HEAD + "[spaces.item]\nunbounded = true\nrows = 9\nmin_count = 2": "training counts keys",
    HEAD + "[spaces.user]\nunbounded = true\nrows = 9": "the space user tells users apart",
    HEAD + '[label]\nx = "y"\n[spaces.y]\nunbounded = true\nrows = 9': "the label x is of the unbounded space y",
    HEAD + "[spaces.item]\nrows = true": "spaces.item.rows must be of type int, got True",
    HEAD + "[spaces.user]\nmin_count = 2": "the space user tells users apart",
    HEAD + '[users]\nfiles = "u.csv"': "users must give files and columns",
    HEAD + '[candidate]\nx = { of = "number", column = "buy" }': "buy, which a model is to predict",
    HEAD + '[event]\nx = { of = "number", column = "buy", request = true }': "buy, which a model is to predict",
    HEAD + '[candidate]\nx = "number"\n[label]\nx = "number"': "x is read from x, which a model is to predict",
    HEAD + '[event]\nx = "a/b"': "the space 'a/b' of column x must have a name without dot and slash",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_schema_file_is_wrong_use_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "schema.toml").write_text(text)
    with pytest.raises(SystemExit) as left:
        prepare("event_log", tmp_path, tmp_path / "out", "--schema", str(tmp_path / "schema.toml"))
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "schema.toml" in error
    assert WRONG_FILES[text] in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--user-column", "u"], "--user-column has no effect with --schema, which says it"),
        (["--time-unit", "ms", "--history-columns", "x"], "--time-unit, --history-columns has no effect with --schema"),
        (["--where", "true"], "--where 'true' and the schema's where"),
    ],
)
def test_flags_that_a_schema_file_leaves_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "schema.toml").write_text(toml_block())
    with pytest.raises(SystemExit):
        prepare("event_log", tmp_path, tmp_path / "out", "--schema", str(tmp_path / "schema.toml"), *options)
    assert message in capsys.readouterr().err


WRONG_ROWS = {
    ("price_now", "9.5", "cheap"): "log.csv, line 2: price_now must hold finite numbers",
    ("importance", "1.5", "-1"): "log.csv, line 2: weight importance must not be negative or missing",
    ("importance", "1.5", ""): "log.csv, line 2: weight importance must not be negative or missing",
    ("kept", "0.25", "0"): "log.csv, line 2: keep rate kept must lie above 0 and at most at 1",
    ("kept", "0.25", "1.5"): "log.csv, line 2: keep rate kept must lie above 0 and at most at 1",
    ("watched_s", "2", ""): "log.csv, line 2: label watched_s must not be missing",
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_a_wrong_number_weight_or_label_is_named_by_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str, str]
) -> None:
    documented_log(tmp_path / "in")
    column, old, new = wrong
    lines = (tmp_path / "in" / "log.csv").read_text().splitlines()
    values = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert values[column] == old
    lines[1] = ",".join({**values, column: new}.values())
    write_lines(tmp_path / "in" / "log.csv", lines)
    (tmp_path / "shop.toml").write_text(toml_block())
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "shop.toml")) == 1
    assert WRONG_ROWS[wrong] in capsys.readouterr().err.splitlines()[-1]


def test_weights_that_are_all_zero_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documented_log(tmp_path / "in")
    log = tmp_path / "in" / "log.csv"
    log.write_text(log.read_text().replace(",1.5,", ",0,"))
    (tmp_path / "shop.toml").write_text(toml_block())
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "shop.toml")) == 1
    assert "weight importance is 0 in every row" in capsys.readouterr().err


def test_wrong_files_of_attributes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documented_log(tmp_path / "in")
    (tmp_path / "shop.toml").write_text(toml_block())
    users = tmp_path / "in" / "attributes" / "users.csv"

    def error() -> str:
        assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "shop.toml")) == 1
        return capsys.readouterr().err.splitlines()[-1]

    write_lines(users, ["id,age,interests", "c0,31,toys", "c1,4,", "c0,32,books"])
    assert "line 4: id 'c0' stands in an earlier row, too; give one row each (docs/own_data.md keeps" in error()
    write_lines(users, ["id,age", "c0,31"])
    assert "users.csv lacks the column(s) interests; divided at ',', it has id, age" in error()
    write_lines(users, ["id,age,interests", ",31,"])
    assert "users.csv, line 2: id must not be missing" in error()
    users.unlink()
    assert "attributes/users.csv: files of attributes are named relative to --source" in error()
    write_lines(users, ["id,age,interests", "c0,31,toys"])
    (tmp_path / "shop.toml").write_text(
        toml_block().replace('"|"', '"|"').replace('["category"], price', '"brand", price')
    )
    assert "part.parquet stores category as VARCHAR[], lists where one id a row was expected" in error()
    (tmp_path / "shop.toml").write_text(toml_block().replace(', separator = " "', ""))
    assert (
        "log.csv stores search_text as VARCHAR, but many ids were expected: give lists, or text with a sep" in error()
    )


def test_rare_keys_share_the_unknown_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documented_log(tmp_path / "in")
    lines = (tmp_path / "in" / "log.csv").read_text().splitlines()
    lines[1] = lines[1].replace(",s1,", ",rare,", 1)
    write_lines(tmp_path / "in" / "log.csv", lines)
    (tmp_path / "shop.toml").write_text(toml_block())
    assert prepare("event_log", tmp_path / "in", tmp_path / "out", "--schema", str(tmp_path / "shop.toml")) == 0
    assert set(keys_of(tmp_path / "out", "item").values()) == {f"s{item}" for item in range(5)}
    rows = rows_of(tmp_path / "out", "train")
    assert min(item for row in rows for item in row["history_item_id"] + row["candidate_item_id"]) == 0
    options = ("--schema", str(tmp_path / "shop.toml"), "--min-count", "2")
    assert prepare("event_log", tmp_path / "in", tmp_path / "no", *options) == 1
    assert "--min-count cannot renumber last_seen, another column of the space item" in capsys.readouterr().err
