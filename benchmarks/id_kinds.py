"""Kinds of ids where items come and go: unbounded ids and a hash of as many rows, and a row for every item.

Run: python -m benchmarks.id_kinds [--rows 128] [--events 30000] [--seeds 3] [--work DIR] [--json FILE]

The log is made up (`benchmarks/made_up/drifting_log.py`): 60 items at a time, all replaced ten times, so 660 in all.
`own_log` is trained once over the first 97% of it in the order of time and asked for the rest, where five items of six
are known.
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.made_up.drifting_log import write_drifting_log
from benchmarks.measured_on import device
from benchmarks.quality.trainings import Training, prepare, seeded, train_all

ALIVE, LIVES = 60, 10
SCHEMA = """
user = "user"
item = "item"
time = "at"
actions = ["click"]
"""
PREPARED = ("--no-counts", "--no-state", "--order", "time", "--max-history", "8", "--train-fraction", "0.97")
SETTINGS = (
    "data.order=stored",
    "data.max_history_len=8",
    "data.num_epochs=1",
    # The log is small: many small steps, at rates that learn an item in the two thousand events that it lives for.
    "data.global_batch_size=12",
    "schedule.kind=constant",
    "sparse_optimizer.learning_rate=0.3",
    "embedding_dim=8",
)


def main() -> None:
    """Train every kind with every seed and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--events", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keeps data and runs there, and goes on with what is done")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with TemporaryDirectory() as scratch:
        results = compare(given.work or Path(scratch), given.rows, given.events, given.seeds)
    report = {"machine": device(), "rows": given.rows, "events": given.events, "ways": results}
    print(table(report))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def ways_of(rows: int) -> dict[str, str]:
    """What a schema file says of the space of items, by kind of ids."""
    return {
        f"unbounded, {rows} rows": f"[spaces.item]\nrows = {rows}\nunbounded = true\n",
        f"a hash, {rows} rows": f"[spaces.item]\nrows = {rows}\nhash = true\n",
        "a vocabulary, a row for every item": "",
    }


def compare(folder: Path, rows: int, events: int, seeds: int) -> dict[str, list[dict[str, Any]]]:
    """The evaluations of each kind, one a seed, of the log as well."""
    trainings = []
    for seed in range(seeds):
        logs = folder / f"log-{seed}"
        logs.mkdir(parents=True, exist_ok=True)
        write_drifting_log(logs / "log.csv", events=events, alive=ALIVE, lives=LIVES, seed=seed)
        for number, space in enumerate(ways_of(rows).values()):
            schema, data = folder / f"{number}.toml", folder / f"data-{seed}-{number}"
            schema.write_text(SCHEMA + space)
            prepare(data, ["event_log", "--source", str(logs), "--schema", str(schema), *PREPARED])
            settings = (f"data.path={data}", *SETTINGS, *seeded(seed))
            trainings.append(Training(recipe="own_log", run=folder / f"run-{seed}-{number}", settings=settings))
    evaluations = iter([trained.evaluations[-1] for trained in train_all(trainings, 2)])
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways_of(rows)}
    for _ in range(seeds):
        for found in results.values():
            evaluation = next(evaluations)
            found.append({name: evaluation[name] for name in ("ne/click", "auc/click")})
    return results


def table(report: dict[str, Any]) -> str:
    """Means over the seeds, with the least and the most."""
    lines = ["| ids | NE | AUC |", "| --- | --- | --- |"]
    for way, found in report["ways"].items():
        cells = []
        for name in ("ne/click", "auc/click"):
            values = [each[name] for each in found]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {way} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
