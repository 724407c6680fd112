"""A run that goes on over the next day's log: ids stay, tables grow, the new part is scored before it is trained on."""

import json
from pathlib import Path

import numpy as np

from pipelines.prepare.__main__ import main as prepare
from tests.support.training import read_checkpoint, read_lines, run_trainer

COLUMNS = ("--user-column", "who", "--item-column", "what", "--time-column", "at", "--time-unit", "s")
ACTIONS = ("--action-columns", "did", "--action-values", "buy,skip")
USERS, EVENTS = 40, 10


def write_day(folder: Path, day: int, items: int) -> Path:
    """A day's log: the same users, with items that were not there the day before."""
    draw = np.random.default_rng(day)
    start = 1_700_000_000 + 86_400 * day
    times = np.sort(draw.integers(0, 86_000, USERS * EVENTS))
    lines = [
        f"c{user},i{draw.integers(0, items)},{start + time},{'buy' if draw.random() < 0.4 else 'skip'}\n"
        for user, time in zip(draw.permutation(np.repeat(np.arange(USERS), EVENTS)), times, strict=True)
    ]
    folder.mkdir()
    (folder / "log.csv").write_text("who,what,at,did\n" + "".join(lines))
    return folder


def train(run: Path, data: Path) -> str:
    settings = (f"data.path={data}", "evaluation.progressive=true", "log_every=1", "data.num_epochs=1")
    status, output = run_trainer("train", "own_log", "--run-dir", str(run), "--set", *settings)
    assert status == 0, output[-3000:]
    return output


def test_a_run_goes_on_over_a_day_with_new_items(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    assert (
        prepare(
            ["event_log", "--source", str(write_day(tmp_path / "1", 0, 30)), "--out", str(data), *COLUMNS, *ACTIONS]
        )
        == 0
    )
    train(run, data)
    known = json.loads((data / "dataset.json").read_text())["spaces"]["item"]["rows"]
    before = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    steps = read_lines(run / "metrics.jsonl")
    assert not (run / "progressive.jsonl").exists()

    assert prepare(["event_log", "--source", str(write_day(tmp_path / "2", 1, 45)), "--extend", str(data)]) == 0
    grown = json.loads((data / "dataset.json").read_text())["spaces"]["item"]["rows"]
    train(run, data)
    after = read_checkpoint(max((run / "checkpoints").glob("step-*")))
    assert before["tables/item"].shape[0] == known < grown == after["tables/item"].shape[0]
    # It went on at the next step, and had met the new part at the last one of the old.
    lines = read_lines(run / "metrics.jsonl")
    assert lines[: len(steps)] == steps and lines[len(steps)]["step"] == steps[-1]["step"] + 1
    (met,) = read_lines(run / "progressive.jsonl")
    assert (met["step"], met["part"]) == (steps[-1]["step"], "part=00001")
    assert met["positives/buy"] > 0
