"""Requests in plain Python are scored as the evaluation scores the same samples, and wrong ones are refused."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.records import from_dict
from pipelines.batches.requests import InputBuilder, Request
from pipelines.prepare.__main__ import main as prepare
from pipelines.reading.loader import build_loader, dataset_info
from pipelines.storage.keys import read_keys
from tests.support.training import ROOT, run_trainer
from trainer.command_line import WrongUse
from trainer.config import TrainConfig
from trainer.recipes import own_log
from trainer.resolve import resolve
from trainer.run.run_dir import RunDir
from trainer.scorer import Scorer, open_scorer

SCHEMA = """
user = "customer"
item = "sku"
time = "at"
actions = ["event"]
action_values = ["view", "buy"]
[event]
dwell_s = "number"
query = { of = ["word"], column = "search", separator = " " }
[sample]
country = "country"
[items]
files = "items.csv"
columns = { brand = "brand", shelf = ["shelf"] }
[spaces]
word = { rows = 50, hash = true }
"""
WORDS = ("red", "shoe", "n\u00e4h", "42")
COUNTRIES = ("de", "fr")
START = 1_704_000_000


def write_log(folder: Path) -> None:
    draw = np.random.default_rng(5)
    folder.mkdir()
    lines = ["customer,sku,at,event,dwell_s,search,country"]
    for user in range(60):
        times = START + np.sort(draw.choice(300_000, 14, replace=False))
        for number, time in enumerate(times):
            words = " ".join(draw.choice(WORDS, draw.integers(0, 3)))
            dwell = "" if draw.random() < 0.2 else f"{draw.integers(1, 90)}"
            event = "buy" if number % 3 == 0 else "view"
            lines.append(f"c{user},sku-{draw.integers(0, 40)},{time},{event},{dwell},{words},{COUNTRIES[user % 2]}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    items = [f"sku-{item},{'' if item % 5 == 0 else f'b{item % 4}'},{item % 3}|{item % 7}" for item in range(40)]
    (folder / "items.csv").write_text("\n".join(["sku,brand,shelf", *items]).replace("shelf\n", "shelf\n") + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data/shop, and runs/shop that was trained for a few steps on it."""
    folder = tmp_path_factory.mktemp("serving")
    prepare_shop(folder)
    settings = [f"data.path={folder / 'data/shop'}", "max_steps=4", "data.max_history_len=8", "data.unknown_share=0.1"]
    run(folder, "shop", *settings)
    return folder


def prepare_shop(folder: Path) -> None:
    """Write data/shop."""
    write_log(folder / "logs")
    schema = SCHEMA.replace('shelf = ["shelf"]', 'shelf = { of = ["shelf"], separator = "|" }')
    (folder / "shop.toml").write_text(schema)
    options = ["--schema", str(folder / "shop.toml"), "--no-counts", "--candidates", "4"]
    assert prepare(["event_log", "--source", str(folder / "logs"), "--out", str(folder / "data/shop"), *options]) == 0


def run(folder: Path, name: str, *settings: str, recipe: str = "own_log") -> Path:
    """Train a run."""
    status, output = run_trainer("train", recipe, "--run-dir", str(folder / "runs" / name), "--set", *settings)
    assert status == 0, output[-3000:]
    return folder / "runs" / name


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[Scorer]:
    """As on a server, where the data set lies elsewhere."""
    moved = shutil.copytree(folder / "data/shop", folder / "elsewhere")
    with open_scorer(folder / "runs/shop", data=moved) as scorer:
        yield scorer


def stored_requests(folder: Path, scorer: Scorer) -> list[Request]:
    """The evaluation's samples with the keys of the log in place of ids."""
    info, path = scorer.inputs._info, str(folder / "data/shop")
    names: dict[str, dict[int, Any]] = {}
    for space in info.spaces.values():
        if space.keys is not None:
            table = pq.read_table(Path(path, space.keys))
            names[space.name] = dict(zip(table[1].to_pylist(), table[0].to_pylist(), strict=True))
    names["word"] = {read_keys(path, info.spaces["word"])[0](word): word for word in WORDS}

    def key(space: str, value: Any) -> Any:
        return [key(space, each) for each in value] if isinstance(value, list) else names[space].get(value)

    requests = []
    for row in pq.read_table(sorted(Path(path, "eval").glob("*.parquet"))).to_pylist():
        request: dict[str, dict[str, Any]] = {"sample": {}, "event": {}, "candidate": {}}
        for column in info.columns:
            if column.part in request:
                value = row[column.stored]
                number = column.kind == "number"
                request[column.part][column.name] = value if number else key(column.space or "", value)
        masks = row["history_action"]
        request["event"]["action"] = [[n for bit, n in enumerate(info.actions) if mask >> bit & 1] for mask in masks]
        request["event"]["timestamp"] = row["history_timestamp"]
        request["candidate"]["timestamp"] = np.array(row["candidate_timestamp"])
        requests.append(request)
    return requests


