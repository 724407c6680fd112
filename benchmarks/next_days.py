"""Three days of a made-up shop, delivered one after another: prepared, trained on, extended, trained on further.

Run: python -m benchmarks.next_days --work DIR [--users 200000] [--json benchmarks/results/next_days.json]

What is measured: seconds and peak memory of every step, and progressive validation, each day scored before it is
trained on.  What must be equal, and is checked: every sample of the data set that grew day by day, and of one
preparation of all days, against the log itself; the candidates of the two, counts included; the newest attributes of
every item.  Where no item changes its attributes (`--unchanging`), training day by day must also be the same, to the
last bit, as a run that meets all parts at once.  Steps that are done under DIR are not done again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.made_up.prepared_rows import check_against_log, differing_columns
from benchmarks.made_up.shop import DAY, SCHEMA, START, Day, shop_days, write_delivery
from benchmarks.measured_on import measured_on

DAYS, MAX_HISTORY = 3, 64
SETTINGS = (
    "data.num_epochs=1",
    "data.global_batch_size=512",
    "data.eval_batch_size=1024",
    f"data.max_history_len={MAX_HISTORY}",
    "embedding_dim=16",
    "evaluation.progressive=true",
    # A decay would end with each day, and training that goes on would not be that of all days.
    "schedule.kind=constant",
    "log_every=1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="A made-up shop's log, day after day.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the log, data and runs")
    parser.add_argument("--users", type=int, default=200_000, help="users of the first day")
    parser.add_argument("--unchanging", action="store_true", help="items keep their attributes")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    found = three_days(arguments.work, arguments.users, changing=not arguments.unchanging)
    report = {"hardware": measured_on(), "users": arguments.users, **found}
    print(table(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def three_days(work: Path, num_users: int, *, changing: bool) -> dict[str, Any]:
    """Do all of it; returns what was measured.

    Raises:
        ValueError: something differs that must be equal.
    """
    work.mkdir(parents=True, exist_ok=True)
    days = shop_days(num_users, DAYS, 0, changing=changing)
    (work / "schema.toml").write_text(SCHEMA)
    data, whole, run = (work / name for name in ("data", "whole", "run"))
    steps = Steps(work / "steps.json")
    cut = ("--min-history", "0", "--eval-candidates", "1000", "--max-history", MAX_HISTORY)
    schema = ("--schema", work / "schema.toml")
    for number in range(DAYS):
        folder = delivery(work / f"day-{number}", days[number : number + 1])
        # The second day is all for training: it is evaluated before it is trained on.
        split = ("--split-time", START + 2 * DAY) if number == 1 else ()
        place = ("--extend", data) if number else ("--out", data, *schema, *cut)
        steps.do(f"prepare day {number + 1}", "pipelines.prepare", "event_log", "--source", folder, *place, *split)
        steps.do(f"train on day {number + 1}", "trainer", *training(run, data))
    folder = delivery(work / "all", days)
    steps.do("prepare all days", "pipelines.prepare", "event_log", "--source", folder, "--out", whole, *schema, *cut)
    for prepared in (data, whole):
        check_against_log(prepared, days, MAX_HISTORY)
    differing = differing_columns(data, whole)
    if differing:
        raise ValueError(f"{data} and {whole} differ in {', '.join(differing)} of candidates")
    if not changing:
        steps.do("train on all days", "trainer", *training(work / "once", data))
        losses = [[line["loss"] for line in lines(folder / "metrics.jsonl")] for folder in (run, work / "once")]
        if losses[0] != losses[1]:
            raise ValueError(f"{run} and {work / 'once'}, trained day by day and on all days, differ in their losses")
    spaces = json.loads((data / "dataset.json").read_text())["spaces"]
    return {
        "events": [day.log.num_rows for day in days],
        "rows": {name: space["rows"] for name, space in spaces.items() if name in ("item", "user")},
        "steps": steps.done,
        "progressive": lines(run / "progressive.jsonl"),
        "evaluation": lines(run / "eval.jsonl"),
    }


def delivery(folder: Path, days: Sequence[Day]) -> Path:
    """The folder with these days' files."""
    return folder if folder.is_dir() else write_delivery(folder, days)


def training(run: Path, data: Path) -> tuple[Any, ...]:
    """Arguments of the trainer."""
    return ("train", "own_log", "--run-dir", run, "--set", f"data.path={data}", *SETTINGS)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(report: Mapping[str, Any]) -> str:
    """The steps and the progressive validation as tables in Markdown."""
    rows = ["| step | seconds | peak MiB |", "| --- | --- | --- |"]
    rows += [f"| {name} | {step['s']:.0f} | {step['peak_mib']:,.0f} |" for name, step in report["steps"].items()]
    actions = [name.removeprefix("auc/") for name in report["progressive"][0] if name.startswith("auc/")]
    rows += ["", "| part, before it is trained on | " + " | ".join(f"{name}: AUC | NE" for name in actions) + " |"]
    rows.append("| --- |" + " --- |" * 2 * len(actions))
    for met in report["progressive"]:
        cells = [f"{met[f'{metric}/{name}']:.3f}" for name in actions for metric in ("auc", "ne")]
        rows.append(f"| {met['part']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


class Steps:
    """Commands that are run one after another, each once; what they cost is kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.done: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}

    def do(self, name: str, module: str, *arguments: object) -> None:
        """Run a module of the project; what it says goes to a file beside that of the steps."""
        if name in self.done:
            return
        log, start = self._file.with_name(f"{name.replace(' ', '-')}.log"), time.perf_counter()
        command = [sys.executable, "-m", module, *map(str, arguments)]
        with log.open("w") as output:
            actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), descriptor) for descriptor in (1, 2)]
            process = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
            _, status, usage = os.wait4(process, 0)
        if status:
            raise ValueError(f"{' '.join(command)} failed: see {log}")
        self.done[name] = {"s": time.perf_counter() - start, "peak_mib": usage.ru_maxrss / 1024}
        self._file.write_text(json.dumps(self.done))


if __name__ == "__main__":
    main()