@torch.no_grad()
def test_scores_are_those_of_the_evaluation_bit_for_bit(folder: Path, scorer: Scorer) -> None:
    saved = RunDir(folder / "runs/shop").saved_config()
    assert saved is not None
    config = from_dict(TrainConfig, saved)
    assert scorer.resolved.config.data.path == str(folder / "elsewhere") != config.data.path
    assert {"id", "ids", "number"} == {feature.kind for feature in scorer.inputs._selection.features}
    selection = scorer.inputs._selection
    requests = stored_requests(folder, scorer)
    first = 0
    for batch in build_loader(config.data, split="eval", rank=0, world_size=1, selection=selection):
        mine = scorer.inputs(requests[first : first + batch.global_samples])
        first += batch.global_samples
        expected = scorer.model.score(batch.inputs, scorer.trained)
        assert torch.equal(scorer.model.score(mine, scorer.trained), expected)
        assert torch.equal(mine.features.values(), batch.inputs.features.values())
        predicted = scorer.score(requests[first - batch.global_samples : first])
        flat = [value for each in predicted for value in each["buy"]]
        assert flat == torch.sigmoid(expected[:, 1].double()).tolist()
    assert first == len(requests) > 10
    assert any(len(request["event"]["item_id"]) > 8 for request in requests), "longer histories are cut as ever"


def test_the_example_of_the_documentation_runs(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    # The data here have one column more.
    code = code.replace('"event": {', '"event": {"query": [["red"], []], ', 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr and "fx_tracing" not in done.stderr
    bought, never_seen = map(float, done.stdout.strip("[] \n").split(","))
    assert 0 < bought < 1 and 0 < never_seen < 1


GOOD: dict[str, Any] = {
    "sample": {"country": "de"},
    "event": {
        "item_id": ["sku-1"],
        "action": [["view"]],
        "timestamp": [START],
        "dwell_s": [3],
        "query": [["red", "never-seen"]],
    },
    "candidate": {"item_id": ["sku-2", None], "timestamp": [START + 9, START + 9]},
}


def test_attributes_that_a_request_gives_stand_in_the_place_of_the_catalogues(scorer: Scorer) -> None:
    """Of a new item all may be said; what the catalogue says of another may be said again, for the same inputs."""
    given = {"item.brand": ["b2", None], "item.shelf": [["2", "2"], ["1", "never-seen", "6"]]}
    candidate = {**GOOD["candidate"], "item_id": ["sku-2", "sku-new"]}
    plain, mine = (
        scorer.inputs([GOOD, {**GOOD, "candidate": candidate}]),
        scorer.inputs([GOOD, {**GOOD, "candidate": {**candidate, **given}}]),
    )
    # Brands of two events, then of the first request's candidates, then of the second's; b2 is that of sku-2.
    brands, stored = mine.ids_host("item.brand").tolist(), plain.ids_host("item.brand").tolist()
    assert brands == stored and len(brands) == 6 and brands[-2] > 0
    to_id = scorer.inputs._keys_of("shelf")[0]
    lens = mine.lens["item.shelf"].tolist()
    assert lens[:-1] == plain.lens["item.shelf"].tolist()[:-1] and (lens[-2], lens[-1]) == (2, 3)
    assert mine.ids_host("item.shelf").tolist()[-3:] == [to_id("1"), 0, to_id("6")]
    other = scorer.inputs([{**GOOD, "candidate": {**candidate, "item.brand": ["b3", "b1"]}}]).ids_host("item.brand")
    assert len(set(other.tolist()[-2:]) | {0, brands[-2]}) == 4
    for wrong, message in (
        ({"item.brand": [3, "b1"]}, "request 0: candidate column 'item.brand' must hold text, got 3"),
        ({"item.brand": ["b1"]}, "candidate_item.brand holds 1 values, but candidate_item_id holds 2"),
        ({"item.colour": ["red", "red"]}, "request 0 has the candidate column 'item.colour', which is none of"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.inputs([{**GOOD, "candidate": {**candidate, **wrong}}])


def test_missing_keys_are_left_out_of_lists_and_blank_ones_are_missing(scorer: Scorer) -> None:
    """As in the preparation, where no list holds them."""
    plain, mine, blank = (
        scorer.inputs([{**GOOD, "event": {**GOOD["event"], "query": [query]}, "sample": {"country": country}}])
        for query, country in ((["red"], None), ([None, "red", None], None), (["", "red", " "], " "))
    )
    for other in (mine, blank):
        assert torch.equal(other.features.values(), plain.features.values())
        assert torch.equal(other.features.lengths(), plain.features.lengths())


def test_a_ranker_names_no_items(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="ranks candidates that it is given: ask it by score"):
        scorer.retrieve([{"event": GOOD["event"], "sample": GOOD["sample"]}])


def test_requests_may_lack_history_and_each_has_its_own_candidates(scorer: Scorer) -> None:
    alone = {name: columns for name, columns in GOOD.items() if name != "event"}
    few = {**GOOD, "candidate": {"item_id": ["sku-3"], "timestamp": [START + 5]}}
    scores = scorer.score([GOOD, alone, few])
    assert [len(each["buy"]) for each in scores] == [2, 2, 1] and set(scores[0]) == {"view", "buy"}
    (again,) = scorer.score([few])
    assert scores[2]["buy"] == pytest.approx(again["buy"], abs=1e-6)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        (
            "event",
            {"dwel_s": [1]},
            "request 1 has the event column 'dwel_s', which is none of action, timestamp, item_id",
        ),
        ("candidates", {}, "request 1 has the part 'candidates', which is none of sample, event, candidate"),
        (
            "event",
            {"dwell_s": None},
            "request 1: event column 'dwell_s' must be a list with a value for each, got None",
        ),
        ("event", {"dwell_s": ["3"]}, "request 1: event column 'dwell_s' must hold numbers, or None .*, got '3'"),
        ("event", {"dwell_s": [10**400]}, "request 1: event column 'dwell_s' must hold numbers of 32 bits"),
        ("event", {"dwell_s": [float("inf")]}, "column history_dwell_s of row 1 is infinite"),
        (
            "event",
            {"query": ["red"]},
            "request 1: event column 'query' must hold a list of any length for each, got 'red'",
        ),
        ("event", {"item_id": [1]}, "request 1: event column 'item_id' must hold text, got 1"),
        ("event", {"action": [["sell"]]}, r"'action' must hold a list of some of view, buy for each, got \['sell'\]"),
        ("event", {"timestamp": [1.5]}, "request 1: event column 'timestamp' must hold seconds, or -1, got 1.5"),
        (
            "candidate",
            {"timestamp": [START + 9, 2**63]},
            "candidate column 'timestamp' must hold seconds, or -1, got 9",
        ),
        (
            "event",
            {"timestamp": [START, START]},
            "row 1: history_timestamp holds 2 values, but history_item_id holds 1",
        ),
        ("event", {"timestamp": [START + 9]}, "row 1: the history reaches the time of the first candidate"),
        ("sample", {"country": 3}, "request 1: sample column 'country' must hold text, got 3"),
    ],
)
def test_a_wrong_request_is_refused_by_name(scorer: Scorer, part: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.inputs([GOOD, {**GOOD, part: {**GOOD.get(part, {}), **changed}}])


def test_a_request_that_lacks_something_and_a_run_that_is_none_are_refused(scorer: Scorer, tmp_path: Path) -> None:
    for part, name in (("event", "dwell_s"), ("event", "action"), ("candidate", "item_id"), ("sample", "country")):
        columns = {key: value for key, value in GOOD[part].items() if key != name}
        with pytest.raises(ValueError, match=f"request 0: {part} column '{name}' is missing"):
            scorer.inputs([{**GOOD, part: columns}])
    with pytest.raises(ValueError, match="there is no request"):
        scorer.inputs([])
    refused: list[tuple[Any, str]] = [
        (GOOD, "requests must be a list of them, got dict"),
        ([GOOD, None], "request 1 must be a dict with its parts by name, got None"),
        (
            [GOOD, {**GOOD, "event": None}],
            "request 1: the part 'event' must be a dict with its columns by name, got None",
        ),
    ]
    for wrong, message in refused:
        for ask in (scorer.inputs, scorer.inputs.without_candidates):
            with pytest.raises(ValueError, match=message):
                ask(wrong)
    with pytest.raises(WrongUse, match=r"holds no config\.json"), open_scorer(tmp_path):
        pass


def test_counts_that_a_request_lacks_are_named_with_the_ways_to_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = own_log()
    config = replace(config, data=replace(config.data, path="data/kuairand_sample"))
    info = dataset_info(config.data)
    inputs = InputBuilder(config.data, info, resolve(config, info).task.selection)
    request = {
        "sample": {column.name: None for column in info.of("sample")},
        "candidate": {"item_id": [None], "timestamp": [START]},
    }
    with pytest.raises(ValueError, match=r"column 'item_seen' is missing, .* with model\.input\.counts=\[\]$"):
        inputs([request])
